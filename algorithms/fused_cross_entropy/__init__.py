"""The loss of the vocabulary projection without its logits."""

from algorithms.fused_cross_entropy.fused_cross_entropy import (
    FusedCrossEntropy,
    apply_fused_cross_entropy,
    linear_cross_entropy,
)

__all__ = ["FusedCrossEntropy", "apply_fused_cross_entropy", "linear_cross_entropy"]
