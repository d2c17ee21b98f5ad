"""Which sequences are computed together, and which of their beginnings only once.

The choices of a question share the question; so do, with a lag of a word or two, the readings of a
pronoun. Sequences are sorted as words in a dictionary, where those with a common beginning are
neighbours, and grouped where that saves tokens. Everything else is sorted by length, so that little
of a batch is padding. This is arithmetic on lists: what a model does with it is in
:mod:`composer_gpt2.evaluation.likelihood`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Batch", "Request", "Row", "plan_batches"]


class Request(NamedTuple):
    """Tokens whose probability is asked for, and those before them."""

    context: Sequence[int]
    """At least one token; cut from the left where all is longer than the model's context."""
    continuation: Sequence[int]
    """At least one token."""


class Row(NamedTuple):
    """A request of a batch."""

    request: int
    """Its number."""
    prefix: int
    """The number of its prefix in the batch; -1 if it has none."""
    inputs: Sequence[int]
    """What the model reads after the prefix; nothing, where the prefix is all that it reads."""
    targets: Sequence[int]
    """The continuation. The last inputs predict it; if there are too few, also the last tokens of
    the prefix."""

    @property
    def n_targets_of_prefix(self) -> int:
        """How many of the targets the prefix predicts."""
        return max(0, len(self.targets) - len(self.inputs))


@dataclass(frozen=True)
class Batch:
    """What is computed together: prefixes, step by step, then the rows that follow them."""

    prefix_steps: Sequence[Sequence[Sequence[int]]]
    """Beginnings that several rows share, in passes; none in a batch of whole sequences."""
    steps: Sequence[Sequence[Row]]
    """Rows of similar length. A batch without prefixes has one step."""

    @property
    def prefixes(self) -> list[Sequence[int]]:
        """Of all steps; their places here are their numbers."""
        return [prefix for step in self.prefix_steps for prefix in step]

    @property
    def rows(self) -> list[Row]:
        """Of all steps."""
        return [row for step in self.steps for row in step]

    @property
    def n_tokens(self) -> int:
        """Tokens that are computed, without padding."""
        return sum(len(row.inputs) for row in self.rows) + sum(map(len, self.prefixes))


def plan_batches(
    requests: Sequence[Request], *, context_length: int, batch_tokens: int, n_shares: int = 1
) -> list[Batch]:
    """Batches that compute every request once, the most expensive first.

    Args:
        requests: In any order.
        context_length: Tokens that the model may read; longer requests lose tokens from the left,
            as in the lm-evaluation-harness.
        batch_tokens: Tokens of a forward pass, with padding; a longer sequence is alone in its.
        n_shares: Among how many the batches will be divided.

    Raises:
        ValueError: A request has no context or no continuation, or a continuation that is longer
            than the context of the model.
    """
    inputs = [_inputs(request, number, context_length) for number, request in enumerate(requests)]
    groups = list(_groups(inputs))
    alone = [group.members[0] for group in groups if len(group.members) == 1]
    shared = [group for group in groups if len(group.members) > 1]
    batches = [
        *_whole_batches(requests, inputs, alone, batch_tokens),
        *_shared_batches(requests, inputs, shared, batch_tokens, n_shares),
    ]
    return sorted(batches, key=lambda batch: -batch.n_tokens)


# A prefix of its own costs a second forward pass and a mask: below this it does not pay.
_LEAST_SAVED = 16  # tokens for each sequence that joins a group
_LEAST_PART_SAVED = 0.25  # the same, of its tokens
# A pass ends early where the next sequence is so much shorter than its first, if it is this full.
_SHORTER, _FULL = 0.85, 0.25
# Prefixes are kept for so many passes: the more rows follow, the more have the same length.
_KEPT_PASSES = 4
# Tokens in the cache of a step for one token that it computes: a long prefix is copied to each row.
_CACHED_PER_TOKEN = 8


@dataclass
class _Group:
    """Sequences with a common beginning that is computed once."""

    members: list[int]
    n_shared: int  # tokens


