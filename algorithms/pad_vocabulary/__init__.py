"""A vocabulary whose size the hardware likes."""

from algorithms.pad_vocabulary.pad_vocabulary import (
    PadVocabulary,
    apply_pad_vocabulary,
    trim_vocabulary,
)

__all__ = ["PadVocabulary", "apply_pad_vocabulary", "trim_vocabulary"]
