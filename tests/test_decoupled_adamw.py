from __future__ import annotations

import pytest
import torch
from composer.optim import DecoupledAdamW
from torch import nn

from composer_gpt2.decoupled_adamw import FusedDecoupledAdamW


def trained(cls, **arguments):
    """Weights after 20 steps under a schedule, with a group of its own that does not decay."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    groups = [
        {"params": [layer.weight for layer in layers]},
        {"params": [layer.bias for layer in layers], "weight_decay": 0.0},
    ]
    optimizer = cls(groups, lr=3e-3, weight_decay=1e-2, **arguments)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 25)
    x, y = torch.randn(16, 7), torch.randn(16, 3)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(layers(x), y).backward()
        optimizer.step()
        schedule.step()
    return torch.cat([p.detach().flatten() for p in layers.parameters()])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_it_makes_the_updates_of_composers(amsgrad):
    ours = trained(FusedDecoupledAdamW, amsgrad=amsgrad)
    torch.testing.assert_close(ours, trained(DecoupledAdamW, amsgrad=amsgrad), atol=1e-6, rtol=0)
    without = trained(FusedDecoupledAdamW, amsgrad=amsgrad, betas=(0.9, 0.99))
    assert (ours - without).abs().max() > 1e-4  # what equality means


def test_a_rate_of_0_is_refused():
    with pytest.raises(ValueError, match="lr must be above 0"):
        FusedDecoupledAdamW([nn.Parameter(torch.ones(2))], lr=0.0)
