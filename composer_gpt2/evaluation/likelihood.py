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
import torch.nn.functional as F
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
        answers = _Answers(self.model.model.lm_head)
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
                    self._score(batch, answers)
                    bar.update(batch.n_tokens)
                answers.finish()
        finally:
            self.model.train(was_training)
        found = answers.found
        if n_ranks > 1:
            for share in dist.all_gather_object(found):
                found.update(share)
        return [found[number] for number in range(len(requests))]

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the model runs."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def _score(self, batch: Batch, answers: _Answers) -> None:
        network: Any = self.model.model
        prefixes = None
        if batch.prefix_steps:
            prefixes = _Prefixes(network, batch.prefix_steps, self.device)
            scored, start = _scored_in_prefixes(batch), 0
            for hidden in prefixes.hidden:
                stop = start + len(hidden)
                here = [item for item in scored if start <= item.row < stop]
                answers.add(hidden, [item._replace(row=item.row - start) for item in here])
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
            answers.add(hidden, _scored_in_rows(rows))


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


# Logits of some positions and a part of the vocabulary are in memory at once: 512 x 8,192 x 4 bytes
# = 17 MB stay near a CPU, and each part of the head is read once for many positions.
_POSITIONS, _POSITIONS_ON_GPU, _VOCABULARY = 512, 4096, 8192


class _Answers:
    """Sums up the log-probabilities of tokens by request; positions wait until they are many.

    Args:
        head: States to logits, a linear layer.
    """

    def __init__(self, head: Any) -> None:
        self.head = head
        self.found: dict[int, Likelihood] = {}
        self._states: list[Tensor] = []  # (n, D) each
        self._n_states = 0
        self._places: list[int] = []  # of each waiting token, in the waiting states
        self._scored: list[_Scored] = []

    def add(self, hidden: Tensor, scored: Sequence[_Scored]) -> None:
        """Takes over what is scored of hidden states, shape ``(R, S, D)``."""
        if not scored:
            return
        width = hidden.shape[1]
        # Sequences may part behind a position: it has several tokens, and logits once.
        positions = sorted({(item.row, item.position) for item in scored})
        place = {position: self._n_states + n for n, position in enumerate(positions)}
        flat = torch.tensor([row * width + n for row, n in positions], device=hidden.device)
        self._states.append(hidden.flatten(0, 1)[flat])
        self._n_states += len(positions)
        self._places += [place[item.row, item.position] for item in scored]
        self._scored += scored
        if self._n_states >= (_POSITIONS_ON_GPU if hidden.is_cuda else _POSITIONS):
            self.finish()

    def finish(self) -> None:
        """Computes what waits."""
        if not self._scored:
            return
        states = torch.cat(self._states)
        places = torch.tensor(self._places, device=states.device)
        targets = torch.tensor([item.target for item in self._scored], device=states.device)
        values, greedy = _log_probabilities(self.head, states, places, targets)
        for item, value, is_likeliest in zip(
            self._scored, values.tolist(), greedy.tolist(), strict=True
        ):
            total, all_greedy = self.found.get(item.request, (0.0, True))
            self.found[item.request] = Likelihood(total + value, all_greedy and is_likeliest)
        self._states, self._n_states, self._places, self._scored = [], 0, [], []


def _log_probabilities(
    head: Any, states: Tensor, places: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Of each target its log-probability, float32, and whether it is the likeliest token.

    Args:
        head: A linear layer with ``V`` outputs.
        states: Shape ``(N, D)``.
        places: Of the state that predicts each target, shape ``(M,)``.
        targets: Tokens, shape ``(M,)``.
    """
    # In bfloat16 several logits can be the highest; then the first of them counts, as in argmax.
    is_rounded = states.dtype != torch.float32 or torch.is_autocast_enabled(states.device.type)
    likeliest = torch.zeros(len(states), dtype=torch.long, device=states.device)
    highest = torch.full(states.shape[:1], -torch.inf, device=states.device)
    total = torch.zeros_like(highest)  # of exp(logit - highest)
    chosen = torch.zeros(len(targets), device=states.device)
    for start in range(0, len(head.weight), _VOCABULARY):
        part = slice(start, start + _VOCABULARY)
        bias = None if head.bias is None else head.bias[part]
        logits = F.linear(states, head.weight[part], bias).float()  # (N, part of V)
        here = (targets >= start) & (targets < part.stop)
        chosen[here] = logits[places[here], targets[here] - start]
        if is_rounded:
            best, where = logits.max(dim=1)
            likeliest = torch.where(best > highest, where + start, likeliest)
        else:  # faster, and no two are equal
            best = logits.amax(dim=1)
        before, highest = highest, torch.maximum(highest, best)
        total *= (before - highest).exp_()
        total += logits.sub_(highest[:, None]).exp_().sum(dim=1)
    is_likeliest = likeliest[places] == targets if is_rounded else chosen == highest[places]
    return chosen - (highest + total.log())[places], is_likeliest


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
