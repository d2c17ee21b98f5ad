"""ALiBi: attention scores fall linearly with distance, and learned positions go.

The bias of head ``h`` between query ``i`` and key ``j`` is ``-slope[h] * (i - j)``. A softmax does
not see what is constant along its keys, so ``slope[h] * j`` gives the same attention, and that is a
dot product: two more dimensions, ``slope[h]`` in the query and ``j`` in the key. Nothing of size
T x T is ever stored, and the kernel stays the causal one, which skips half of the work.

Shapes: ``B`` batch, ``T`` tokens, ``Q`` and ``K`` queries and keys, ``H`` heads, ``D`` width of a
head.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from composer import State
from composer.core import Batch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AttentionInterface, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from typing_extensions import override

from composer_gpt2.batches import split_sequences
from composer_gpt2.contract import (
    NoEffectError,
    Plan,
    Receipt,
    SpeedupAlgorithm,
    Stage,
    language_model,
    record_architecture,
)
from composer_gpt2.optimizer_groups import exchange_parameters

__all__ = ["ALiBi", "alibi_bias", "apply_alibi", "linear_bias_slopes"]

Kernel = Literal["sdpa", "eager", "flex"]


def linear_bias_slopes(n_heads: int) -> Tensor:
    """One slope per head; attention scores lose ``slope * distance`` (in score units per token).

    Slopes fall geometrically from ``2**(-8/n_heads)`` to ``2**-8``. For a head count that is not a
    power of two they are those of the next smaller power, followed by every second one of the next
    larger power, as in the authors' code; the paper only trains powers of two.

    Args:
        n_heads: At least 1.

    Returns:
        Shape ``(n_heads,)``, float32.

    Raises:
        ValueError: ``n_heads`` is below 1.

    Source: Press et al., 2022, https://arxiv.org/abs/2108.12409, section 3.
    """
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}.")
    n_first = 2 ** (n_heads.bit_length() - 1)  # the largest power of two that is not above it
    exponents = [8 * (h + 1) / n_first for h in range(n_first)]
    exponents += [4 * (2 * h + 1) / n_first for h in range(n_heads - n_first)]
    return torch.tensor([2.0**-exponent for exponent in exponents])


def alibi_bias(n_heads: int, n_queries: int, n_keys: int) -> Tensor:
    """The formula as the paper has it: what is added to the scores of the last queries.

    Returns:
        Shape ``(H, Q, K)``, float32: 0 where query and key are the same token, falling with
        distance; what lies behind the causal mask is positive and must be masked.

    Source: Press et al., 2022, section 3.
    """
    keys = torch.arange(n_keys)
    queries = torch.arange(n_keys - n_queries, n_keys)
    distance = queries[:, None] - keys[None, :]
    return -linear_bias_slopes(n_heads)[:, None, None] * distance


def apply_alibi(
    model: nn.Module, *, kernel: Kernel | None = None, optimizers: Sequence[Optimizer] = ()
) -> Receipt:
    """Biases every attention layer and removes the learned positions with their parameters.

    The model then reads sequences of any length; ``n_positions`` bounds nothing any more.

    Example:
        >>> model = GPT2LMHeadModel(GPT2Config())
        >>> print(apply_alibi(model))
        alibi: biased 12 of 12 attention layers, removed 786,432 position parameters ...

    Args:
        model: A ``GPT2LMHeadModel``, or a ``GPT2Model`` that holds one; changed in place.
        kernel: ``"sdpa"``, ``"eager"`` (needed for attention weights as an output), or ``"flex"``
            (FlexAttention, for training on GPUs without attention dropout; batches with padding and
            cached generation take SDPA). Default: what the model has.
        optimizers: They forget the parameters of the positions.

    Raises:
        NoEffectError: The model is no GPT-2, or has no attention layers that can be biased.
        ValueError: The kernel is none of these, or FlexAttention cannot train the model.

    Source: Press et al., 2022, "Train Short, Test Long", https://arxiv.org/abs/2108.12409.
    """
    module = language_model(model, "alibi")
    layers = [layer for layer in module.modules() if isinstance(layer, GPT2Attention)]
    if not layers:
        raise NoEffectError("alibi looked for GPT2Attention layers in the model and found none.")
    function = _attention_function(kernel or module.config._attn_implementation, module)

    positions = module.transformer.wpe
    if record_architecture(module, "alibi", {}):
        exchange_parameters(optimizers, dict.fromkeys(positions.parameters()))
        module.transformer.register_module("wpe", NoPositions())
    for layer in layers:
        if not hasattr(layer, "alibi_slopes"):
            slopes = linear_bias_slopes(layer.num_heads).to(layer.c_attn.weight.device)
            layer.register_buffer("alibi_slopes", slopes, persistent=False)
        # The network keeps its own configuration, by which it leaves out masks that say nothing.
        layer.config = copy.copy(module.config)
        layer.config._attn_implementation = function

    error, change = _probe(layers)
    removed = sum(parameter.numel() for parameter in positions.parameters())
    return Receipt(
        algorithm="alibi",
        settings={"kernel": kernel},
        changed=f"biased {len(layers)} of {len(layers)} attention layers, removed {removed:,} "
        "position parameters",
        count=len(layers),
        probe={"largest error against the formula": error, "change by exchanging tokens": change},
    )


@dataclass(eq=False)
class ALiBi(SpeedupAlgorithm):
    """Attention with linear biases (ALiBi) instead of learned position embeddings.

    Changes: the position embedding is removed from the network and from the optimizer; attention is
    biased; with ``train_sequence_length_scaling`` below 1, training batches of shape ``(B, T)``
    become ``(B / scaling, T * scaling)`` and micro-batches hold as many tokens as before.
    Evaluation keeps the full length.

    Example:
        >>> Trainer(model=GPT2Model.from_name("gpt2-125m"), algorithms=[ALiBi()], ...)

    Args:
        train_sequence_length_scaling: The part of each sequence that is trained at once: 1 or one
            over a whole number that divides the sequence length, such as 0.25.
        kernel: As in :func:`apply_alibi`.

    Raises:
        ValueError: A setting is none of these.

    Source: Press et al., 2022, https://arxiv.org/abs/2108.12409.
    """

    train_sequence_length_scaling: float = 1.0
    kernel: Kernel | None = None

    name = "alibi"
    stage = Stage.ATTENTION
    architectural = True
    exported_as = "algorithms.alibi.exported:apply_alibi"
    free_on_resume = frozenset({"kernel"})
    reads_any_length = True

    def __post_init__(self) -> None:
        scaling = self.train_sequence_length_scaling
        if not 0 < scaling <= 1 or abs(1 / scaling - self.n_parts) > 1e-6:
            raise ValueError(
                "train_sequence_length_scaling must be 1 or one over a whole number (0.5, 0.25), "
                f"got {scaling}."
            )
        if self.kernel not in (None, *_FUNCTIONS):
            raise ValueError(
                f"kernel must be one of {', '.join(_FUNCTIONS)}, or left out, got {self.kernel!r}."
            )

    @property
    def n_parts(self) -> int:
        """How many sequences each one of the corpus becomes."""
        return round(1 / self.train_sequence_length_scaling)

    @override
    def check_plan(self, plan: Plan) -> None:
        if plan.sequence_length % self.n_parts:
            raise ValueError(
                f"train_sequence_length_scaling must divide the sequence length "
                f"({plan.sequence_length}) into whole parts, got "
                f"{self.train_sequence_length_scaling}; use one over a divisor of it."
            )
        kernel = self.kernel or plan.model["attn_implementation"]
        problem = _kernel_problem(kernel, plan.on_cpu is True, plan.model["attn_pdrop"])
        if problem:
            raise ValueError(problem)

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        receipt = apply_alibi(module, kernel=self.kernel, optimizers=optimizers)
        split = f", splits each sequence in {self.n_parts}" if self.n_parts > 1 else ""
        return Receipt(
            receipt.algorithm, self.settings, receipt.changed + split, receipt.count, receipt.probe
        )

    @override
    def acts_on_batch(self, state: State) -> bool:
        return self.n_parts > 1

    @override
    def apply_to_batch(self, batch: Batch, state: State) -> Batch:
        return split_sequences(batch, self.n_parts, "alibi")

    @override
    def sequence_length_after(self, sequence_length: int) -> int:
        return sequence_length // self.n_parts


class NoPositions(nn.Module):
    """Stands where the position embedding was, has no parameters, and adds nothing."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """A zero without dimensions, which broadcasts and leaves the sum's type alone."""
        return torch.zeros((), device=position_ids.device)


