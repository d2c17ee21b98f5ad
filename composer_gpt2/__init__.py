"""GPT-2-class pretraining as a plugin for MosaicML Composer.

``from composer_gpt2 import GPT2Model`` is the front door; recipes start with
``composer run.py -f yamls/gpt2-125m.yaml``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from composer_gpt2._version import __version__

if TYPE_CHECKING:
    from composer_gpt2.model import GPT2Model

__all__ = ["GPT2Model", "__version__"]


def __getattr__(name: str) -> object:
    # Importing Composer takes five seconds; the tokenizer, the data tools and `--help` do not wait.
    if name == "GPT2Model":
        from composer_gpt2.model import GPT2Model

        return GPT2Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
