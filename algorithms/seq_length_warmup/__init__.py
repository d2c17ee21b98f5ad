"""Train on short sequences first; see README.md, the method card."""

from algorithms.seq_length_warmup.seq_length_warmup import (
    SequenceLengthWarmup,
    distinct_lengths,
    sequence_length_at,
    set_batch_sequence_length,
)

__all__ = [
    "SequenceLengthWarmup",
    "distinct_lengths",
    "sequence_length_at",
    "set_batch_sequence_length",
]
