"""The code of a remote-code export, which imports torch and transformers alone.

Export writes ``modeling_composer_gpt2.py`` with the code of the algorithms at its end: one file,
for transformers (4.53) finds no second one where the name of a folder has a dot in it, as
``gpt2-1.3b`` has.
"""

__all__: list[str] = []
