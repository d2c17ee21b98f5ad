"""Log-likelihoods of texts after other texts, in batches, with as few tokens as can be.

What this does and a plain loop over requests does not: batches of similar length, beginnings that
several requests share computed once (see :mod:`composer_gpt2.evaluation.batching`), and logits only
at the positions that are scored, where they would be most of the work. The numbers are the same.

Shapes: ``G`` prefixes, ``R`` rows, ``P`` tokens of a prefix, ``S`` tokens of a row, ``H`` heads,
``N`` positions that are scored, ``D`` model width, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from composer.utils import dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache
from transformers.activations import NewGELUActivation

from composer_gpt2.evaluation.batching import Batch, Request, Row, plan_batches
from composer_gpt2.model import GPT2Model

__all__ = ["Likelihood", "Request", "Scorer"]


class Likelihood(NamedTuple):
    """How likely a continuation is after its context."""

    log_likelihood: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one."""


@dataclass
class Scorer:
    """A model, and how it is to be asked for likelihoods.

    The model runs in evaluation mode and is given back in the mode it had.

    Example:
        >>> scorer = Scorer(GPT2Model.from_pretrained("openai-community/gpt2"))
        >>> scorer.log_likelihoods([Request([50256], [15496, 11])])

    Args:
        model: On any device.
        context_length: Tokens that the model reads at once. Default: those it was made for, also
            where (ALiBi) it could read more.
        batch_tokens: Tokens of a forward pass. Default: 512 on a CPU, 32,768 on a GPU.
        autocast_dtype: Products are computed in this type. Default: bfloat16 on a CPU if the
            model's ``cpu_precision`` says so, else the type of the weights.
        shared_by_ranks: Each rank computes a share of the batches and gets the results of all;
            every rank must ask for the same.
        progress: Show a progress bar (on rank 0).

    Raises:
        ValueError: A context beyond the model's positions, or a number below 1.
    """

    model: GPT2Model
    context_length: int = 0
    batch_tokens: int = 0
    autocast_dtype: torch.dtype | None = None
    shared_by_ranks: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        on_cpu = self.device.type == "cpu"
        self.context_length = self.context_length or self.model.model.config.n_positions
        self.batch_tokens = self.batch_tokens or (512 if on_cpu else 32_768)
        if self.autocast_dtype is None and on_cpu and self.model.cpu_precision == "amp_bf16":
            self.autocast_dtype = torch.bfloat16
        if self.context_length < 1 or self.batch_tokens < 1:
            raise ValueError(
                "context_length and batch_tokens must be at least 1, got "
                f"{self.context_length} and {self.batch_tokens}."
            )
        longest = self.model.context_length
        if longest is not None and self.context_length > longest:
            raise ValueError(
                f"context_length must be at most the model's {longest} learned positions, got "
                f"{self.context_length}; only a model without them (ALiBi) reads further."
            )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def log_likelihoods(
        self, requests: Sequence[Request], description: str = "scoring"
    ) -> list[Likelihood]:
        """The likelihood of each continuation after its context, in the order of the requests.

        Softmax and sums are in float32 or wider, whatever the products are computed in.

        Args:
            requests: With tokens of the model.
            description: What the progress bar says.

        Raises:
            ValueError: A request that has no context or continuation, or does not fit the context.
        """
        rank, n_ranks = 0, 1
        if self.shared_by_ranks:
            rank, n_ranks = dist.get_global_rank(), dist.get_world_size()
        batches = plan_batches(
            requests,
            context_length=self.context_length,
            batch_tokens=self.batch_tokens,
            n_shares=n_ranks,
        )
        found: dict[int, Likelihood] = {}
        mine = batches[rank::n_ranks]  # largest first: shares are about equal
        was_training = self.model.training
        self.model.eval()
        try:
            with (
                torch.inference_mode(),
                self.autocast(),
                _gelu_in_one_pass(self.model.model),
                tqdm(
                    total=sum(batch.n_tokens for batch in mine),
                    desc=description,
                    unit="tok",
                    unit_scale=True,
                    leave=False,
                    disable=not self.progress or rank > 0,
                ) as bar,
            ):
                for batch in mine:
                    found.update(self._score(batch))
                    bar.update(batch.n_tokens)
        finally:
            self.model.train(was_training)
        if n_ranks > 1:
            for share in dist.all_gather_object(found):
                found.update(share)
        return [found[number] for number in range(len(requests))]

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the model runs."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def _score(self, batch: Batch) -> dict[int, Likelihood]:
        network: Any = self.model.model
        sums: dict[int, float] = dict.fromkeys((row.request for row in batch.rows), 0.0)
        greedy: dict[int, bool] = dict.fromkeys(sums, True)

        def add(hidden: Tensor, scored: Sequence[_Scored]) -> None:
            for item, value, is_likeliest in _log_probabilities(network.lm_head, hidden, scored):
                sums[item.request] += value
                greedy[item.request] &= is_likeliest

        prefixes = None
        if batch.prefix_steps:
            prefixes = _Prefixes(network, batch.prefix_steps, self.device)
            scored, start = _scored_in_prefixes(batch), 0
            for hidden in prefixes.hidden:
                stop = start + len(hidden)
                here = [item for item in scored if start <= item.row < stop]
                add(hidden, [item._replace(row=item.row - start) for item in here])
                start = stop
        for step in batch.steps:
            rows = [row for row in step if row.inputs]
            if not rows:
                continue
            inputs = _padded([row.inputs for row in rows], self.device)  # (R, S)
            special: dict[str, Any] = {"use_cache": False}
            if prefixes is not None:
                special = prefixes.arguments(rows, inputs.shape[1])
            hidden = network.transformer(inputs, **special).last_hidden_state  # (R, S, D)
            add(hidden, _scored_in_rows(rows))
        return {request: Likelihood(sums[request], greedy[request]) for request in sums}


