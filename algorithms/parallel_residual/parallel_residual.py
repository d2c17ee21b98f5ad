"""Attention and MLP side by side from one LayerNorm (GPT-J, GPT*).

GPT-2's block is sequential, the MLP reads what attention wrote::

    x = x + attn(ln_1(x))
    x = x + mlp(ln_2(x))

The parallel one lets both read the same normalised input and needs one LayerNorm less::

    x = x + attn(ln_1(x)) + mlp(ln_1(x))

Changes the architecture and the parameters: ``ln_2`` of each block goes, all others keep their
names. Shapes: ``B`` batch, ``T`` tokens, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from typing_extensions import override

from composer_gpt2.contract import (
    NoEffectError,
    Receipt,
    SpeedupAlgorithm,
    Stage,
    language_model,
    record_architecture,
)
from composer_gpt2.optimizer_groups import exchange_parameters

__all__ = ["ParallelResidual", "apply_parallel_residual"]


def apply_parallel_residual(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Receipt:
    """Lets attention and MLP of every block read the same LayerNorm, and removes the other.

    Example:
        >>> model = GPT2LMHeadModel(GPT2Config())
        >>> print(apply_parallel_residual(model))
        parallel_residual: made 12 of 12 blocks parallel, removed 18,432 parameters of ln_2 ...

    Args:
        model: Changed in place. Weights of a sequential model are kept but were trained for another
            function: train from the start.
        optimizers: Those that hold its parameters; they lose those of ``ln_2``.

    Returns:
        The probe is the first block on random numbers: ``error``, its largest difference from the
        formula, and ``change``, from the sequential block (one that had ``ln_1`` twice, if the
        model was parallel before).

    Raises:
        NoEffectError: It has other blocks than GPT-2's, or they do not compute the formula.

    Source: Wang and Komatsuzaki, 2021, GPT-J-6B, https://github.com/kingoflolz/mesh-transformer-jax
    """
    network = language_model(model, ParallelResidual.name)
    blocks = list(network.transformer.h)
    kinds = {type(block) for block in blocks}
    if not kinds or kinds - {GPT2Block, _ParallelBlock} or network.config.add_cross_attention:
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise NoEffectError(
            f"{ParallelResidual.name} needs transformers' GPT2Block without cross attention in "
            f"every layer, got {found} with add_cross_attention="
            f"{network.config.add_cross_attention}; apply it before whatever exchanges blocks."
        )
    record_architecture(network, ParallelResidual.name, {})
    sequential = [block for block in blocks if type(block) is GPT2Block]
    second_norm = blocks[0].ln_2 if blocks[0] in sequential else blocks[0].ln_1
    gone = [parameter for block in sequential for parameter in block.ln_2.parameters()]
    exchange_parameters(optimizers, dict.fromkeys(gone))
    for block in sequential:
        del block.ln_2
        block.__class__ = _ParallelBlock  # no new object: its hooks, mode and settings stay
    error, change = _measure(blocks[0], second_norm)
    if error > _TOLERANCE or change <= _TOLERANCE:
        raise NoEffectError(
            f"{ParallelResidual.name} must make a block equal to x + attn(ln_1(x)) + mlp(ln_1(x)) "
            f"within {_TOLERANCE:g}, and different from the sequential one, got a difference of "
            f"{error:.3g} from the formula and of {change:.3g} from the sequential block."
        )
    return Receipt(
        algorithm=ParallelResidual.name,
        settings={},
        changed=f"made {len(sequential)} of {len(blocks)} blocks parallel, removed "
        f"{sum(parameter.numel() for parameter in gone):,} parameters of ln_2",
        count=len(blocks),
        probe={"error": error, "change": change},
    )


@dataclass(eq=False)
class ParallelResidual(SpeedupAlgorithm):
    """Applies :func:`apply_parallel_residual` when the Trainer is built; has no settings."""

    name = "parallel_residual"
    stage = Stage.BLOCK
    architectural = True
    exported_as = "algorithms.parallel_residual.exported:apply_parallel_residual"

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        return apply_parallel_residual(module, optimizers)


class _ParallelBlock(GPT2Block):
    """A ``GPT2Block`` without ``ln_2``; called as that is, with the same results."""

    def forward(
        self,
        hidden_states: Tensor,
        past_key_value: Any = None,
        cache_position: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        # The encoder's arguments are always None: a model with cross attention is refused.
        normalized = self.ln_1(hidden_states)  # (B, T, D)
        attended, weights = self.attn(
            normalized,
            past_key_value=past_key_value,
            cache_position=cache_position,
            attention_mask=attention_mask,
            head_mask=head_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
            **kwargs,
        )
        hidden_states = hidden_states + attended + self.mlp(normalized)
        return (hidden_states, weights) if output_attentions else (hidden_states,)


_TOLERANCE = 1e-5  # float32 sums of D numbers around 1


@torch.no_grad()
def _measure(block: Any, second_norm: Any) -> tuple[float, float]:
    """The largest difference of a block from the formula, and from the sequential block."""
    weight = block.ln_1.weight
    generator = torch.Generator().manual_seed(17)
    x = torch.randn(2, 8, len(weight), generator=generator).to(weight)
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        # On GPUs some attention kernels run in half precision alone.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            attended = block.attn(block.ln_1(x))[0]
            formula = x + attended + block.mlp(block.ln_1(x))
            sequential = x + attended
            sequential = sequential + block.mlp(second_norm(sequential))
            result = block(x)[0]
    finally:
        for module, mode in modes.items():
            module.training = mode
    return float((result - formula).abs().max()), float((result - sequential).abs().max())
