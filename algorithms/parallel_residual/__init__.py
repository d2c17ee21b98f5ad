"""Attention and MLP side by side from one LayerNorm."""

from algorithms.parallel_residual.parallel_residual import (
    ParallelResidual,
    apply_parallel_residual,
)

__all__ = ["ParallelResidual", "apply_parallel_residual"]