@contextlib.contextmanager
def _gelu_in_one_pass(network: nn.Module) -> Iterator[None]:
    """Hugging Face has GPT-2's activation as eight operations, a tenth of the time on a CPU."""
    found = [m for m in network.modules() if type(getattr(m, "act", None)) is NewGELUActivation]
    theirs = [module.act for module in found]
    try:
        for module in found:
            module.act = nn.GELU(approximate="tanh")
        yield
    finally:
        for module, activation in zip(found, theirs, strict=True):
            module.act = activation


class _Scored(NamedTuple):
    """A token whose probability is asked for."""

    row: int
    position: int
    """In the row, of the input that predicts it."""
    target: int
    request: int


def _scored_in_prefixes(batch: Batch) -> list[_Scored]:
    """What the prefixes predict; sequences may part behind one position, which then has several."""
    scored = []
    for row in batch.rows:
        length, n = len(batch.prefixes[row.prefix]), row.n_targets_of_prefix
        scored += [
            _Scored(row.prefix, length - n + i, target, row.request)
            for i, target in enumerate(row.targets[:n])
        ]
    return scored


def _scored_in_rows(rows: Sequence[Row]) -> list[_Scored]:
    scored = []
    for number, row in enumerate(rows):
        targets = row.targets[row.n_targets_of_prefix :]
        first = len(row.inputs) - len(targets)
        scored += [
            _Scored(number, first + i, target, row.request) for i, target in enumerate(targets)
        ]
    return scored


_LOGIT_BYTES = 24 * 2**20  # of float32 logits at once, which glibc reuses; a GPU has 16 times that


