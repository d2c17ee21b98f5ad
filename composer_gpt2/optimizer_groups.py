"""Keep an optimizer's groups right while parameters are exchanged or removed.

Composer's own ``module_surgery.update_params_in_optimizer`` raises on optimizers with several
groups, which is what everybody has who does not decay biases and norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

__all__ = ["exchange_parameters", "parameters_held"]


def exchange_parameters(
    optimizers: Iterable[Optimizer], exchanged: Mapping[nn.Parameter, nn.Parameter | None]
) -> None:
    """Puts new parameters into the groups and places of the old ones; ``None`` removes.

    What the optimizer remembers of an old parameter is forgotten. A parameter that no group holds
    stays outside. A group that becomes empty stays, so that schedulers find their groups.

    Args:
        optimizers: Changed in place.
        exchanged: Old parameter to new one.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [exchanged.get(parameter, parameter) for parameter in group["params"]]
            group["params"] = [parameter for parameter in kept if parameter is not None]
        for old in exchanged:
            optimizer.state.pop(old, None)


def parameters_held(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """All parameters of all groups.

    Raises:
        RuntimeError: One is there twice; it would take two steps at once.
    """
    held: set[nn.Parameter] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in held:
                    raise RuntimeError(
                        "each parameter must be in one group of one optimizer, got one of shape "
                        f"{tuple(parameter.shape)} in two."
                    )
                held.add(parameter)
    return held
