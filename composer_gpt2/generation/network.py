"""A network that is asked for one token after another, with a cache of what it has read.

Prompts go through the network itself, whatever algorithms have made of it. Single tokens go through
:class:`~composer_gpt2.generation.fast_step.FastStep` if it knows the network's blocks and its first
result is the network's; else through the network, too.

Shapes: ``B`` prompts, ``R`` texts, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from composer_gpt2.generation.cache import KeyValueCache
from composer_gpt2.generation.fast_step import FastStep

__all__ = ["Batch", "Network", "Precision", "check_precision"]

Precision = Literal["fp32", "amp_bf16"]

_log = logging.getLogger(__name__)


def check_precision(precision: str) -> Precision:
    """The same, if it is one.

    Raises:
        ValueError: It is none.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be fp32 or amp_bf16, got {precision!r}.")
    return cast(Precision, precision)


class Network:
    """A GPT-2 to be asked for next tokens; it must be in evaluation mode while it is used.

    Args:
        module: Its weights are read when this is built: build another after training on.
        precision: ``"amp_bf16"`` runs matrix products in bfloat16, as autocast does.
        n_vocabulary: Tokens that can come next; rows of the head beyond them are padding.
    """

    def __init__(self, module: GPT2LMHeadModel, precision: Precision, n_vocabulary: int) -> None:
        self.module, self.n_vocabulary = module, n_vocabulary
        self.device = module.lm_head.weight.device
        self._dtype = torch.bfloat16 if precision == "amp_bf16" else torch.float32
        self.fast_step: FastStep | None = None
        if FastStep.knows(module):
            with torch.inference_mode():
                self.fast_step = FastStep(module, self._dtype, n_vocabulary)

    def read(self, ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits after prompts of one length, shape ``(B, T)`` to ``(B, V)``, by the module."""
        return self._call(ids, cache)

    def step(self, tokens: Tensor, cache: KeyValueCache, *, check: bool) -> Tensor:
        """Logits after one more token of each text, shape ``(R,)`` to ``(R, V)``.

        Args:
            tokens: Shape ``(R,)``.
            cache: It advances by one.
            check: Whether a fast step is compared with the module's, and dropped if it differs.
        """
        logits = None if self.fast_step is None else self.fast_step(tokens, cache)
        if logits is None or check:
            positions, empty = cache.positions(self.device), cache.empty_columns(self.device)
            mask = None
            if empty is not None:
                mask = torch.zeros(empty.shape, device=self.device, dtype=self._mask_dtype())
                mask = mask.masked_fill(empty, -torch.inf)[:, None, None, :]
            by_module = self._call(tokens[:, None], cache, positions[:, None], mask)
            if logits is not None and not _equal(logits, by_module, self._dtype):
                _log.info("this network's blocks are not GPT-2's: single tokens go through it")
                self.fast_step = logits = None
            logits = by_module if logits is None else logits
        cache.advance()
        return logits

    def _call(
        self,
        ids: Tensor,
        cache: KeyValueCache,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        autocast = contextlib.nullcontext()
        if self._dtype is torch.bfloat16:
            autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast:
            outputs = self.module(
                input_ids=ids,
                past_key_values=cache,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                logits_to_keep=1,
            )
        return outputs.logits[:, -1, : self.n_vocabulary]

    def _mask_dtype(self) -> torch.dtype:
        return self._dtype if self.module.dtype is torch.float32 else self.module.dtype


class Batch:
    """Texts that are written together, and the logits of what comes next in each.

    All of it is done in inference mode.

    Args:
        network: As it says.
        prompts: The tokens of each text so far; equal ones are read once. At least one token each.
        max_new_tokens: At least 1.
    """

    @torch.inference_mode()
    def __init__(
        self, network: Network, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> None:
        self._network = network
        lengths = [len(prompt) for prompt in prompts]
        self._cache = KeyValueCache(lengths, max(lengths) + max_new_tokens)
        self._is_first_step = True
        self.logits = self._read(prompts)
        """Shape ``(R, V)``, in the order of the prompts until a text ends."""

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> None:
        """The next token of each text."""
        ids = torch.tensor(tokens, device=self._network.device)
        self.logits = self._network.step(ids, self._cache, check=self._is_first_step)
        self._is_first_step = False

    @torch.inference_mode()
    def end(self, row: int) -> None:
        """Ends a text; the last one takes its place. Call it before :meth:`step`."""
        self._cache.give_away(row)

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        rows_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            rows_of[tuple(prompt)].append(row)
        of_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for prompt in rows_of:
            of_length[len(prompt)].append(prompt)
        logits = torch.empty(0)
        for distinct in of_length.values():
            rows = [row for prompt in distinct for row in rows_of[prompt]]
            sources = [i for i, prompt in enumerate(distinct) for _ in rows_of[prompt]]
            with self._cache.filling(rows, sources):
                ids = torch.tensor(distinct, device=self._network.device)
                after = self._network.read(ids, self._cache)
            if not len(logits):
                logits = after.new_empty(len(prompts), after.shape[-1])
            logits[rows] = after[sources]
        return logits


def _equal(fast: Tensor, slow: Tensor, dtype: torch.dtype) -> bool:
    """Whether two sets of logits are the same but for rounding."""
    # Of the range of the logits; random gpt2-125m has 7e-7 and 4e-3 on a CPU. GPUs may have TF32.
    exact = 1e-4 if slow.device.type == "cpu" else 2e-3
    tolerance = exact if dtype is torch.float32 else 5e-2
    spread = slow.float().amax() - slow.float().amin()
    return bool((fast.float() - slow.float()).abs().max() <= tolerance * spread)
