"""Speedup algorithms, one folder each; import them through ``composer_gpt2.algorithms``."""
