"""From a corpus to batches: prepare it once, verify it anywhere, stream it into training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composer_gpt2.data.preparation import prepare
    from composer_gpt2.data.streaming import StreamingTokens
    from composer_gpt2.data.verification import verify

__all__ = ["StreamingTokens", "prepare", "verify"]

_MODULES = {"StreamingTokens": "streaming", "prepare": "preparation", "verify": "verification"}


def __getattr__(name: str) -> object:
    # Importing streaming (and with it torch) takes seconds, which preparing need not wait for.
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"composer_gpt2.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
