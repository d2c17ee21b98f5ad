"""The loss of the vocabulary projection without its logits.

GPT-2's logits are by far the largest tensor of a step: 4 x 1024 tokens x 50257 x 4 bytes = 823 MB
in float32, and softmax and gradient are as large again. But the gradient of a summed cross entropy
with respect to the logits needs nothing from outside: it is ``softmax(logits) - one_hot(label)``.
So we take some rows of hidden states at a time, turn their logits into that gradient in place,
multiply it on into the gradients of hidden states and weight, and use the memory for the next rows.
All of that happens in the forward pass; the backward pass only multiplies by a number.

Shapes: ``B`` batch, ``T`` tokens, ``N`` rows (positions that predict a token, ``B * (T - 1)``),
``D`` model width, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel, GPT2Model
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from typing_extensions import override

from composer_gpt2 import cpu_kernels as kernels
from composer_gpt2.contract import (
    NoEffectError,
    Receipt,
    SpeedupAlgorithm,
    Stage,
    language_model,
)

__all__ = ["FusedCrossEntropy", "apply_fused_cross_entropy", "linear_cross_entropy"]

IGNORE_INDEX = -100  # labels with this value are no targets, as in torch.nn.CrossEntropyLoss


@torch.compiler.disable  # a graph that unrolls the chunks is no faster than the chunks
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    rows: int = 1024,
    n_items: Tensor | int | None = None,
) -> Tensor:
    """Mean cross entropy of ``softmax(hidden @ weight.T + bias)``, in nats.

    Under autocast products are computed in its type; softmax, loss and the sum of the weight's
    gradient are in float32 always. On a GPU with Liger installed, Liger's kernel does it.

    Example:
        >>> hidden, weight = torch.randn(6, 4), torch.randn(10, 4, requires_grad=True)
        >>> linear_cross_entropy(hidden, weight, torch.arange(6)).backward()

    Args:
        hidden: Shape ``(N, D)``.
        weight: Shape ``(V, D)``.
        labels: Shape ``(N,)``, int64; rows with -100 do not count.
        bias: Shape ``(V,)``; ``-inf`` for what is never predicted.
        rows: Rows whose logits are in memory at once.
        n_items: What the sum is divided by. Default: the labels that count; NaN if none does.

    Returns:
        A scalar, at least float32.

    Source: Hsu et al., 2024, "Liger Kernel", https://arxiv.org/abs/2410.10989, section 3.2.
    """
    liger = _liger_loss() if hidden.is_cuda else None
    if liger is not None:
        if not torch.is_grad_enabled():  # it would compute gradients all the same
            hidden, weight = hidden.detach(), weight.detach()
        total = liger(weight, hidden, labels, bias)
    else:
        differentiate = torch.is_grad_enabled()  # inside of apply() it never is
        result = _SummedLoss.apply(hidden, weight, bias, labels, rows, differentiate)
        total = cast(Tensor, result)
    if n_items is not None:
        return total / (n_items.to(total.device) if isinstance(n_items, Tensor) else n_items)
    n_counted = (labels != IGNORE_INDEX).sum()
    return torch.where(n_counted > 0, total / n_counted.clamp(min=1), torch.nan)


def apply_fused_cross_entropy(
    model: nn.Module, rows: int = 1024, optimizers: Sequence[Optimizer] = ()
) -> Receipt:
    """Makes the network compute its training loss without logits.

    With ``labels`` and in training mode, the outputs have a ``loss`` and ``logits`` are ``None``.
    Without labels, and in evaluation mode, they are as ever; ``return_logits=True`` or ``False`` in
    a call decides for that call. Weights, names and what is saved stay the same.

    Example:
        >>> model = GPT2LMHeadModel(GPT2Config())
        >>> print(apply_fused_cross_entropy(model))
        fused_cross_entropy: fused 1 of 1 loss (50,257 x 768), at most 1,024 rows of logits ...

    Args:
        model: A ``GPT2LMHeadModel``, or a ``GPT2Model`` that holds one; changed in place.
        rows: Rows of logits in memory at once, where Liger's kernel does not decide for itself.
        optimizers: Ignored; no parameter comes or goes.

    Raises:
        NoEffectError: The model is no GPT-2, is fused already, or its head is more than a linear
            layer.
        ValueError: ``rows`` is below 1.

    Source: Hsu et al., 2024, https://arxiv.org/abs/2410.10989, section 3.2.
    """
    _check_rows(rows)
    module = language_model(model, "fused_cross_entropy")
    if isinstance(module, _FusedLoss):
        raise NoEffectError(
            "fused_cross_entropy looked for a model with Hugging Face's loss and found one that it "
            "had changed already; apply it once."
        )
    head = module.lm_head
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise NoEffectError(
            "fused_cross_entropy needs an lm_head that is a torch.nn.Linear, got "
            f"{type(head).__name__}, whose logits it does not know."
        )
    probe = _probe(head, rows)
    module.__class__ = _fused_class(type(module))
    module.loss_rows = rows  # type: ignore[assignment]  # a module takes any attribute
    on_gpu = head.weight.is_cuda and _liger_loss() is not None
    how = "Liger's kernel" if on_gpu else f"at most {rows:,} rows of logits at a time"
    return Receipt(
        algorithm="fused_cross_entropy",
        settings={"rows": rows},
        changed=f"fused 1 of 1 loss ({head.out_features:,} x {head.in_features}), {how}",
        count=1,
        probe=probe,
    )


@dataclass(eq=False)
class FusedCrossEntropy(SpeedupAlgorithm):
    """The loss of the vocabulary projection without its logits: the same numbers in less memory.

    Changes: the outputs of the network in training have no logits, so that metrics in training are
    those that take the loss (``LanguageCrossEntropy`` and its kin). The loss stays the same.

    Example:
        >>> Trainer(model=GPT2Model.from_name("gpt2-125m"), algorithms=[FusedCrossEntropy()], ...)

    Args:
        rows: Rows of logits in memory at once: fewer take less memory and more time.

    Raises:
        ValueError: ``rows`` is below 1.

    Source: Hsu et al., 2024, https://arxiv.org/abs/2410.10989, section 3.2.
    """

    rows: int = 1024

    name = "fused_cross_entropy"
    stage = Stage.LOSS

    def __post_init__(self) -> None:
        _check_rows(self.rows)

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        return apply_fused_cross_entropy(module, self.rows, optimizers)


def _check_rows(rows: int) -> None:
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}; 1024 is a good number on a CPU.")


# --- The network ---------------------------------------------------------------------------------

_BODY_ARGUMENTS = frozenset(inspect.signature(GPT2Model.forward).parameters) - {"self", "kwargs"}
_HEAD_ARGUMENTS = frozenset({"num_items_in_batch", "return_dict"})


def _signature() -> inspect.Signature:
    """Hugging Face's, by which ``generate`` and Composer find their arguments, and ours."""
    theirs = inspect.signature(GPT2LMHeadModel.forward)
    ours = inspect.Parameter("return_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    *named, others = theirs.parameters.values()
    return theirs.replace(parameters=[*named, ours, others])


class _FusedLoss(GPT2LMHeadModel):
    """What is put before the class of a network; see :func:`_fused_class`."""

    loss_rows: int

    def forward(
        self,
        *args: Any,
        labels: Any = None,  # Tensor | None; transformers says LongTensor
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions | tuple:
        """Hugging Face's arguments and outputs; ``logits`` are ``None`` where they are not wanted.

        Args:
            *args: As in ``GPT2LMHeadModel.forward``.
            labels: Shape ``(B, T)``; position ``t`` is the target of position ``t - 1``.
            return_logits: Whether logits are wanted beside a loss. Default: in evaluation mode.
            **kwargs: As in ``GPT2LMHeadModel.forward``.
        """
        if return_logits is None:
            return_logits = not self.training
        # An argument that only Hugging Face's loss knows takes Hugging Face's way.
        if (
            labels is None
            or return_logits
            or not kwargs.keys() <= _BODY_ARGUMENTS | _HEAD_ARGUMENTS
        ):
            return super().forward(*args, labels=labels, **kwargs)
        n_items = kwargs.pop("num_items_in_batch", None)
        return_dict = kwargs.pop("return_dict", None)
        outputs = self.transformer(*args, **kwargs, return_dict=True)
        loss = linear_cross_entropy(
            outputs.last_hidden_state[:, :-1].flatten(0, 1),
            self.lm_head.weight,
            labels[:, 1:].flatten().to(self.lm_head.weight.device),
            self.lm_head.bias,
            rows=self.loss_rows,
            n_items=n_items,
        )
        if not (self.config.use_return_dict if return_dict is None else return_dict):
            return (loss, None, *outputs.to_tuple()[1:])
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithCrossAttentions(loss=cast(Any, loss), **others)

    forward.__signature__ = _signature()  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """For pickle and deepcopy: the class is made again from the one that it was put before."""
        return _new, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _fused_class(base: type[GPT2LMHeadModel]) -> type[GPT2LMHeadModel]:
    """A subclass of any network's class, under its name: that is what checkpoints record."""
    return type(base.__name__, (_FusedLoss, base), {"__module__": base.__module__})


def _new(base: type[GPT2LMHeadModel]) -> GPT2LMHeadModel:
    fused = _fused_class(base)
    return fused.__new__(fused)


# --- The loss ------------------------------------------------------------------------------------

_SOFTMAX_ROWS = 64  # 64 x 50257 x 4 bytes = 13 MB in float32: stays in a CPU's cache


class _SummedLoss(torch.autograd.Function):
    """The sum of the cross entropies of all rows; gradients are made with it and kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: int,
        differentiate: bool,
    ) -> Tensor:
        needed: Sequence[bool] = ctx.needs_input_grad
        for_hidden, for_weight, for_bias = (differentiate and need for need in needed[:3])
        device, (n_rows, _), n_vocabulary = hidden.device, hidden.shape, len(weight)
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        wide = torch.promote_types(dtype, torch.float32)
        in_one_pass = wide is torch.float32 and dtype is not torch.float16 and _has_kernel(device)
        losses_and_gradient_ = _in_one_pass_ if in_one_pass else _losses_and_gradient_

        with torch.autocast(device.type, enabled=False):
            states, matrix = hidden.to(dtype), weight.to(dtype)
            counted = labels != IGNORE_INDEX
            targets = torch.where(counted, labels, 0)
            losses = torch.empty(n_rows, dtype=wide, device=device)
            buffer = torch.empty(min(rows, n_rows), n_vocabulary, dtype=dtype, device=device)
            # A row that does not count is zeroed where it has D numbers, not where it has V.
            counted_states = states * counted[:, None] if for_weight else states
            grad_hidden = torch.empty_like(states) if for_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
            grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if for_bias else None

            for start in range(0, n_rows, rows):
                chunk = slice(start, min(start + rows, n_rows))
                logits = buffer[: chunk.stop - start]
                torch.mm(states[chunk], matrix.T, out=logits)
                losses_and_gradient_(logits, bias, targets[chunk], losses[chunk], wide)
                gradient = logits  # it is, now
                if grad_hidden is not None:
                    torch.mm(gradient, matrix, out=grad_hidden[chunk])
                if grad_weight is not None:
                    _add_product_(grad_weight, gradient.T, counted_states[chunk])
                if grad_bias is not None:
                    grad_bias += gradient.T.to(wide) @ counted[chunk].to(wide)
            if grad_hidden is not None:
                grad_hidden = (grad_hidden * counted[:, None]).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight = grad_weight.to(weight.dtype)
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            return torch.where(counted, losses, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # A factor of 1 is the usual one, and the weight's gradient is large.
        whole = grad_output.is_cpu and grad_output.item() == 1
        gradients = (g if g is None or whole else g * grad_output for g in ctx.saved_tensors)
        return (*gradients, None, None, None)


def _losses_and_gradient_(
    logits: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor, wide: torch.dtype
) -> None:
    """Writes the losses of a chunk of rows and, over their logits, the gradient of the losses."""
    n_rows = _SOFTMAX_ROWS if logits.is_cpu else max(1, len(logits))
    for start in range(0, len(logits), n_rows):
        block = slice(start, start + n_rows)
        scores = logits[block].to(wide)  # shares memory if the type is the same
        if bias is not None:
            scores += bias
        scores -= scores.amax(dim=1, keepdim=True)
        target_scores = scores.gather(1, targets[block, None])
        total = scores.exp_().sum(dim=1, keepdim=True)
        losses[block] = (total.log() - target_scores)[:, 0]
        softmax = scores.div_(total)
        softmax.scatter_add_(1, targets[block, None], softmax.new_full((len(softmax), 1), -1.0))
        if softmax.dtype != logits.dtype:
            logits[block] = softmax


def _in_one_pass_(
    logits: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor, wide: torch.dtype
) -> None:
    """The same in a kernel that reads and writes memory once."""
    lowest, highest = targets.aminmax()
    if lowest < 0 or highest >= logits.shape[1]:
        raise IndexError(
            f"labels must be token numbers from 0 to {logits.shape[1] - 1} or {IGNORE_INDEX}, got "
            f"one out of bounds between {int(lowest)} and {int(highest)}; is it the corpus of "
            "another tokenizer?"
        )
    kernels.cross_entropy_(logits, None if bias is None else bias.to(wide), targets, losses)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    if device.type != "cpu":
        return False
    try:
        kernels.kernel_library()
    except kernels.KernelsUnavailableError:
        return False  # torch's operations do it
    return True


_SUMMED_ROWS = 4096  # of the weight's gradient: 4096 x 768 x 4 bytes = 13 MB stay in a CPU's cache


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; ``total`` may be of a wider type, which no product has."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for start in range(0, len(total), _SUMMED_ROWS):
        part = slice(start, start + _SUMMED_ROWS)
        total[part] += left[part] @ right


@functools.cache
def _liger_loss() -> Callable[..., Tensor] | None:
    """Liger's loss, summed, if it is installed; it cannot be imported without a GPU."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import (  # type: ignore[import]
            LigerFusedLinearCrossEntropyLoss,
        )
    except ModuleNotFoundError:
        return None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)


