"""What becomes of the architectural algorithms of a network when it is exported."""

from __future__ import annotations

from typing import Any

from transformers import GPT2LMHeadModel

from composer_gpt2 import registry
from composer_gpt2.contract import SpeedupAlgorithm, architecture

__all__ = ["NotExportableError", "changes_to_write"]


class NotExportableError(ValueError):
    """The network has something that no exported form says."""


def changes_to_write(module: GPT2LMHeadModel) -> dict[str, dict[str, Any]]:
    """The algorithms that the exported model must have, after taking out what can be taken out.

    Args:
        module: Changed in place; its predictions stay.

    Returns:
        Name to settings, in the order of application; empty for a plain GPT-2.

    Raises:
        NotExportableError: An algorithm can neither be taken out nor be written, or the
            configuration has something that the modeling file of changed networks has not.
    """
    kept = {}
    for name, settings in architecture(module).items():
        algorithm = _algorithm(name)
        if algorithm.take_out(module):
            continue
        if algorithm.exported_as is None:
            raise NotExportableError(
                f"an exported network must have algorithms with an exported form, got {name}, "
                f"whose class {algorithm.__name__} has neither exported_as nor take_out; see "
                "docs/export.md, or ask its author."
            )
        kept[name] = settings
    config = module.config
    if kept and (config.add_cross_attention or config.reorder_and_upcast_attn):
        raise NotExportableError(
            "a network with changes must have neither cross attention nor reorder_and_upcast_attn "
            f"to be exported, got add_cross_attention={config.add_cross_attention} and "
            f"reorder_and_upcast_attn={config.reorder_and_upcast_attn}."
        )
    return kept


def _algorithm(name: str) -> type[SpeedupAlgorithm]:
    return registry.get("algorithms", name).load()  # type: ignore[return-value]