def _log_probabilities(
    head: Any, hidden: Tensor, scored: Sequence[_Scored]
) -> Iterator[tuple[_Scored, float, bool]]:
    """Of each token its log-probability and whether it is the likeliest.

    Args:
        head: States to logits.
        hidden: Shape ``(R, S, D)``.
        scored: In any order; each position has its logits computed once.
    """
    if not scored:
        return
    by_position = sorted(scored, key=lambda each: each[:2])
    positions = sorted({each[:2] for each in scored})
    place = {position: number for number, position in enumerate(positions)}
    device, width = hidden.device, hidden.shape[1]
    flat = torch.tensor([row * width + position for row, position in positions], device=device)
    states = hidden.flatten(0, 1)[flat]  # (N, D)
    places = torch.tensor([place[each[:2]] for each in by_position], device=device)
    targets = torch.tensor([each.target for each in by_position], device=device)

    n_rows = _LOGIT_BYTES // (4 * head.weight.shape[0]) * (16 if hidden.is_cuda else 1)
    n_rows = max(1, n_rows)
    values, greedy = [], []
    for start in range(0, len(states), n_rows):
        logits = head(states[start : start + n_rows]).float()  # (n, V)
        here = (places >= start) & (places < start + n_rows)
        rows, wanted = places[here] - start, targets[here]
        highest, likeliest = logits.max(dim=1)
        chosen = logits[rows, wanted]
        total = logits.sub_(highest[:, None]).exp_().sum(dim=1).log_()
        values.append((chosen - (highest + total)[rows]).double())
        greedy.append(likeliest[rows] == wanted)
    yield from zip(by_position, torch.cat(values).tolist(), torch.cat(greedy).tolist(), strict=True)


class _Prefixes:
    """The keys and values of a batch's prefixes, to be copied to the rows of its steps."""

    def __init__(
        self, network: Any, steps: Sequence[Sequence[Sequence[int]]], device: torch.device
    ) -> None:
        lengths = [[len(prefix) for prefix in step] for step in steps]
        self.lengths = torch.tensor([n for step in lengths for n in step], device=device)
        self.longest = max(n for step in lengths for n in step)
        self.n_positions: int = network.config.n_positions
        self.hidden: list[Tensor] = []  # of each step, (G, P, D)
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in network.transformer.h]
        for step, of_step in zip(steps, lengths, strict=True):
            cache = DynamicCache()
            # Padding comes after the text, which does not see it: no mask is needed.
            inputs = _padded(step, device)
            outputs = network.transformer(inputs, past_key_values=cache, use_cache=True)
            self.hidden.append(outputs.last_hidden_state)
            # Each prefix moves to the end of its P places: a row follows at once, so that distances
            # are what they were, also those between places that ALiBi reads.
            empty = self.longest - torch.tensor(of_step, device=device)
            places = torch.arange(self.longest, device=device) - empty[:, None]
            for layer, part in enumerate(parts):
                keys, values = cache[layer]
                part.append((_take(keys, places), _take(values, places)))
        self.layers = [
            (torch.cat([keys for keys, _ in part]), torch.cat([values for _, values in part]))
            for part in parts
        ]

    def arguments(self, rows: Sequence[Row], n_tokens: int) -> dict[str, Any]:
        """What a forward pass needs besides the rows' own tokens."""
        device = self.lengths.device
        of_row = torch.tensor([row.prefix for row in rows], device=device)
        lengths = self.lengths[of_row]
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys[of_row], values[of_row], number)
        empty = torch.arange(self.longest, device=device) < (self.longest - lengths)[:, None]
        own = torch.ones(len(rows), n_tokens, dtype=torch.long, device=device)
        # Places of padding can lie behind the model's last position; nobody reads them.
        positions = lengths[:, None] + torch.arange(n_tokens, device=device)
        return {
            "past_key_values": cache,
            "use_cache": True,
            "attention_mask": torch.cat([(~empty).long(), own], dim=1),
            "position_ids": positions.clamp(max=self.n_positions - 1),
        }


def _take(states: Tensor, places: Tensor) -> Tensor:
    """Of states (G, H, P, D/H) those at places (G, P) of each prefix; anything if below 0."""
    index = places.clamp(min=0)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index)


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    rows = [torch.tensor(sequence) for sequence in sequences]
    return pad_sequence(rows, batch_first=True).to(device)
