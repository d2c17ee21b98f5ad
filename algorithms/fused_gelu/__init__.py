"""GPT-2's activation in one kernel."""

from algorithms.fused_gelu.fused_gelu import FusedGELU, apply_fused_gelu

__all__ = ["FusedGELU", "apply_fused_gelu"]
