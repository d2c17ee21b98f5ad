"""Which token comes next: the distributions that texts are drawn from, as functions of logits.

Every function takes logits, shape ``(B, V)``, and returns logits of the same shape in which tokens
that must not be drawn are ``-inf``. They apply one after the other in the order of
:func:`restrict`, each to what the one before has left, as in Hugging Face's ``generate``.

Shapes: ``B`` texts, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampling", "draw", "keep_nucleus", "keep_top_k", "keep_typical", "restrict"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: Logits are divided by it; 0 takes the likeliest token each time.
        top_k: Only this many of the likeliest tokens are drawn.
        top_p: Only the likeliest tokens that together have this probability.
        typical_p: Only tokens about as surprising as the model expects, with this probability.

    Raises:
        ValueError: A number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(
                f"temperature must be 0 (the likeliest token) or above, got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k must be at least 1, got {self.top_k}")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                problems.append(f"{name} must be above 0 and at most 1, got {value}")
        if problems:
            raise ValueError("; ".join(problems) + "; leave out what is not wanted.")

    @property
    def is_greedy(self) -> bool:
        """Whether chance has no part in it."""
        return self.temperature == 0 or self.top_k == 1


def restrict(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits of the distribution that is drawn from; ``temperature`` must be above 0."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_nucleus(logits, sampling.top_p)
    if sampling.typical_p is not None:
        logits = keep_typical(logits, sampling.typical_p)
    return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Leaves the ``k`` likeliest tokens, and those that are as likely as the last of them.

    Source: Fan et al., 2018, https://arxiv.org/abs/1805.04833, section 5.
    """
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_nucleus(logits: Tensor, p: float) -> Tensor:
    """Leaves the fewest tokens whose probabilities add up to at least ``p``.

    Source: Holtzman et al., 2020, https://arxiv.org/abs/1904.09751, section 3.1.
    """
    return _keep_first(logits, logits, p)


def keep_typical(logits: Tensor, p: float) -> Tensor:
    """Leaves the tokens whose surprise is nearest to the expected one, with probability ``p``.

    The surprise of a token is ``-log(probability)``; the expected one is the entropy.

    Source: Meister et al., 2023, https://arxiv.org/abs/2202.00666, section 4.
    """
    logs = logits.log_softmax(dim=-1)
    entropy = torch.special.entr(logs.exp()).sum(dim=-1, keepdim=True)
    return _keep_first(logits, -(logs + entropy).abs(), p)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token for each row, by inversion of the cumulated probabilities.

    A row takes one random number, so what a text becomes does not depend on the others beside it.

    Args:
        logits: Shape ``(B, V)``; ``-inf`` is never drawn.
        uniform: Shape ``(B,)``, float64, in ``[0, 1)``.

    Returns:
        Shape ``(B,)``, int64.
    """
    cumulated = logits.float().softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = cumulated[:, -1:].contiguous()
    drawn = torch.searchsorted(cumulated, uniform[:, None] * total, right=True)
    last = torch.searchsorted(cumulated, total)  # where rounding went beyond the last token
    return torch.minimum(drawn, last)[:, 0]


def _keep_first(logits: Tensor, order: Tensor, p: float) -> Tensor:
    """Leaves the tokens that come first by descending ``order``, up to the one that reaches ``p``.

    The threshold leaves tokens in whose ``order`` is that of the last one. A long tail need not be
    sorted where the first tokens reach ``p``.
    """
    probabilities = logits.softmax(dim=-1)
    n_tokens = logits.shape[-1]
    for k in (_FIRST_SORTED, 8 * _FIRST_SORTED, n_tokens):
        # A sort is faster than the first of nearly all.
        first = order.topk(k, dim=-1) if k < n_tokens else order.sort(dim=-1, descending=True)
        values, indices = first
        reached = probabilities.gather(-1, indices).cumsum(dim=-1)
        if k >= n_tokens or bool((reached[:, -1] >= p).all()):
            break
    # The last kept token is the first whose sum reaches p; rounding may leave the sum of all below.
    last = (reached < p).sum(dim=-1, keepdim=True).clamp(max=values.shape[-1] - 1)
    return logits.masked_fill(order < values.gather(-1, last), -torch.inf)


_FIRST_SORTED = 1024
