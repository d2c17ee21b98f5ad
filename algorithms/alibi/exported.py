"""ALiBi in an exported model; copied into the model's code, imports torch alone.

The bias of head ``h`` is ``-slope[h] * (i - j)`` for query ``i`` and key ``j``. A softmax does not
see what is constant along its keys, so that it is a dot product in two more dimensions:
``slope[h]`` in the query, ``j`` in the key.

Source: Press et al., 2022, "Train Short, Test Long", https://arxiv.org/abs/2108.12409.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["apply_alibi"]


def apply_alibi(network: Any) -> None:
    """Biases every attention layer and takes the learned positions away."""
    network.transformer.wpe = NoPositions()
    for block in network.transformer.h:
        block.attn.attend = types.MethodType(_attend_with_biases, block.attn)


class NoPositions(nn.Module):
    """Adds nothing where positions were added."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """A zero that broadcasts."""
        return torch.zeros((), device=position_ids.device)


def _attend_with_biases(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """(B, H, T, D) from queries of that shape and keys of shape (B, H, K, D)."""
    (n_keys, width), device = key.shape[-2:], key.device
    # GPUs want a width that is a multiple of 8; the rest is zeros.
    extra = 8 - width % 8 if width % 8 <= 6 else 16 - width % 8
    # A key's number is kept as two that bfloat16 has exactly, up to 65,536 tokens.
    numbers = torch.arange(n_keys, device=device)
    digits = torch.stack([numbers // 256, numbers % 256], dim=-1).to(key.dtype)
    # The kernel multiplies by the scale.
    slope = torch.tensor(_slopes(layer.n_heads), device=device) / layer.scale
    slope = slope.to(query.dtype)
    query = _widened(query, torch.stack([256 * slope, slope], dim=-1)[:, None, :], extra)
    key, value = _widened(key, digits, extra), F.pad(value, (0, extra))
    dropout = layer.dropout if layer.training else 0.0
    is_causal = mask is None and query.shape[-2] > 1
    output = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal, scale=layer.scale
    )
    return output[..., :width]


def _slopes(n_heads: int) -> list[float]:
    """One a head: 2^-8/n, 2^-16/n, ...; then every second one of the next larger power of two."""
    n_first = 2 ** (n_heads.bit_length() - 1)
    exponents = [8 * (h + 1) / n_first for h in range(n_first)]
    exponents += [4 * (2 * h + 1) / n_first for h in range(n_heads - n_first)]
    return [2.0**-exponent for exponent in exponents]


def _widened(states: Tensor, ending: Tensor, extra: int) -> Tensor:
    """``states`` with ``extra`` more numbers at the end of each vector, ``ending`` the first."""
    ending = F.pad(ending, (0, extra - ending.shape[-1]))
    return torch.cat([states, ending.expand(*states.shape[:-1], extra)], dim=-1)
