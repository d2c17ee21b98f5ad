"""One more token of every text, straight from the parameters of a GPT-2.

A step is bound by reading the weights once; what transformers does around each matrix product costs
about as much again, above all in bfloat16. This file knows GPT-2's blocks, sequential or parallel,
with learned positions or linear biases; whoever uses it compares its first result with the
network's own (:mod:`composer_gpt2.generation.network`).

Shapes: ``R`` texts, ``C`` columns of the cache, ``H`` heads, ``D`` model width, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from composer_gpt2.generation.cache import KeyValueCache

__all__ = ["FastStep"]


class FastStep:
    """Logits of the next token, as the network computes them.

    Matrix products and the cache are in ``dtype``, all else in float32, as under autocast. Weights
    in another type than ``dtype`` are copied once.

    Args:
        network: In evaluation mode.
        dtype: float32 or bfloat16.
        n_vocabulary: Tokens that can come next; rows of the head beyond them are left out.
    """

    def __init__(self, network: GPT2LMHeadModel, dtype: torch.dtype, n_vocabulary: int) -> None:
        body, head = network.transformer, network.lm_head
        self._dtype = dtype
        self._embedding, self._positions = body.wte.weight, getattr(body.wpe, "weight", None)
        self._blocks = [_Block.read(block, dtype) for block in body.h]
        self._norm = _normalize(body.ln_f)
        bias = None if head.bias is None else head.bias[:n_vocabulary].to(dtype)
        self._head = head.weight[:n_vocabulary].to(dtype), bias
        slopes = getattr(body.h[0].attn, "alibi_slopes", None)
        self._slopes = None if slopes is None else slopes.float()[:, None]  # (H, 1)

    @staticmethod
    def knows(network: GPT2LMHeadModel) -> bool:
        """Whether the network looks as one of those for which this is written."""
        return not network.config.add_cross_attention and all(map(_is_known, network.transformer.h))

    def __call__(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Stores the tokens' keys and values in the cache, which the caller then advances.

        Args:
            tokens: Shape ``(R,)``.
            cache: With a free column.

        Returns:
            Shape ``(R, V)``.
        """
        x = self._embedding[tokens]
        if self._positions is not None:
            x = x + self._positions[cache.positions(tokens.device)]
        x, mask = x.float(), self._mask(cache, tokens.device)
        for layer, block in enumerate(self._blocks):
            x = block(x, layer, cache, mask)
        return F.linear(self._norm(x).to(self._dtype), *self._head)

    def _mask(self, cache: KeyValueCache, device: torch.device) -> Tensor | None:
        """What is added to the scores: (1 or R, H or 1, 1, C); ALiBi's bias, -inf for no token."""
        empty = cache.empty_columns(device)
        if self._slopes is None and empty is None:
            return None
        mask = torch.zeros(1, 1, 1, cache.n_columns + 1, device=device)
        if self._slopes is not None:
            distances = torch.arange(cache.n_columns, -1, -1, device=device)
            mask = mask - (self._slopes * distances)[:, None, :]
        if empty is not None:
            mask = mask.masked_fill(empty[:, None, None, :], -torch.inf)
        return mask.to(self._dtype)


@dataclass(frozen=True)
class _Block:
    """A block's parameters, ready for products with few rows."""

    n_heads: int
    parallel: bool
    norms: tuple[Callable[[Tensor], Tensor], ...]
    qkv: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    dtype: torch.dtype

    @classmethod
    def read(cls, block: Any, dtype: torch.dtype) -> _Block:
        activation = block.mlp.act
        if type(activation) is NewGELUActivation:  # eight passes; this is the same in one
            activation = nn.GELU(approximate="tanh")
        parallel = not hasattr(block, "ln_2")
        norms = (block.ln_1,) if parallel else (block.ln_1, block.ln_2)
        products = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        qkv, out, up, down = (_product(product, dtype) for product in products)
        return cls(
            n_heads=block.attn.num_heads,
            parallel=parallel,
            norms=tuple(map(_normalize, norms)),
            qkv=qkv,
            out=out,
            up=up,
            activation=activation,
            down=down,
            dtype=dtype,
        )

    def __call__(self, x: Tensor, layer: int, cache: KeyValueCache, mask: Tensor | None) -> Tensor:
        """One token of each text: (R, D) to (R, D)."""
        normed = self.norms[0](x).to(self.dtype)
        states = self.qkv(normed).view(len(x), 3, self.n_heads, 1, -1)  # (R, 3, H, 1, D / H)
        keys, values = cache.update(states[:, 1], states[:, 2], layer)
        attended = F.scaled_dot_product_attention(states[:, 0], keys, values, mask)
        after_attention = x + self.out(attended.reshape(len(x), -1))
        if not self.parallel:
            normed = self.norms[1](after_attention).to(self.dtype)
        return after_attention + self.down(self.activation(self.up(normed)))


def _product(layer: Conv1D, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """``rows @ weight + bias``; a weight that must be copied is laid out for few rows."""
    weight, bias = layer.weight, layer.bias.to(dtype)  # (inputs, outputs)
    if weight.dtype == dtype:
        return lambda rows: torch.addmm(bias, rows, weight)
    transposed = weight.t().to(dtype).contiguous()
    return lambda rows: F.linear(rows, transposed, bias)


def _normalize(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    shape, weight, bias = norm.normalized_shape, norm.weight.float(), norm.bias.float()
    return lambda x: F.layer_norm(x, shape, weight, bias, norm.eps)


def _is_known(block: Any) -> bool:
    attention = getattr(block, "attn", None)
    if not isinstance(attention, GPT2Attention) or not hasattr(block, "mlp"):
        return False
    plain_scores = (
        attention.scale_attn_weights
        and not attention.scale_attn_by_inverse_layer_idx
        and not attention.pruned_heads
    )
    return (
        plain_scores
        and _all(Conv1D, (attention.c_attn, attention.c_proj))
        and _all(Conv1D, (getattr(block.mlp, name, None) for name in ("c_fc", "c_proj")))
        and _all(nn.LayerNorm, (block.ln_1, getattr(block, "ln_2", block.ln_1)))
    )


def _all(kind: type, modules: Iterable[object]) -> bool:
    return all(isinstance(module, kind) for module in modules)
