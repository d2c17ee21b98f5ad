"""The GPT-2 family by name: ``family.yaml`` holds the table, :func:`get_config` reads it."""

from __future__ import annotations

import functools
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from composer_gpt2.arguments import nearest

if TYPE_CHECKING:
    from transformers import GPT2Config

__all__ = ["family", "get_config"]

_ATTENTION = ("sdpa", "eager", "flash_attention_2")  # that transformers has for GPT-2


def family() -> tuple[str, ...]:
    """Names of all models of the family, in the table's order."""
    return tuple(_table())


def get_config(name: str, **overrides: Any) -> GPT2Config:
    """The Hugging Face configuration of a model of the family.

    ``get_config("gpt2-125m", n_positions=2048, resid_pdrop=0.0)`` changes single settings.

    Args:
        name: One of :func:`family`.
        **overrides: Any argument of :class:`transformers.GPT2Config`; ``dropout`` sets
            ``attn_pdrop``, ``embd_pdrop`` and ``resid_pdrop`` at once.

    Returns:
        A fresh configuration, with a vocabulary of 50,257 unless overridden.

    Raises:
        ValueError: The name is not in the family, an override is no setting of GPT-2, or
            ``n_head`` does not divide ``n_embd``.
    """
    from transformers import GPT2Config

    if name not in _table():
        raise ValueError(
            f"model name must be one of the family's, got {name!r}{nearest(name, _table())}; "
            f"there are: {', '.join(_table())}."
        )
    settings = {**_table()[name], **overrides}
    if "dropout" in settings:
        dropout = settings.pop("dropout")
        settings = {"attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout} | settings
    known = GPT2Config().to_dict().keys() | {"attn_implementation"}
    for key in settings:
        if key not in known:
            raise ValueError(
                f"settings of {name} must be arguments of transformers.GPT2Config, got {key!r}"
                f"{nearest(key, known)}."
            )
    config = GPT2Config(**settings)
    attention = settings.get("attn_implementation", "sdpa")
    if attention not in _ATTENTION:
        raise ValueError(
            f"attn_implementation must be one of {', '.join(_ATTENTION)}, got {attention!r}"
            f"{nearest(attention, _ATTENTION)}."
        )
    if config.add_cross_attention or config.is_encoder_decoder:
        raise ValueError(
            "GPT-2 here is a decoder alone: add_cross_attention and is_encoder_decoder must be "
            "false, got true."
        )
    if config.n_embd % config.n_head:
        raise ValueError(
            f"n_embd must be a multiple of n_head, got n_embd={config.n_embd} and "
            f"n_head={config.n_head}; change one of them."
        )
    return config


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    file = resources.files("composer_gpt2.configs").joinpath("family.yaml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))
