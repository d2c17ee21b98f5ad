"""Residual addition and LayerNorm in one pass."""

from algorithms.fused_layernorm.fused_layernorm import FusedLayerNorm, apply_fused_layernorm

__all__ = ["FusedLayerNorm", "apply_fused_layernorm"]
