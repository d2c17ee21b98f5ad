"""The tokens that contestants train on: random ones, or those of a text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from composer_gpt2.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_encoding

__all__ = ["random_batch", "text_batches"]


def random_batch(batch_size: int, sequence_length: int, seed: int = 17) -> Tensor:
    """Tokens as unevenly frequent as words are (Zipf's law), int64, shape ``(B, T)``."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1.0, VOCAB_SIZE + 1)
    n_tokens = batch_size * sequence_length
    tokens = torch.multinomial(frequencies, n_tokens, replacement=True, generator=generator)
    return tokens.view(batch_size, sequence_length)


def text_batches(
    source: str | Iterable[str], n_batches: int, batch_size: int, sequence_length: int
) -> Tensor:
    """The first tokens of a text, int64, shape ``(n_batches, B, T)``.

    Args:
        source: A text file, or documents, between which ``<|endoftext|>`` stands.
        n_batches: How many.
        batch_size: Sequences of a batch.
        sequence_length: Tokens of a sequence.

    Raises:
        ValueError: The text is too short.
    """
    encoding = get_encoding()
    documents = [Path(source).read_text("utf-8")] if isinstance(source, str) else source
    needed = n_batches * batch_size * sequence_length
    tokens: list[int] = []
    for document in documents:
        tokens += [*encoding.encode_ordinary(document), END_OF_TEXT]
        if len(tokens) >= needed:
            break
    if len(tokens) < needed:
        raise ValueError(
            f"the text must have {needed:,} tokens for {n_batches} batches of {batch_size} x "
            f"{sequence_length}, got {len(tokens):,}; give a longer one or fewer batches."
        )
    return torch.tensor(tokens[:needed]).view(n_batches, batch_size, sequence_length)