# --- Attention functions, as transformers' AttentionInterface calls them -------------------------


def _sdpa(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Biased attention in one kernel; (B, H, Q, D), (B, H, K, D) to (B, Q, H, D)."""
    (n_keys, width), scale = key.shape[-2:], _scale(layer)
    # GPUs want a width that is a multiple of 8; the rest is zeros.
    extra = 8 - width % 8 if width % 8 <= 6 else 16 - width % 8
    # A key's number is kept as two that bfloat16 has exactly, up to 65,536 tokens.
    numbers = torch.arange(n_keys, device=key.device)
    digits = torch.stack([numbers // 256, numbers % 256], dim=-1).to(key.dtype)
    slope = (layer.alibi_slopes / scale).to(query.dtype)  # the kernel multiplies by scale
    slopes = torch.stack([256 * slope, slope], dim=-1)
    query = _widened(query, slopes[:, None, :], extra)
    key = _widened(key, digits, extra)
    value = F.pad(value, (0, extra))
    if attention_mask is not None:
        attention_mask = attention_mask[..., :n_keys]
    output = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, is_causal, scale=scale
    )
    return output[..., :width].transpose(1, 2), None


def _widened(states: Tensor, ending: Tensor, extra: int) -> Tensor:
    """``states`` with ``extra`` more numbers at the end of each vector, ``ending`` the first."""
    ending = F.pad(ending, (0, extra - ending.shape[-1]))
    return torch.cat([states, ending.expand(*states.shape[:-1], extra)], dim=-1)


def _eager(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    head_mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The formula step by step, softmax in float32; also returns the weights (B, H, Q, K)."""
    n_queries, n_keys = query.shape[-2], key.shape[-2]
    scores = (query @ key.transpose(-1, -2)).float() * _scale(layer)
    # Distances from the last key; where a query stands does not matter to a softmax.
    numbers = torch.arange(1 - n_keys, 1, device=key.device)
    scores = scores + layer.alibi_slopes.float()[:, None, None] * numbers
    if attention_mask is not None:
        scores = scores + attention_mask[..., :n_keys]
    elif is_causal:
        future = torch.ones(n_queries, n_keys, dtype=torch.bool, device=key.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    weights = F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout)
    if head_mask is not None:
        weights = weights * head_mask
    return (weights @ value).transpose(1, 2), weights


def _flex(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """FlexAttention over whole sequences; anything else is SDPA's."""
    if attention_mask is not None or not is_causal or key.device.type == "cpu":
        return _sdpa(layer, query, key, value, attention_mask, dropout, is_causal, **others)
    attend, mask = _compiled_flex_attention(), _causal_blocks(key.shape[-2], key.device)
    bias = _score_bias(layer.alibi_slopes)
    output = attend(query, key, value, score_mod=bias, block_mask=mask, scale=_scale(layer))
    return output.transpose(1, 2), None


def _score_bias(slopes: Tensor) -> Callable[..., Tensor]:
    """The formula for one score, as FlexAttention takes it."""

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score - slopes[head] * (q - k)

    return add_bias


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=16)
def _causal_blocks(n_tokens: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    return create_block_mask(causal, None, None, n_tokens, n_tokens, device=str(device))


def _scale(layer: Any) -> float:
    """What GPT-2 multiplies scores by, with its two rare variations."""
    scale = layer.head_dim**-0.5 if layer.scale_attn_weights else 1.0
    return scale / (layer.layer_idx + 1) if layer.scale_attn_by_inverse_layer_idx else scale


_FUNCTIONS: Mapping[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "sdpa": _sdpa,
    "eager": _eager,
    "flex": _flex,
}
for _name, _function in _FUNCTIONS.items():
    AttentionInterface.register(f"composer_gpt2_alibi_{_name}", _function)


def _attention_function(kernel: str, module: GPT2LMHeadModel) -> str:
    """The registered name of the kernel's function."""
    on_cpu = module.lm_head.weight.device.type == "cpu"
    problem = _kernel_problem(kernel, on_cpu, module.config.attn_pdrop)
    if problem:
        raise ValueError(problem)
    return f"composer_gpt2_alibi_{kernel.removeprefix('composer_gpt2_alibi_')}"


def _kernel_problem(kernel: str, on_cpu: bool, attention_dropout: float) -> str | None:
    if kernel not in _FUNCTIONS:
        return (
            f"alibi's kernel must be one of {', '.join(_FUNCTIONS)}, got {kernel!r}, which has no "
            "biases; set kernel, or the model's attn_implementation to sdpa."
        )
    if kernel == "flex" and on_cpu:
        return "alibi's kernel 'flex' trains on GPUs only, got a CPU; use sdpa."
    if kernel == "flex" and attention_dropout > 0:
        return (
            f"alibi's kernel 'flex' has no attention dropout, got attn_pdrop {attention_dropout}; "
            "set it to 0 or use sdpa."
        )
    return None


# --- Probe ---------------------------------------------------------------------------------------

_N_PROBED = 16  # tokens


@torch.no_grad()
def _probe(layers: Sequence[GPT2Attention]) -> tuple[float, float]:
    """The largest error of any layer against the formula, and what exchanging tokens changes.

    Both are relative to the largest output. Attention without positions gives its last token the
    same output whatever the order of those before it: the second number would be 0.
    """
    weight = layers[0].c_attn.weight
    # Composer allows TF32 on GPUs, whose ten bits are below the precision that is asked for here.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        error, change = _measure(layers, weight)
    finally:
        torch.set_float32_matmul_precision(precision)
    # The type's precision, with room for sums in another order.
    tolerance = 100 * torch.finfo(weight.dtype).eps
    if not error < tolerance or not change > 0:
        raise NoEffectError(
            f"alibi measured attention that is {error:.2g} off its formula (at most "
            f"{tolerance:.2g}) and changes by {change:.2g} when two tokens change places (more "
            "than 0): the model's attention does not go through transformers' AttentionInterface."
        )
    return error, change


def _measure(layers: Sequence[GPT2Attention], weight: Tensor) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _N_PROBED, weight.shape[0], generator=generator)
    hidden = hidden.to(weight.device, weight.dtype)
    error = max(_relative(_attend(layer, hidden), _by_formula(layer, hidden)) for layer in layers)
    exchanged = hidden.clone()
    exchanged[:, [0, -2]] = hidden[:, [-2, 0]]
    change = min(
        _relative(_attend(layer, exchanged)[:, -1], _attend(layer, hidden)[:, -1])
        for layer in layers
    )
    return error, change


def _attend(layer: GPT2Attention, hidden: Tensor) -> Tensor:
    """The layer's output without dropout, (B, T, H * D), before its projection."""
    seen: list[Tensor] = []
    hook = layer.c_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    was_training = layer.training
    layer.eval()
    try:
        layer(hidden)
    finally:
        layer.train(was_training)
        hook.remove()
    return seen[0]


def _by_formula(layer: GPT2Attention, hidden: Tensor) -> Tensor:
    n_heads, n_tokens = layer.num_heads, hidden.shape[1]
    query, key, value = (
        states.unflatten(-1, (n_heads, -1)).transpose(1, 2).double()
        for states in layer.c_attn(hidden).chunk(3, dim=-1)
    )
    bias = alibi_bias(n_heads, n_tokens, n_tokens).to(query)
    scores = query @ key.transpose(-1, -2) * _scale(layer) + bias
    future = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=hidden.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(-2)


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())
