"""Kernels for CPUs with AVX512-BF16: what stands between the matrix products of a training step.

Plain functions of tensors, without autograd; the algorithms that use them bring their own. All
tensors are contiguous and on the CPU. ``A`` is the type of activations, bfloat16 or float32;
arithmetic is in float32 always.

Letters: B batch, T tokens, H heads, K width of a head, N rows (tokens of a batch), D model width, V
vocabulary; D and K are multiples of 16.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from composer_gpt2.cpu_kernels.library import KernelsUnavailableError, kernel_library

__all__ = [
    "LANES",
    "KernelsUnavailableError",
    "add_layer_norm",
    "add_layer_norm_backward",
    "attention",
    "attention_backward",
    "cross_entropy_",
    "gelu",
    "gelu_backward_",
    "kernel_library",
    "round_and_sum_rows",
    "sum_rows",
]

LANES = 16
"""What the widths of rows and heads are multiples of."""


def attention(qkv: Tensor, scale: float, slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Causal attention of every token to itself and those before it.

    Args:
        qkv: Queries, keys and values, bfloat16, shape ``(B, T, 3, H, K)``.
        scale: What scores are multiplied by.
        slopes: ALiBi's, float32, shape ``(H,)``.

    Returns:
        The values' averages, shape ``(B, T, H, K)``, and for the backward pass the base-2 logarithm
        of each softmax's denominator, float32, shape ``(B, H, T)``.

    Source: Dao et al., 2022, https://arxiv.org/abs/2205.14135, algorithm 2.
    """
    B, T, _, H, K = qkv.shape
    output = torch.empty(B, T, H, K, dtype=qkv.dtype)
    log_sums = torch.empty(B, H, T)
    _call("attention_forward", qkv, output, log_sums, slopes, B, T, H, K, scale)
    return output, log_sums


def attention_backward(
    qkv: Tensor,
    output: Tensor,
    log_sums: Tensor,
    grad_output: Tensor,
    scale: float,
    slopes: Tensor | None = None,
) -> Tensor:
    """The gradient of ``qkv``; arguments as :func:`attention` takes and returns them.

    Source: Dao et al., 2022, https://arxiv.org/abs/2205.14135, algorithm 4.
    """
    B, T, _, H, K = qkv.shape
    gradient = torch.empty_like(qkv)
    tensors = (qkv, output, log_sums, grad_output, gradient, slopes)
    _call("attention_backward", *tensors, B, T, H, K, scale)
    return gradient


def add_layer_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    return_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``layer_norm(x + y)`` in ``dtype``, and the sum if wanted.

    Args:
        x: The residual stream, float32, shape ``(N, D)``.
        y: What is added to it, of type A; may be None.
        weight: Of the norm, float32, shape ``(D,)``.
        bias: As ``weight``.
        eps: Added to the variance.
        dtype: A.
        return_sum: Whether ``x + y``, float32, is wanted.
    """
    N, D = x.shape
    output, total = x.new_empty(N, D, dtype=dtype), torch.empty_like(x) if return_sum else None
    _call(f"add_layer_norm_{_name(dtype)}", x, y, weight, bias, total, output, N, D, eps)
    return output, total


def add_layer_norm_backward(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    eps: float,
    grad_norm: Tensor,
    grad_stream: Tensor,
    *,
    for_projection: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """The gradient of ``x + y``, which flows on as residual stream and is normalized.

    Args:
        x: As in :func:`add_layer_norm`.
        y: As in :func:`add_layer_norm`.
        weight: As in :func:`add_layer_norm`.
        eps: As in :func:`add_layer_norm`.
        grad_norm: Of the norm's output, type A, shape ``(N, D)``.
        grad_stream: Of the residual stream, float32, shape ``(N, D)``.
        for_projection: Whether ``y`` is a projection that needs this gradient, too.

    Returns:
        The gradient of ``x`` in float32; if wanted, the same in type A; those of weight and bias;
        if wanted, the sum of the first over rows, for the projection's bias.
    """
    N, D = x.shape
    gradient = torch.empty_like(x)
    rounded = torch.empty_like(grad_norm) if for_projection else None
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    row_sum = torch.empty_like(weight) if for_projection else None
    _call(
        f"add_layer_norm_backward_{_name(grad_norm.dtype)}",
        *(x, y, weight, grad_norm, grad_stream, gradient, rounded, grad_weight, grad_bias, row_sum),
        *(N, D, eps),
    )
    return gradient, rounded, grad_weight, grad_bias, row_sum


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, type A.

    Source: Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415, section 2.
    """
    output = torch.empty_like(x)
    _call(f"gelu_{_name(x.dtype)}", x, output, x.numel())
    return output


def gelu_backward_(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Turns the gradient of ``gelu(x)`` into that of ``x``, in place.

    Args:
        x: Type A, shape ``(N, width)``.
        gradient: The same.

    Returns:
        ``gelu(x)`` once more, and the new gradient's sum over rows, float32.
    """
    N, width = x.shape
    output, row_sum = torch.empty_like(x), torch.empty(width)
    _call(f"gelu_backward_{_name(x.dtype)}", x, gradient, output, row_sum, N, width)
    return output, row_sum


def round_and_sum_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x``, float32, shape ``(N, D)``, in type A, and its sum over rows."""
    N, D = x.shape
    rounded, row_sum = torch.empty_like(x, dtype=dtype), torch.empty(D)
    _call(f"round_and_sum_rows_{_name(dtype)}", x, rounded, row_sum, N, D)
    return rounded, row_sum


def sum_rows(x: Tensor) -> Tensor:
    """The sum over rows, float32, of type A, shape ``(N, width)``."""
    N, width = x.shape
    row_sum = torch.empty(width)
    _call(f"sum_rows_{_name(x.dtype)}", x, row_sum, N, width)
    return row_sum


def cross_entropy_(logits: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor) -> None:
    """Cross entropy of each row, in nats, and over the logits its gradient.

    Args:
        logits: Type A, shape ``(N, V)``.
        bias: Added to them, float32, shape ``(V,)``; ``-inf`` for what is never predicted.
        targets: int64, shape ``(N,)``, each in ``range(V)``.
        losses: Float32, shape ``(N,)``; written.
    """
    N, V = logits.shape
    _call(f"cross_entropy_{_name(logits.dtype)}", logits, bias, targets, losses, N, V)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _call(name: str, *arguments: Tensor | float | int | None) -> None:
    getattr(kernel_library(), name)(*map(_argument, arguments))


def _argument(value: Tensor | float | int | None) -> object:
    if isinstance(value, Tensor):
        assert value.is_cpu, value.device
        assert value.is_contiguous(), value.stride()
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)
