"""No update from a batch whose loss or gradients are not finite."""

from algorithms.skip_nonfinite.skip_nonfinite import SkipNonfinite, drop_nonfinite_gradients

__all__ = ["SkipNonfinite", "drop_nonfinite_gradients"]