# --- Probe ---------------------------------------------------------------------------------------

_N_PROBED = 8  # rows
_N_TOKENS = 4096  # of the vocabulary: its first ones; all would take a gigabyte


def _probe(head: nn.Linear, rows: int) -> dict[str, float]:
    """The errors of loss and gradients against the model's own head, on random rows.

    Each is relative to the largest number of the plain path.
    """
    weight = head.weight[:_N_TOKENS]
    bias = None if head.bias is None else head.bias[:_N_TOKENS]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_N_PROBED, head.in_features, generator=generator)
    hidden = hidden.to(weight.device, weight.dtype).requires_grad_()
    weight = weight.detach().requires_grad_()
    tokens = torch.arange(len(weight))
    if bias is not None:
        tokens = tokens[bias.isfinite().cpu()]
    labels = tokens[torch.randint(len(tokens), (_N_PROBED,), generator=generator)]
    labels[0] = IGNORE_INDEX
    labels = labels.to(weight.device)

    with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
        fused = linear_cross_entropy(hidden, weight, labels, bias, rows=min(rows, _N_PROBED // 2))
        logits = F.linear(hidden, weight, bias)
        plain = F.cross_entropy(logits.float(), labels)
        ours = [fused, *torch.autograd.grad(fused, [hidden, weight])]
        theirs = [plain, *torch.autograd.grad(plain, [hidden, weight])]
    loss, of_hidden, of_weight = (
        float((our.double() - their.double()).abs().max() / their.double().abs().max())
        for our, their in zip(ours, theirs, strict=True)
    )
    # bfloat16 has eight bits; what is wrong is wrong by more.
    if not max(loss, of_hidden, of_weight) < 0.05:
        raise NoEffectError(
            "fused_cross_entropy must give the loss and the gradients of the plain path, got "
            f"errors of {loss:.2g}, {of_hidden:.2g} (hidden) and {of_weight:.2g} (weight) of the "
            "largest number; it leaves the model as it was."
        )
    return {
        "relative error of the loss": loss,
        "of the hidden states' gradient": of_hidden,
        "of the weight's gradient": of_weight,
    }
