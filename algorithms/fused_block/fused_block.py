"""A block of GPT-2 as one node of the autograd graph, on CPUs with AVX512-BF16.

Outside of its matrix products a block is bound by memory, and autograd, which knows single
operations, reads and writes far more of it than the mathematics needs: casts, a copy of each input,
the eight passes of GELU, scores of attention. Here the whole block has one forward and one backward
pass. Between the products, which are oneDNN's, stand the kernels of ``composer_gpt2.cpu_kernels``:
addition with LayerNorm, causal attention, GELU, sums for biases, each one pass.

Kept for the backward pass are the input, queries, keys and values, and the outputs of attention, of
its projection and of the first product of the MLP. What is cheap, normalization and GELU, is
computed again.

The residual stream is float32, activations are what autocast says, parameters and their gradients
float32. Shapes: ``B`` batch, ``T`` tokens, ``N = B * T`` rows, ``H`` heads, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from composer_gpt2 import cpu_kernels as kernels
from composer_gpt2.contract import (
    NoEffectError,
    Plan,
    Receipt,
    SpeedupAlgorithm,
    Stage,
    language_model,
)

__all__ = ["FusedBlock", "apply_fused_block"]

# Hugging Face's names of the tanh approximation, which is the one that the kernel has.
_GELUS = ("gelu_new", "gelu_pytorch_tanh")


def apply_fused_block(
    model: nn.Module, optimizers: Iterable[Optimizer] = (), *, recompute_mlp: bool = False
) -> Receipt:
    """Runs every block of GPT-2 as one operation; parameters and their names stay.

    It acts in training and evaluation, in float32 and under bfloat16 autocast, with ALiBi if the
    network has it. Calls with a padding mask, a KV cache, a head mask or attention weights as an
    output run as before. The first use on a machine compiles the kernels, which takes seconds.

    Example:
        >>> model = GPT2Model.from_name("gpt2-125m", dropout=0.0, cpu_precision="amp_bf16")
        >>> print(apply_fused_block(model))
        fused_block: fused 12 of 12 blocks ...

    Args:
        model: A ``GPT2LMHeadModel``, or a ``GPT2Model`` that holds one; changed in place.
        optimizers: Ignored; all parameters stay.
        recompute_mlp: Whether the backward pass computes the first product of the MLP again instead
            of keeping it, which is a third of what a block keeps; products become a ninth more.

    Returns:
        The probe is the relative error of a block's output and of its input's gradient against the
        plain block in float32: the larger one in float32, both under bfloat16 autocast, and for
        comparison the plain block's under autocast.

    Raises:
        NoEffectError: The model is no GPT-2, is on a GPU, has dropout, another activation or
            attention, or blocks that are not GPT-2's; or this machine cannot run the kernels.

    Source: Dao et al., 2022, https://arxiv.org/abs/2205.14135 (attention); the rest is algebra.
    """
    name = FusedBlock.name
    network = language_model(model, name)
    if network.lm_head.weight.device.type != "cpu":
        raise NoEffectError(
            f"{name} has kernels for CPUs, got {network.lm_head.weight.device}; leave it out there."
        )
    blocks: list[Any] = list(network.transformer.h)
    config = network.config.to_dict()
    config["attn_implementation"] = network.config._attn_implementation
    problem = _problem(config) or _problem_of_blocks(blocks)
    if problem:
        raise NoEffectError(problem)
    try:
        kernels.kernel_library()
    except kernels.KernelsUnavailableError as error:
        raise NoEffectError(f"{name} cannot run here: {error}, or leave it out.") from error
    probe = _probe(blocks[0])
    for block in blocks:
        block.__class__ = _FusedBlock  # no new object: its hooks, mode and settings stay
        block.recompute_mlp = recompute_mlp
    changed = f"fused {len(blocks)} of {len(blocks)} blocks"
    if recompute_mlp:
        changed += ", which compute the first product of the MLP twice"
    return Receipt(name, {"recompute_mlp": recompute_mlp}, changed, len(blocks), probe)


@dataclass(eq=False)
class FusedBlock(SpeedupAlgorithm):
    """Blocks of GPT-2 with one forward and one backward pass, on CPUs with AVX512-BF16.

    The function and its parameters stay the same. Changes: the class of the blocks.

    Example:
        >>> model = GPT2Model.from_name("gpt2-125m", dropout=0.0, cpu_precision="amp_bf16")
        >>> Trainer(model=model, algorithms=[FusedBlock()], ...)

    Args:
        recompute_mlp: As in :func:`apply_fused_block`.

    Source: Dao et al., 2022, https://arxiv.org/abs/2205.14135 (attention); the rest is algebra.
    """

    recompute_mlp: bool = False

    name = "fused_block"
    stage = Stage.KERNEL
    conflicts_with = {  # noqa: RUF012
        "FusedGELU": "a fused block has GELU in one kernel",
        "FusedLayerNorm": "a fused block has its LayerNorms in one kernel",
        "LowPrecisionLayerNorm": "a fused block has LayerNorms of its own",
        "ParallelResidual": "it has blocks of another kind",
    }

    @override
    def check_plan(self, plan: Plan) -> None:
        problem = _problem(plan.model)
        if plan.on_cpu is False:
            problem = "fused_block has kernels for CPUs, got a GPU; leave it out there."
        if problem:
            raise ValueError(problem)

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        return apply_fused_block(module, optimizers, recompute_mlp=self.recompute_mlp)


def _problem(config: dict[str, Any] | Any) -> str | None:
    dropout = max(config["attn_pdrop"], config["resid_pdrop"])
    heads, implementation = config["n_head"], config["attn_implementation"]
    n_inner = config["n_inner"] or kernels.LANES
    if dropout > 0:
        return f"fused_block has no dropout, got {dropout}; set the model's dropout to 0."
    if config["activation_function"] not in _GELUS:
        return (
            f"fused_block has the activation {' or '.join(_GELUS)}, got "
            f"{config['activation_function']}; leave it out."
        )
    if config["n_embd"] // heads % kernels.LANES:
        return (
            f"fused_block needs heads whose width is a multiple of {kernels.LANES}, got "
            f"{config['n_embd'] // heads} ({config['n_embd']} / {heads}); leave it out."
        )
    if n_inner % kernels.LANES:
        return (
            f"fused_block needs an MLP whose width is a multiple of {kernels.LANES}, got n_inner "
            f"{n_inner}; leave it out."
        )
    if implementation != "sdpa":  # others get a causal mask as a tensor, even without padding
        return (
            "fused_block needs the model's attn_implementation sdpa, got "
            f"{implementation}; set it or leave fused_block out."
        )
    return None


def _problem_of_blocks(blocks: Sequence[Any]) -> str | None:
    kinds = {type(module) for block in blocks for module in block.modules()} - _KINDS
    if kinds or not blocks or hasattr(blocks[0], "crossattention"):
        return (
            "fused_block looked for blocks of GPT-2 without cross attention, made of its own "
            f"modules, got {', '.join(sorted(kind.__name__ for kind in kinds)) or 'none'}; leave "
            "it out."
        )
    attention, weight = blocks[0].attn, blocks[0].ln_1.weight
    implementation = attention.config._attn_implementation
    known = implementation == "sdpa" or hasattr(attention, "alibi_slopes")
    if not known or attention.reorder_and_upcast_attn:
        return (
            f"fused_block needs attention that is GPT-2's own or ALiBi's, got {implementation} "
            f"(reorder_and_upcast_attn={attention.reorder_and_upcast_attn}); leave it out."
        )
    if weight.dtype is not torch.float32:
        return f"fused_block needs parameters in float32, got {weight.dtype}; leave it out."
    return None


class _FusedBlock(GPT2Block):
    """A ``GPT2Block`` that runs as one operation where nothing but its output is wanted."""

    def forward(
        self,
        hidden_states: Any,  # tensors; transformers' annotations are narrower than its calls
        past_key_value: Any = None,
        cache_position: Any = None,
        attention_mask: Any = None,
        head_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        special = (past_key_value, attention_mask, head_mask, use_cache or None)
        dtype = torch.float32
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        if (
            any(argument is not None for argument in special)
            or output_attentions
            or hidden_states.dtype is not torch.float32
            or self.ln_1.weight.dtype is not torch.float32
            or dtype not in (torch.float32, torch.bfloat16)
        ):
            # The encoder's arguments are always None: a model with cross attention is refused.
            return super().forward(
                hidden_states,
                past_key_value=past_key_value,
                cache_position=cache_position,
                attention_mask=attention_mask,
                head_mask=head_mask,
                use_cache=use_cache,
                output_attentions=output_attentions,
                **kwargs,
            )
        return (_run(self, hidden_states, dtype),)


# All that a block of GPT-2 is made of: the kernels read the parameters and call none of these.
_KINDS = {GPT2Block, _FusedBlock, GPT2Attention, GPT2MLP, Conv1D, nn.LayerNorm, nn.Dropout}
_KINDS |= {type(ACT2FN[name]) for name in _GELUS}


@torch.compiler.disable  # the kernels are no operators that it knows
def _run(block: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    attention = block.attn
    slopes, scale = getattr(attention, "alibi_slopes", None), attention.head_dim**-0.5
    if slopes is not None:  # transformers' SDPA leaves GPT-2's two variations out, ALiBi's does not
        scale = scale if attention.scale_attn_weights else 1.0
        scale /= attention.layer_idx + 1 if attention.scale_attn_by_inverse_layer_idx else 1
    settings = _Settings(
        n_heads=attention.num_heads,
        scale=scale,
        slopes=slopes,
        eps=(block.ln_1.eps, block.ln_2.eps),
        dtype=dtype,
        differentiate=torch.is_grad_enabled(),  # inside of apply() it never is
        recompute_mlp=getattr(block, "recompute_mlp", False),  # in the probe it has none yet
    )
    parameters = [
        parameter
        for module in (block.ln_1, attention.c_attn, attention.c_proj)
        + (block.ln_2, block.mlp.c_fc, block.mlp.c_proj)
        for parameter in (module.weight, module.bias)
    ]
    with torch.autocast("cpu", enabled=False):
        return cast(Tensor, _Block.apply(x.contiguous(), settings, *parameters))


@dataclass(frozen=True)
class _Settings:
    n_heads: int
    scale: float
    slopes: Tensor | None
    eps: tuple[float, float]
    dtype: torch.dtype
    differentiate: bool
    recompute_mlp: bool


class _Block(torch.autograd.Function):
    """The formulas are those of ``GPT2Block``; each line of ``backward`` undoes one of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: _Settings, *parameters: Tensor) -> Tensor:
        weight_1, bias_1, w_qkv, b_qkv, w_out, b_out = parameters[:6]
        weight_2, bias_2, w_up, b_up, w_down, b_down = parameters[6:]
        dtype, shape = settings.dtype, x.shape
        x = x.view(-1, shape[-1])  # (N, D)
        normed, _ = kernels.add_layer_norm(x, None, weight_1, bias_1, settings.eps[0], dtype)
        qkv = _project(normed, w_qkv, b_qkv).view(*shape[:2], 3, settings.n_heads, -1)
        attended, log_sums = _attention(qkv, settings)
        y = _project(attended.view_as(x), w_out, b_out)
        normed, total = kernels.add_layer_norm(
            x, y, weight_2, bias_2, settings.eps[1], dtype, return_sum=True
        )
        before_gelu = _project(normed, w_up, b_up)  # (N, 4 D)
        output = cast(Tensor, total).add_(_project(kernels.gelu(before_gelu), w_down, b_down))
        if settings.differentiate:
            ctx.settings = settings
            kept = None if settings.recompute_mlp else before_gelu
            ctx.save_for_backward(x, qkv, attended, log_sums, y, kept, *parameters)
        return output.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        x, qkv, attended, log_sums, y, before_gelu, *parameters = ctx.saved_tensors
        weight_1, bias_1, w_qkv, _, w_out, _, weight_2, bias_2, w_up, b_up, w_down, _ = parameters
        dtype, shape = settings.dtype, grad.shape
        eps_1, eps_2 = settings.eps
        grad = grad.contiguous().view_as(x)

        def undo(gradient: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
            """The gradient of ``weight``."""
            return torch.mm(rows.t(), gradient).to(weight.dtype)

        normed, _ = kernels.add_layer_norm(x, y, weight_2, bias_2, eps_2, dtype)
        if before_gelu is None:
            before_gelu = _project(normed, w_up, b_up)
        # output = (x + y) + gelu(before_gelu) @ w_down + b_down
        grad_mlp, db_down = kernels.round_and_sum_rows(grad, dtype)
        grad_up = torch.mm(grad_mlp, w_down.to(dtype).t())
        activated, db_up = kernels.gelu_backward_(before_gelu, grad_up)
        dw_down = undo(grad_mlp, activated, w_down)
        del activated, before_gelu, grad_mlp
        # before_gelu = normed @ w_up + b_up
        dw_up = undo(grad_up, normed, w_up)
        grad_normed = torch.mm(grad_up, w_up.to(dtype).t())
        del grad_up
        # normed = layer_norm(x + y), y = attended @ w_out + b_out
        grad, grad_y, dweight_2, dbias_2, db_out = kernels.add_layer_norm_backward(
            x, y, weight_2, eps_2, grad_normed, grad, for_projection=True
        )
        assert grad_y is not None
        dw_out = undo(grad_y, attended.view_as(x), w_out)
        grad_attended = torch.mm(grad_y, w_out.to(dtype).t()).view_as(attended)
        grad_qkv = _attention_backward(qkv, attended, log_sums, grad_attended, settings)
        grad_qkv = grad_qkv.view(len(x), -1)
        # qkv = normed @ w_qkv + b_qkv, normed = layer_norm(x)
        normed, _ = kernels.add_layer_norm(x, None, weight_1, bias_1, eps_1, dtype)
        dw_qkv, db_qkv = undo(grad_qkv, normed, w_qkv), kernels.sum_rows(grad_qkv)
        grad_normed = torch.mm(grad_qkv, w_qkv.to(dtype).t())
        grad, _, dweight_1, dbias_1, _ = kernels.add_layer_norm_backward(
            x, None, weight_1, eps_1, grad_normed, grad
        )
        of_attention = (dweight_1, dbias_1, dw_qkv, db_qkv, dw_out, db_out)
        of_mlp = (dweight_2, dbias_2, dw_up, db_up, dw_down, db_down)
        return (grad.view(shape), None, *of_attention, *of_mlp)


def _project(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias.to(rows.dtype), rows, weight.to(rows.dtype))


_ATEN: Any = torch.ops.aten


def _attention(qkv: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Of qkv (B, T, 3, H, K): its output (B, T, H, K), and what the backward pass needs."""
    if settings.dtype is torch.bfloat16:
        return kernels.attention(qkv, settings.scale, settings.slopes)
    query, key, value = qkv.transpose(1, 3).unbind(2)  # (B, H, T, K)
    output, log_sums = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        query,
        key,
        value,
        0.0,
        settings.slopes is None,
        attn_mask=_mask(qkv, settings),
        scale=settings.scale,
    )
    return output.transpose(1, 2).contiguous(), log_sums


def _attention_backward(
    qkv: Tensor, output: Tensor, log_sums: Tensor, grad_output: Tensor, settings: _Settings
) -> Tensor:
    if settings.dtype is torch.bfloat16:
        arguments = (qkv, output, log_sums, grad_output, settings.scale, settings.slopes)
        return kernels.attention_backward(*arguments)
    query, key, value = qkv.transpose(1, 3).unbind(2)
    gradients = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_output.transpose(1, 2),
        query,
        key,
        value,
        output.transpose(1, 2),
        log_sums,
        0.0,
        settings.slopes is None,
        attn_mask=_mask(qkv, settings),
        scale=settings.scale,
    )
    return torch.stack(gradients, dim=2).transpose(1, 3).contiguous()


def _mask(qkv: Tensor, settings: _Settings) -> Tensor | None:
    """ALiBi's biases for PyTorch's kernel, (1, H, T, T); without them it needs no mask."""
    if settings.slopes is None:
        return None
    numbers = torch.arange(qkv.shape[1])
    distance = numbers[:, None] - numbers
    bias = -settings.slopes[:, None, None] * distance
    return bias.masked_fill(distance < 0, -torch.inf)[None]


# --- Probe ---------------------------------------------------------------------------------------


def _probe(block: Any) -> dict[str, float]:
    """Relative errors of the block's output and of its input's gradient.

    What is right is the plain block in float32. The errors under bfloat16 autocast are judged by
    those of the plain block.
    """
    generator = torch.Generator().manual_seed(17)
    x, g = torch.randn(2, 1, 40, len(block.ln_1.weight), generator=generator)
    exact = _outputs(GPT2Block, block, x, g)
    in_float32 = max(_errors(_FusedBlock, block, x, g, exact))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (_errors(kind, block, x, g, exact) for kind in (_FusedBlock, GPT2Block))
    if not in_float32 <= 1e-4:  # sums in another order; what is wrong is wrong by more
        raise NoEffectError(
            "fused_block must be the plain block within 1e-4 in float32, got an error of "
            f"{in_float32:.2g}; it leaves the model as it was."
        )
    if not all(our <= 2 * their for our, their in zip(ours, theirs, strict=True)):
        raise NoEffectError(
            "fused_block must be as near float32 as the plain block, got errors of "
            f"{ours[0]:.2g} and {ours[1]:.2g} (gradient), plain {theirs[0]:.2g} and "
            f"{theirs[1]:.2g}; it leaves the model as it was."
        )
    probe = {"float32 error": in_float32, "error": ours[0], "gradient error": ours[1]}
    return {**probe, "plain error": theirs[0], "plain gradient error": theirs[1]}


def _errors(
    kind: type[GPT2Block], block: Any, x: Tensor, g: Tensor, exact: tuple[Tensor, Tensor]
) -> list[float]:
    pairs = zip(_outputs(kind, block, x, g), exact, strict=True)
    return [float((ours - true).norm() / true.norm()) for ours, true in pairs]


def _outputs(kind: Any, block: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        output = kind.forward(block, leaf)[0]
        (gradient,) = torch.autograd.grad(output, leaf, g)
    return output.detach() - x, gradient - g  # what the block adds to its residual stream