def _inputs(request: Request, number: int, context_length: int) -> list[int]:
    if not request.context or not request.continuation:
        raise ValueError(
            "a request must have at least one token of context and one of continuation, got "
            f"{len(request.context)} and {len(request.continuation)} in request {number}; put the "
            "model's document_start before a text that has nothing before it."
        )
    if len(request.continuation) > context_length:
        raise ValueError(
            f"a continuation must fit the context of {context_length} tokens, got "
            f"{len(request.continuation)} in request {number}; score it in windows."
        )
    tokens = [*request.context[-context_length:], *request.continuation]
    return tokens[-(context_length + 1) : -1]


def _groups(inputs: Sequence[list[int]]) -> Iterator[_Group]:
    """Every sequence in one group, greedily, where that saves tokens."""
    order = sorted(range(len(inputs)), key=lambda member: inputs[member])
    group: _Group | None = None
    for member in order:
        if group is not None:
            n_shared = _n_common(inputs[group.members[-1]], inputs[member], group.n_shared)
            # Tokens with and without the newcomer in the group; all else is the same.
            saved = len(group.members) * n_shared - (len(group.members) - 1) * group.n_shared
            if saved >= max(_LEAST_SAVED, _LEAST_PART_SAVED * len(inputs[member])):
                group.members.append(member)
                group.n_shared = n_shared
                continue
            yield group
        group = _Group([member], len(inputs[member]))
    if group is not None:
        yield group


def _n_common(left: Sequence[int], right: Sequence[int], most: int) -> int:
    """How many of the first tokens are the same, at most ``most``."""
    most = min(most, len(left), len(right))
    for position in range(most):
        if left[position] != right[position]:
            return position
    return most


def _whole_batches(
    requests: Sequence[Request],
    inputs: Sequence[Sequence[int]],
    members: Iterable[int],
    batch_tokens: int,
) -> Iterator[Batch]:
    rows = [Row(i, -1, inputs[i], requests[i].continuation) for i in members]
    for step in _steps(rows, batch_tokens, n_cached=0):
        yield Batch([], [step])


def _shared_batches(
    requests: Sequence[Request],
    inputs: Sequence[Sequence[int]],
    groups: Iterable[_Group],
    batch_tokens: int,
    n_shares: int,
) -> Iterator[Batch]:
    longest_first = sorted(groups, key=lambda group: -group.n_shared)
    lengths = [group.n_shared for group in longest_first]
    kept = min(_KEPT_PASSES * batch_tokens, sum(lengths) // (2 * n_shares))
    for part in _cut(longest_first, max(batch_tokens, kept), lengths):
        prefixes = [inputs[group.members[0]][: group.n_shared] for group in part]
        rows = [
            Row(i, number, inputs[i][group.n_shared :], requests[i].continuation)
            for number, group in enumerate(part)
            for i in group.members
        ]
        yield Batch(
            list(_cut(prefixes, batch_tokens, [len(prefix) for prefix in prefixes])),
            list(_steps(rows, batch_tokens, n_cached=len(prefixes[0]))),
        )


def _steps(rows: Iterable[Row], batch_tokens: int, n_cached: int) -> Iterator[list[Row]]:
    longest_first = sorted(rows, key=lambda row: -len(row.inputs))
    lengths = [len(row.inputs) for row in longest_first]
    costs = [max(n, (n_cached + n) // _CACHED_PER_TOKEN) for n in lengths]
    yield from _cut(longest_first, batch_tokens, costs)


def _cut(items: Sequence, batch_tokens: int, costs: Sequence[int]) -> Iterator[list]:
    """Pieces whose number of items times the cost of the first, which is the largest, fits."""
    part: list = []
    largest = 1
    for item, cost in zip(items, costs, strict=True):
        size = len(part) * largest
        is_shorter = cost < _SHORTER * largest and size >= _FULL * batch_tokens
        if part and (size + largest > batch_tokens or is_shorter):
            yield part
            part = []
        if not part:
            largest = max(1, cost)
        part.append(item)
    if part:
        yield part
