"""Blocks computed again in the backward pass instead of kept."""

from algorithms.activation_checkpointing.activation_checkpointing import (
    ActivationCheckpointing,
    apply_activation_checkpointing,
)

__all__ = ["ActivationCheckpointing", "apply_activation_checkpointing"]
