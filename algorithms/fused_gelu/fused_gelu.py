"""GPT-2's activation in one kernel.

Hugging Face writes ``gelu_new``, the activation of GPT-2, as eight elementwise operations::

    0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))

Each reads and writes a whole tensor of four model widths, and the backward pass as many again.
PyTorch has the same function as one operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2FN, NewGELUActivation
from typing_extensions import override

from composer_gpt2.contract import (
    NoEffectError,
    Receipt,
    SpeedupAlgorithm,
    Stage,
    language_model,
)

__all__ = ["FusedGELU", "apply_fused_gelu"]


def apply_fused_gelu(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Receipt:
    """Computes each ``gelu_new`` of the model in one kernel.

    The configuration's ``activation_function`` becomes ``gelu_pytorch_tanh``, which is Hugging
    Face's name of the same: a saved model is built again as it is.

    Example:
        >>> model = GPT2LMHeadModel(GPT2Config())
        >>> print(apply_fused_gelu(model))
        fused_gelu: fused the activation of 12 of 12 MLPs ...

    Args:
        model: A ``GPT2LMHeadModel``, or a ``GPT2Model`` that holds one; changed in place.
        optimizers: Ignored; activations have no parameters.

    Raises:
        NoEffectError: The model is no GPT-2, has another activation, or is fused already.

    Source: Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415, section 2.
    """
    module = language_model(model, "fused_gelu")
    found = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation)
    ]
    if not found:
        activation = module.config.activation_function
        advice = (
            "it is fused already" if activation == _FUSED else "only gelu_new has eight operations"
        )
        raise NoEffectError(
            "fused_gelu looked for the activation gelu_new in the model and found none "
            f"(activation_function is {activation!r}): {advice}; leave fused_gelu out."
        )
    parent, name = found[0]
    device = module.transformer.wte.weight.device
    value_error, gradient_error = _probe(getattr(parent, name), ACT2FN[_FUSED], device)
    if not max(value_error, gradient_error) < _TOLERANCE:
        raise NoEffectError(
            f"fused_gelu must be the same function within {_TOLERANCE:g}, got differences of "
            f"{value_error:.2g} (values) and {gradient_error:.2g} (gradients); it leaves the model "
            "as it was."
        )
    for parent, name in found:
        setattr(parent, name, ACT2FN[_FUSED])
    module.config.activation_function = _FUSED
    return Receipt(
        algorithm="fused_gelu",
        settings={},
        changed=f"fused the activation of {len(found)} of {module.config.n_layer} MLPs",
        count=len(found),
        probe={"largest error": value_error, "of the gradient": gradient_error},
    )


@dataclass(eq=False)
class FusedGELU(SpeedupAlgorithm):
    """GPT-2's activation in one kernel; the function, its parameters and the loss stay the same.

    Changes: the activation modules, and ``activation_function`` in the configuration.

    Example:
        >>> Trainer(model=GPT2Model.from_name("gpt2-125m"), algorithms=[FusedGELU()], ...)

    Source: Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415, section 2.
    """

    name = "fused_gelu"
    stage = Stage.KERNEL

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        return apply_fused_gelu(module, optimizers)


_FUSED = "gelu_pytorch_tanh"
_TOLERANCE = 1e-5  # float32, numbers up to 12


def _probe(plain: nn.Module, fused: nn.Module, device: torch.device) -> tuple[float, float]:
    """The largest difference of values, and of gradients, on normal numbers of deviation 3."""
    generator = torch.Generator().manual_seed(0)
    inputs = 3 * torch.randn(4096, generator=generator).to(device)

    def differentiate(activation: nn.Module) -> tuple[Tensor, Tensor]:
        leaf = inputs.clone().requires_grad_()
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            outputs = activation(leaf)
            (gradient,) = torch.autograd.grad(outputs.sum(), leaf)
        return outputs.detach(), gradient

    errors = [
        float((ours - theirs).abs().max())
        for ours, theirs in zip(differentiate(fused), differentiate(plain), strict=True)
    ]
    return errors[0], errors[1]
