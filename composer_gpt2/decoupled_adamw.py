"""AdamW whose weight decay does not depend on the learning rate, in torch's fused kernel."""

from __future__ import annotations

from typing import Any

from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

__all__ = ["FusedDecoupledAdamW"]


class FusedDecoupledAdamW(AdamW):
    """The updates of Composer's ``DecoupledAdamW``, which visits parameter after parameter.

    A step multiplies weights by ``1 - weight_decay * lr / initial_lr``: the decay follows the
    schedule of the learning rate, not its size. torch multiplies by ``1 - weight_decay * lr``, so
    the groups hold ``weight_decay / initial_lr``.

    Args:
        params: Parameters or groups of them.
        lr: The rate at the peak of the schedule, above 0.
        betas: Decay of the averages of gradients and of their squares.
        eps: Added to the denominator.
        weight_decay: Share of a weight that a step at the peak takes away.
        amsgrad: Whether the largest average of squares so far is used.

    Raises:
        ValueError: A rate of 0.

    Source: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-5,
        amsgrad: bool = False,
    ) -> None:
        options: dict[str, Any] = {"betas": betas, "eps": eps, "amsgrad": amsgrad, "fused": True}
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)
        for group in self.param_groups:
            if group["lr"] == 0:
                raise ValueError(
                    "lr must be above 0, for the decay is relative to it, got 0; freeze parameters "
                    "with requires_grad instead."
                )
            group["weight_decay"] /= group["lr"]
