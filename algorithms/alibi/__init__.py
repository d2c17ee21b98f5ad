"""Attention with linear biases in place of learned positions."""

from algorithms.alibi.alibi import ALiBi, alibi_bias, apply_alibi, linear_bias_slopes

__all__ = ["ALiBi", "alibi_bias", "apply_alibi", "linear_bias_slopes"]
