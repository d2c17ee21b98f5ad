"""Residual addition and LayerNorm in one pass over memory, where that is faster.

Between attention and MLP, under bfloat16 autocast, a block of GPT-2 computes ::

    x = x + attended                 # reads float32 and bfloat16, writes float32
    normalized = layer_norm(x)       # reads and writes float32
    normalized = bfloat16(normalized)    # in the first product of the MLP

On a CPU, ``torch.compile`` turns the three into one loop, and the backward pass with the sum of the
two gradients of ``x`` into another. In float32 nothing is gained, and little with a LayerNorm
alone, as in a block that is parallel: ``benchmarks/fused_layernorm.py`` has both. There we refuse.

On an NVIDIA GPU, every LayerNorm of the network runs in Liger's kernel.

Shapes: ``N`` tokens of a batch, ``B`` batch, ``T`` tokens of a sequence, ``D`` model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from composer import State
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from typing_extensions import override

from composer_gpt2.contract import (
    NoEffectError,
    Plan,
    Receipt,
    SpeedupAlgorithm,
    Stage,
    language_model,
)

__all__ = ["FusedLayerNorm", "apply_fused_layernorm"]


def apply_fused_layernorm(
    model: nn.Module, optimizers: Iterable[Optimizer] = (), *, cpu_precision: str | None = None
) -> Receipt:
    """Runs LayerNorms in fewer passes over memory; parameters and their names stay.

    On a CPU it acts where gradients are recorded under bfloat16 autocast, which is training;
    everything else runs as before. Applying it compiles, which takes seconds.

    Example:
        >>> model = GPT2Model.from_name("gpt2-125m", cpu_precision="amp_bf16")
        >>> print(apply_fused_layernorm(model))
        fused_layernorm: joined 12 of 25 LayerNorms with the addition before them ...

    Args:
        model: A ``GPT2LMHeadModel``, or a ``GPT2Model`` that holds one; changed in place.
        optimizers: Ignored; all parameters stay.
        cpu_precision: ``"amp_bf16"`` if the model runs under bfloat16 autocast on a CPU. Default:
            what a ``GPT2Model`` says of itself; of a bare network, ``"fp32"``.

    Returns:
        The probe is, on random numbers under autocast, the relative error against float64 of the
        norm's values and of its input's gradient, and for comparison those of the plain way.

    Raises:
        NoEffectError: The model is no GPT-2; no LayerNorm follows an addition in a block; the CPU
            runs in float32; or a compiler, or Liger on a GPU, is missing.

    Source: Ba et al., 2016, https://arxiv.org/abs/1607.06450.
    """
    name = FusedLayerNorm.name
    network = language_model(model, name)
    if cpu_precision is None:
        cpu_precision = getattr(getattr(model, "module", model), "cpu_precision", "fp32")
    device = network.transformer.ln_f.weight.device
    n_norms = sum(isinstance(module, nn.LayerNorm) for module in network.modules())
    if device.type == "cuda":
        count, probe = _use_liger(network)
        changed = f"run {count} of {n_norms} LayerNorms in Liger's kernel"
    elif device.type == "cpu":
        if cpu_precision != "amp_bf16":
            raise NoEffectError(_NOTHING_IN_FLOAT32.format(cpu_precision))
        count, probe = _join_with_addition(network)
        changed = f"joined {count} of {n_norms} LayerNorms with the addition before them"
    else:
        raise NoEffectError(f"{name} has kernels for NVIDIA GPUs and CPUs, got device {device}.")
    return Receipt(name, {}, changed, count, probe)


@dataclass(eq=False)
class FusedLayerNorm(SpeedupAlgorithm):
    """LayerNorm in one kernel, on a CPU with the residual addition before it.

    The function and its parameters stay the same; under autocast on a CPU the norm's output is
    rounded to bfloat16 at once, as the product that reads it did. Changes: the class of LayerNorms
    (GPU) or blocks (CPU).

    Example:
        >>> model = GPT2Model.from_name("gpt2-125m", cpu_precision="amp_bf16")
        >>> Trainer(model=model, algorithms=[FusedLayerNorm()], ...)

    Source: Ba et al., 2016, https://arxiv.org/abs/1607.06450.
    """

    name = "fused_layernorm"
    stage = Stage.KERNEL
    conflicts_with = {"LowPrecisionLayerNorm": "both exchange the LayerNorms"}  # noqa: RUF012

    _cpu_precision = "fp32"  # no field: the run decides

    @override
    def check_plan(self, plan: Plan) -> None:
        if plan.on_cpu and plan.precision != "amp_bf16":
            raise ValueError(_NOTHING_IN_FLOAT32.format(plan.precision))
        if plan.on_cpu and "parallel_residual" in plan.algorithms:
            raise ValueError(
                "fused_layernorm needs, on a CPU, blocks in which a LayerNorm follows an addition, "
                "got parallel_residual, which has none; leave one of the two out."
            )

    @override
    def prepare(self, state: State) -> None:
        model = getattr(state.model, "module", state.model)
        self._cpu_precision = getattr(model, "cpu_precision", "fp32")

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        return apply_fused_layernorm(module, optimizers, cpu_precision=self._cpu_precision)


_NOTHING_IN_FLOAT32 = (
    "fused_layernorm needs precision amp_bf16 on a CPU (of a GPT2Model, cpu_precision='amp_bf16'), "
    "got {}: there it is slower than torch.nn.LayerNorm; change the precision or leave it out."
)


class _FusedBlock(GPT2Block):
    """A ``GPT2Block`` that, where it trains under autocast, adds and normalises in one pass."""

    def forward(
        self,
        hidden_states: Any,  # Tensor; transformers annotates a tuple
        past_key_value: Any = None,
        cache_position: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        # The encoder's arguments are always None: a model with cross attention is refused.
        arguments = dict(
            kwargs,
            past_key_value=past_key_value,
            cache_position=cache_position,
            attention_mask=attention_mask,
            head_mask=head_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        if not (
            hidden_states.is_cpu
            and hidden_states.dtype is torch.float32
            and torch.is_grad_enabled()
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") is torch.bfloat16
        ):
            return super().forward(hidden_states, **arguments)
        attended, weights = self.attn(self.ln_1(hidden_states), **arguments)
        D = hidden_states.shape[-1]
        stream, normalized = _compiled()(
            hidden_states.reshape(-1, D),
            attended.reshape(-1, D),
            self.ln_2.weight,
            self.ln_2.bias,
            self.ln_2.eps,
        )
        stream = stream.view_as(hidden_states)  # (B, T, D)
        stream = stream + self.mlp(normalized.view_as(hidden_states))
        return (stream, weights) if output_attentions else (stream,)


class _LigerLayerNorm(nn.LayerNorm):
    """A ``LayerNorm`` in Liger's Triton kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return _liger()(input, self.weight, self.bias, self.eps)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    # dynamic: one kernel for every length and batch size. Without dynamic_threads, code that was
    # cached by a run with more threads would go on starting as many.
    options: Any = {"cpp.dynamic_threads": True}
    return torch.compile(_add_and_normalize, dynamic=True, options=options)


