"""No update from a batch whose loss or gradient norm stands out from those before it."""

from algorithms.skip_loss_spikes.skip_loss_spikes import SkipLossSpikes, newest_z_score

__all__ = ["SkipLossSpikes", "newest_z_score"]
