"""The parallel block in an exported model; copied into the model's code, imports torch alone.

Source: Wang and Komatsuzaki, 2021, GPT-J-6B, https://github.com/kingoflolz/mesh-transformer-jax
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["apply_parallel_residual"]


def apply_parallel_residual(network: Any) -> None:
    """Lets attention and MLP of every block read the same LayerNorm, and removes the other."""
    blocks = network.transformer.h
    for i in range(len(blocks)):
        blocks[i] = ParallelBlock(blocks[i])
    # Names of modules that have to stay on one device.
    network._no_split_modules = [*network._no_split_modules, ParallelBlock.__name__]


class ParallelBlock(nn.Module):
    """``x + attn(ln_1(x)) + mlp(ln_1(x))``, from the parts of a sequential block."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.ln_1, self.attn, self.mlp = block.ln_1, block.attn, block.mlp

    def forward(self, hidden: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        """(B, T, E) to the same."""
        normalized = self.ln_1(hidden)
        return hidden + self.attn(normalized, cache, mask) + self.mlp(normalized)
