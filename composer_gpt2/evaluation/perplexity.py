"""Perplexity of a text, over windows that score each token once.

A model reads ``context_length`` tokens at once; a text is longer. The first window scores all of
its tokens. Each further one ends ``stride`` tokens later and scores those only, so that each of
them has at least ``context_length - stride`` tokens before it. With a stride as long as the context
windows do not overlap: cheapest, and the harshest on the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from composer_gpt2.evaluation.likelihood import Request, Scorer
from composer_gpt2.evaluation.texts import TokenStream
from composer_gpt2.metrics import perplexity_of

__all__ = ["Perplexity", "measure_perplexity", "windows"]


@dataclass(frozen=True)
class Perplexity:
    """A loss, and what it may be divided by."""

    nats: float
    """Minus the log-likelihood of all scored tokens."""
    n_tokens: int
    """Scored, the ends of documents among them."""
    n_bytes: int
    n_characters: int | None
    n_words: int | None
    context_length: int
    stride: int

    @property
    def metrics(self) -> dict[str, float]:
        """Loss in nats a token, perplexity, and what else there are counts for."""
        bits = self.nats / math.log(2)
        values = {
            "loss": self.nats / self.n_tokens,
            "perplexity": perplexity_of(self.nats / self.n_tokens),
            "bits_per_byte": bits / self.n_bytes,
        }
        if self.n_characters:
            values["bits_per_character"] = bits / self.n_characters
        if self.n_words:
            values["word_perplexity"] = perplexity_of(self.nats / self.n_words)
        return values


def windows(n_tokens: int, context_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where windows over a stream begin, where what they score begins, and where it ends.

    A window reads the tokens from ``begin`` to before ``end - 1`` and is asked for those from
    ``start`` to before ``end``; the first token of a stream is never asked for.

    >>> list(windows(8, context_length=4, stride=2))
    [(0, 1, 5), (2, 5, 7), (3, 7, 8)]

    Args:
        n_tokens: Of the stream, at least 2.
        context_length: Tokens that a window reads.
        stride: Tokens that each window after the first scores, from 1 to ``context_length``.
    """
    start, end = 1, min(context_length + 1, n_tokens)
    while start < n_tokens:
        yield max(0, end - 1 - context_length), start, end
        start, end = end, min(end + stride, n_tokens)


def measure_perplexity(
    scorer: Scorer,
    streams: Sequence[TokenStream],
    *,
    stride: int | None = None,
    description: str = "perplexity",
) -> Perplexity:
    """The perplexity of streams of tokens; none of them sees another.

    Args:
        scorer: Its ``context_length`` is that of the windows.
        streams: Of :class:`composer_gpt2.evaluation.texts.Text`.
        stride: From 1 to the context length. Default: the context length.
        description: What the progress bar says.

    Raises:
        ValueError: A stride out of range, or nothing to score.

    Source: https://huggingface.co/docs/transformers/perplexity describes strides.
    """
    length = scorer.context_length
    stride = stride or length
    if not 1 <= stride <= length:
        raise ValueError(
            f"stride must be from 1 to the context length ({length}), got {stride}; a longer one "
            "would skip tokens."
        )
    n_tokens = sum(max(0, len(stream.tokens) - 1) for stream in streams)
    if not n_tokens:
        raise ValueError("a text must have at least two tokens to be scored, got an empty one.")
    requests = (
        Request(stream.tokens[begin:start].tolist(), stream.tokens[start:end].tolist())
        for stream in streams
        for begin, start, end in windows(len(stream.tokens), length, stride)
    )
    nats, n_scored = 0.0, 0
    # In parts, so that overlapping windows of a long text need not be in memory together.
    while part := list(itertools.islice(requests, max(1, _TOKENS_AT_ONCE // length))):
        n_scored += sum(len(request.continuation) for request in part)
        done = "" if n_scored == n_tokens else f" (to {n_scored / n_tokens:.0%})"
        found = scorer.log_likelihoods(part, f"{description}, {length:,} tokens{done}")
        nats -= sum(each.log_likelihood for each in found)
    return Perplexity(
        nats=nats,
        n_tokens=n_tokens,
        n_bytes=sum(stream.n_bytes for stream in streams),
        n_characters=_sum([stream.n_characters for stream in streams]),
        n_words=_sum([stream.n_words for stream in streams]),
        context_length=length,
        stride=stride,
    )


_TOKENS_AT_ONCE = 2**22


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
