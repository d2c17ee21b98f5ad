"""How a sample lies in a shard: its tokens, and in some corpora which of them are targets."""

from __future__ import annotations

import numpy as np

__all__ = ["DTYPE", "IGNORED", "column_encodings", "read_sample", "sample_bytes"]

DTYPE = "uint16"  # of tokens: enough for 50,257
IGNORED = -100  # a label that is no target, as in torch.nn.CrossEntropyLoss


def column_encodings(sequence_length: int, *, has_loss_mask: bool) -> dict[str, str]:
    """Name and MDS encoding of each column, in the order in which they are stored."""
    mask = {"loss_mask": f"ndarray:uint8:{sequence_length}"} if has_loss_mask else {}
    return {**mask, "tokens": f"ndarray:{DTYPE}:{sequence_length}"}


def sample_bytes(sequence_length: int, *, has_loss_mask: bool) -> int:
    """Size of a sample in a shard."""
    return (3 if has_loss_mask else 2) * sequence_length


def read_sample(data: bytes, sequence_length: int) -> dict[str, np.ndarray] | None:
    """``input_ids`` and, with a loss mask, ``labels``; int64, shape ``(T,)``.

    Args:
        data: The bytes of a sample.
        sequence_length: T.

    Returns:
        ``None`` if it has another length.
    """
    has_loss_mask = len(data) == sample_bytes(sequence_length, has_loss_mask=True)
    if not has_loss_mask and len(data) != sample_bytes(sequence_length, has_loss_mask=False):
        return None
    start = sequence_length if has_loss_mask else 0
    tokens = np.frombuffer(data, DTYPE, offset=start).astype(np.int64)
    if not has_loss_mask:
        return {"input_ids": tokens}
    is_target = np.frombuffer(data, np.uint8, sequence_length) != 0
    return {"input_ids": tokens, "labels": np.where(is_target, tokens, IGNORED)}
