"""What algorithms do to batches: check them, and split their sequences.

Shapes: ``B`` sequences, ``T`` tokens.
"""

from __future__ import annotations

from typing import Any

from composer.core import Batch
from torch import Tensor

from composer_gpt2.contract import NoEffectError

__all__ = ["check_token_batch", "split_sequences"]


def check_token_batch(batch: Any, algorithm: str) -> tuple[int, int]:
    """The shape ``(B, T)`` that all tensors of a batch have.

    Raises:
        NoEffectError: The batch is no mapping of such tensors; ``algorithm`` is named as the one
            that cannot act on it.
    """
    if isinstance(batch, dict) and "input_ids" in batch:
        shape = getattr(batch["input_ids"], "shape", ())
        others = {
            key: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            for key, value in batch.items()
            if not isinstance(value, Tensor) or value.shape != shape
        }
        if len(shape) == 2 and not others:
            return shape[0], shape[1]
        found = f"input_ids of shape {tuple(shape)} beside {others}"
    else:
        found = f"keys {sorted(batch)}" if isinstance(batch, dict) else type(batch).__name__
    raise NoEffectError(
        f"{algorithm} needs batches that are dicts of tensors of one shape (B, T), input_ids among "
        f"them, got {found}."
    )


def split_sequences(batch: Batch, n_parts: int, algorithm: str) -> dict[str, Tensor]:
    """Each sequence as ``n_parts`` shorter ones, in order: (B, T) to (B * n_parts, T / n_parts).

    Raises:
        NoEffectError: It is no batch of tokens.
        ValueError: ``n_parts`` does not divide T.
    """
    n_sequences, n_tokens = check_token_batch(batch, algorithm)
    if n_tokens % n_parts:
        raise ValueError(
            f"{algorithm} must divide sequences into whole parts, got {n_tokens} tokens in "
            f"{n_parts} parts."
        )
    shape = (n_sequences * n_parts, n_tokens // n_parts)
    return {key: tensor.reshape(shape) for key, tensor in batch.items()}