def _add_and_normalize(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum of two tensors of shape ``(N, D)``, and its LayerNorm in bfloat16."""
    x = x + y
    return x, F.layer_norm(x, weight.shape, weight, bias, eps).to(torch.bfloat16)


def _join_with_addition(network: GPT2LMHeadModel) -> tuple[int, dict[str, float]]:
    blocks = [block for block in network.transformer.h if type(block) in (GPT2Block, _FusedBlock)]
    if not blocks or network.config.add_cross_attention:
        kinds = {type(block).__name__ for block in network.transformer.h}
        raise NoEffectError(
            "fused_layernorm needs, on a CPU, blocks in which a LayerNorm follows an addition "
            "(GPT2Block without cross attention; parallel residual has none), got "
            f"{', '.join(sorted(kinds)) or 'none'} with "
            f"add_cross_attention={network.config.add_cross_attention}; leave it out."
        )
    norm: Any = blocks[0].ln_2
    errors = _errors(_add_and_normalize, norm.weight, norm.eps)
    try:
        ours = _errors(_compiled(), norm.weight, norm.eps)
    except RuntimeError as error:  # torch's errors of compilation are its children
        raise NoEffectError(
            "fused_layernorm needs torch.compile, and that a C++ compiler, on a CPU, got "
            f"{type(error).__name__}: {str(error).splitlines()[0]} Install g++ or leave it out."
        ) from error
    # Sums in another order; what is wrong is wrong by much more.
    if not all(our <= 2 * plain for our, plain in zip(ours, errors, strict=True)):
        raise NoEffectError(
            "fused_layernorm must be as near float64 as the plain way, got errors of "
            f"{ours[0]:.2g} and {ours[1]:.2g} (gradient), plain {errors[0]:.2g} and "
            f"{errors[1]:.2g}; it leaves the model as it was."
        )
    for block in blocks:
        block.__class__ = _FusedBlock  # no new object: its hooks, mode and settings stay
    count = sum(map(_emits_bfloat16, blocks))
    if count < len(blocks):
        raise NoEffectError(
            f"fused_layernorm must reach the MLPs of {len(blocks)} blocks, got {count}."
        )
    probe = {"error": ours[0], "gradient error": ours[1]}
    return count, {**probe, "plain error": errors[0], "plain gradient error": errors[1]}


def _emits_bfloat16(block: Any) -> bool:
    """Whether the block's MLP gets the rounded norm while it trains under autocast."""
    seen = []
    hook = block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    try:
        with (
            torch.random.fork_rng(devices=[]),  # dropout
            torch.enable_grad(),
            torch.autocast("cpu", torch.bfloat16),
        ):
            block(torch.ones(1, 4, len(block.ln_2.weight)))
    finally:
        hook.remove()
    return seen == [torch.bfloat16]


def _errors(function: Callable, like: Tensor, eps: float) -> tuple[float, float]:
    """Relative errors against float64: of the normalised values, and of the input's gradient."""
    D = len(like)
    generator = torch.Generator().manual_seed(17)
    x, y, g = torch.randn(3, 64, D, generator=generator).unbind()
    weight, bias = 1 + 0.1 * torch.randn(2, D, generator=generator)
    y, g = y.bfloat16(), g.bfloat16()

    def run(function: Callable, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        parameters = [nn.Parameter(p.to(dtype)) for p in (weight, bias)]
        _, normalized = function(leaf, y.clone().requires_grad_(), *parameters, eps)
        (gradient,) = torch.autograd.grad(normalized, leaf, g.to(normalized.dtype))
        return normalized.detach().double(), gradient.double()

    def exact(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        return None, F.layer_norm(x + y, (D,), weight, bias, eps)

    with torch.enable_grad():
        with torch.autocast("cpu", torch.bfloat16):
            results = run(function, torch.float32)
        references = run(exact, torch.float64)
    value, gradient = (
        float((result - reference).norm() / reference.norm())
        for result, reference in zip(results, references, strict=True)
    )
    return value, gradient


@functools.cache
def _liger() -> Callable[..., Tensor]:
    try:
        from liger_kernel.transformers.functional import (  # type: ignore[reportMissingImports]
            liger_layer_norm,
        )
    except ImportError as error:
        raise NoEffectError(
            "fused_layernorm needs Liger's kernels on a GPU, got none; run "
            '`pip install "composer-gpt2[gpu]"`, or leave it out.'
        ) from error
    return liger_layer_norm


def _use_liger(network: GPT2LMHeadModel) -> tuple[int, dict[str, float]]:
    kernel = _liger()
    kinds = (nn.LayerNorm, _LigerLayerNorm)
    norms: list[Any] = [module for module in network.modules() if type(module) in kinds]
    if not norms:
        raise NoEffectError("fused_layernorm looked for torch.nn.LayerNorm and found none.")
    weight, bias, eps = norms[0].weight, norms[0].bias, norms[0].eps
    x = torch.randn(64, len(weight), generator=torch.Generator().manual_seed(17)).to(weight)
    with torch.no_grad():
        error = kernel(x, weight, bias, eps) - F.layer_norm(x, weight.shape, weight, bias, eps)
    largest = float(error.abs().max())
    if not largest < 100 * torch.finfo(weight.dtype).eps:
        raise NoEffectError(
            f"fused_layernorm must equal torch's LayerNorm, got a difference of {largest:.2g} from "
            "Liger's; it leaves the model as it was."
        )
    for norm in norms:
        norm.__class__ = _LigerLayerNorm
    return len(norms), {"error": largest}
