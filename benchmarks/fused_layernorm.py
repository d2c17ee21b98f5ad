"""Ways to add to the residual stream and normalise it on a CPU, forward and backward.

The chain is that between attention and MLP: ``x = x + y`` with ``y`` from a Linear, LayerNorm, and
the cast to the precision of the next product; backward, the gradients of norm and residual stream
meet. Alternating in random order in one process. Prints Markdown.

    python benchmarks/fused_layernorm.py
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.fused_layernorm.fused_layernorm import _add_and_normalize, _compiled
from composer_gpt2.memory import keep_freed_memory
from composer_gpt2.run_folder import versions

ROWS, EPS, WARMUP = 4096, 1e-5, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 768, 1024])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    keep_freed_memory()  # as in training
    found = versions()
    print("# Residual addition and LayerNorm on a CPU")
    print()
    print(
        "- Command: `python benchmarks/fused_layernorm.py --widths "
        f"{' '.join(map(str, arguments.widths))} --rounds {arguments.rounds}`"
    )
    print(
        f"- {platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f};"
        f" torch {found['torch']}, Python {found['python']}, commit {found['commit']}"
    )
    print(
        f"- {ROWS} rows; medians of {arguments.rounds} rounds in random order after {WARMUP} "
        "discarded; ms, forward and backward together"
    )
    print()
    print("| precision | width | way | ms, median | fastest to slowest | x plain | first call, s |")
    print("|---|---|---|---|---|---|---|")
    for precision, contestants in (("bf16 autocast", AUTOCAST), ("fp32", FLOAT32)):
        for width in arguments.widths:
            first, seconds = measure(width, precision, contestants, arguments.rounds)
            reference = statistics.median(seconds["plain"])
            for name, measured in seconds.items():
                median = statistics.median(measured)
                print(
                    f"| {precision} | {width} | {name} | {median * 1e3:.2f} | "
                    f"{min(measured) * 1e3:.2f} to {max(measured) * 1e3:.2f} | "
                    f"{median / reference:.2f} | {first[name]:.1f} |",
                    flush=True,
                )


def measure(
    width: int, precision: str, contestants: dict[str, Callable[..., Any]], rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Seconds of the first call and of every round, for every contestant."""
    half = precision != "fp32"
    dtype = torch.bfloat16 if half else torch.float32
    generator = torch.Generator().manual_seed(17)
    x = torch.randn(ROWS, width, generator=generator)
    y, upstream = torch.randn(2, ROWS, width, generator=generator).to(dtype)
    residual_upstream = torch.randn(ROWS, width, generator=generator)
    parameters = [torch.nn.Parameter(torch.randn(width, generator=generator)) for _ in range(2)]
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(WARMUP + rounds):
        for name in random.sample(list(contestants), len(contestants)):
            leaves = [x.detach().requires_grad_(), y.detach().requires_grad_(), *parameters]
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                outputs = contestants[name](*leaves, EPS)
            torch.autograd.grad(outputs, leaves, [residual_upstream, upstream])
            elapsed = time.perf_counter() - start
            if number == 0:
                first[name] = elapsed
            elif number >= WARMUP:
                seconds[name].append(elapsed)
    return first, seconds


def fused(*inputs: Any) -> tuple[Tensor, Tensor]:
    """What ``FusedLayerNorm`` does."""
    return _compiled()(*inputs)


def half_precision_input(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """bfloat16 in and out, float32 parameters: mixed dtypes that the CPU's kernel knows."""
    x = x + y
    with torch.autocast("cpu", enabled=False):
        return x, F.layer_norm(x.bfloat16(), weight.shape, weight, bias, eps)


def normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps).bfloat16()


def norm_compiled(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What exchanging the LayerNorm module alone could do."""
    x = x + y
    return x, compiled_normalize(x, weight, bias, eps)


class KeepStatistics(torch.autograd.Function):
    """A LayerNorm that emits bfloat16 and keeps mean and scale, from PyTorch's own kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Normalises ``x``."""
        result, mean, scale = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, scale, weight, bias)
        return result.bfloat16()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Of ``x``, weight and bias."""
        x, mean, scale, weight, bias = ctx.saved_tensors
        kernel: Any = torch.ops.aten.native_layer_norm_backward
        gradient = gradients[0].float()
        parts = kernel(gradient, x, weight.shape, mean, scale, weight, bias, [True] * 3)
        return *parts, None


def keep_statistics(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = x + y
    with torch.autocast("cpu", enabled=False):
        return x, KeepStatistics.apply(x, weight, bias, eps)  # type: ignore[reportReturnType]


def plain_float32(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


def compiled(function: Callable[..., Any]) -> Any:
    """As ``FusedLayerNorm`` compiles."""
    return torch.compile(function, dynamic=True, options={"cpp.dynamic_threads": True})


compiled_normalize = compiled(normalize)
AUTOCAST: dict[str, Callable[..., Any]] = {
    "plain": _add_and_normalize,
    "fused_layernorm": fused,
    "compiled, norm alone": norm_compiled,
    "bfloat16 into layer_norm": half_precision_input,
    "autograd function that keeps mean and scale": keep_statistics,
}
FLOAT32: dict[str, Callable[..., Any]] = {
    "plain": plain_float32,
    "compiled as fused_layernorm": compiled(plain_float32),
}


if __name__ == "__main__":
    main()
