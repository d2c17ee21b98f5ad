"""How fast this machine multiplies matrices of the shapes of a training step.

A step's products are those of each layer and of the vocabulary projection: forward ``x @ W``, the
gradient of the input ``g @ W.T``, and that of the weight ``x.T @ g``, in the memory layouts in
which a plain GPT-2 has them. Attention's own products are small and not among them.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GPT2Config

__all__ = ["Ceiling", "Product", "products", "rate"]

HEAD_ROWS = 512
"""Rows of the vocabulary projection at a time; all of its logits would not fit a cache."""
HEAD_TOKENS = 4096
"""Tokens of the vocabulary in a product of its weight's gradient: the whole is slower."""
REPEATS = 3


@dataclass(frozen=True)
class Product:
    """A matrix product ``(m, k) @ (k, n)``."""

    name: str
    m: int
    k: int
    n: int
    count: float
    """How often a training step has it."""
    first_is_transposed: bool = False
    """Whether the first matrix lies in memory as ``(k, m)``."""
    second_is_transposed: bool = False

    @property
    def flops(self) -> int:
        """Of one such product: a multiplication and an addition each."""
        return 2 * self.m * self.k * self.n


def products(config: GPT2Config, n_tokens: int) -> list[Product]:
    """All products of a training step.

    Args:
        config: Of the network.
        n_tokens: Sequences times their length.
    """
    d_model, d_mlp = config.n_embd, config.n_inner or 4 * config.n_embd
    layers = {
        "attn.c_attn": (d_model, 3 * d_model),
        "attn.c_proj": (d_model, d_model),
        "mlp.c_fc": (d_model, d_mlp),
        "mlp.c_proj": (d_mlp, d_model),
    }
    found = []
    for name, (n_in, n_out) in layers.items():  # Conv1D: weight (in, out)
        shape = (n_tokens, config.n_layer)
        found += _three(name, n_in, n_out, *shape, weight_is_transposed=False)
    rows = min(HEAD_ROWS, n_tokens)
    head = ("lm_head", d_model, config.vocab_size, rows, n_tokens / rows)
    *others, of_weight = _three(*head, weight_is_transposed=True)  # Linear: weight (out, in)
    part = min(HEAD_TOKENS, of_weight.m)
    of_weight = dataclasses.replace(
        of_weight, m=part, count=of_weight.count * config.vocab_size / part
    )
    return [*found, *others, of_weight]


def _three(
    name: str, n_in: int, n_out: int, rows: int, count: float, *, weight_is_transposed: bool
) -> list[Product]:
    forward = Product(
        f"{name} forward", rows, n_in, n_out, count, second_is_transposed=weight_is_transposed
    )
    of_input = Product(
        f"{name} input gradient",
        rows,
        n_out,
        n_in,
        count,
        second_is_transposed=not weight_is_transposed,
    )
    # The gradient of a weight has the weight's layout.
    shape = (n_out, rows, n_in) if weight_is_transposed else (n_in, rows, n_out)
    of_weight = Product(f"{name} weight gradient", *shape, count, first_is_transposed=True)
    return [forward, of_input, of_weight]


class Ceiling:
    """The matrices of all products, kept, so that a measurement is nothing but products."""

    def __init__(self, config: GPT2Config, n_tokens: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(17)

        def matrix(rows: int, columns: int, is_transposed: bool) -> Tensor:
            shape = (columns, rows) if is_transposed else (rows, columns)
            values = torch.randn(shape, generator=generator).to(dtype)
            return values.t() if is_transposed else values

        self._products = [
            (
                p,
                matrix(p.m, p.k, p.first_is_transposed),
                matrix(p.k, p.n, p.second_is_transposed),
                torch.empty(p.m, p.n, dtype=dtype),
            )
            for p in products(config, n_tokens)
        ]

    def measure(self) -> dict[str, float]:
        """Seconds of each product, by name; the mean of a few after one that is discarded."""
        seconds = {}
        for product, first, second, out in self._products:
            torch.mm(first, second, out=out)
            start = time.perf_counter()
            for _ in range(REPEATS):
                torch.mm(first, second, out=out)
            seconds[product.name] = (time.perf_counter() - start) / REPEATS
        return seconds


def rate(of_a_step: list[Product], seconds: dict[str, float]) -> float:
    """FLOP/s of all products of a step together, each as often as the step has it."""
    flops = sum(p.flops * p.count for p in of_a_step)
    return flops / sum(seconds[p.name] * p.count for p in of_a_step)
