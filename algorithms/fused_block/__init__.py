"""A block of GPT-2 as one node of the autograd graph, on CPUs with AVX512-BF16."""

from algorithms.fused_block.fused_block import FusedBlock, apply_fused_block

__all__ = ["FusedBlock", "apply_fused_block"]
