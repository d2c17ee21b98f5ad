"""Whether fewer and larger matrix products make a parallel block faster on this machine.

One block, forward and backward, in alternating order: GPT-2's sequential block, the parallel one of
``algorithms/parallel_residual`` with its four products, and two forms that join products while the
parameters stay apart under their names: ``c_attn`` with ``c_fc`` (D to 7 D), and besides both
``c_proj`` (5 D to D). Prints Markdown.

    python benchmarks/parallel_residual.py
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2LMHeadModel

from algorithms.parallel_residual import apply_parallel_residual
from composer_gpt2.configs import get_config
from composer_gpt2.run_folder import versions

BATCH_SIZE, SEQUENCE_LENGTH = 4, 1024
HEADS = {512: 8, 768: 12, 1024: 16}  # gpt2-52m, gpt2-125m, gpt2-350m
CONTESTANTS = ("sequential", "parallel", "one product in", "one product in, one out")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=list(HEADS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found = versions()
    print("# Fewer and larger products in a parallel block")
    print()
    print(
        f"- Command: `python benchmarks/parallel_residual.py --widths "
        f"{' '.join(map(str, arguments.widths))} --rounds {arguments.rounds}`"
    )
    print(
        f"- {platform.machine()}, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f}; torch {found['torch']}, commit {found['commit']}"
    )
    print(
        f"- Forward and backward of one block, {BATCH_SIZE} x {SEQUENCE_LENGTH} tokens, no "
        f"dropout; medians of {arguments.rounds} rounds in random order after one discarded. "
        "Times are of the parallel block's (fastest to slowest round)."
    )
    print()
    print("| precision | width | contestant | ms, median | fastest to slowest | x parallel |")
    print("|---|---|---|---|---|---|")
    for precision in ("fp32", "bf16 autocast"):
        for width in arguments.widths:
            seconds = measure(width, precision, arguments.rounds)
            reference = statistics.median(seconds["parallel"])
            for name, measured in seconds.items():
                median = statistics.median(measured)
                print(
                    f"| {precision} | {width} | {name} | {median * 1e3:.0f} | "
                    f"{min(measured) * 1e3:.0f} to {max(measured) * 1e3:.0f} | "
                    f"{median / reference:.2f} |",
                    flush=True,
                )


def measure(width: int, precision: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every contestant."""
    sequential, parallel = block(width), block(width, parallel=True)
    x = torch.randn(BATCH_SIZE, SEQUENCE_LENGTH, width, requires_grad=True)
    run = {
        "sequential": lambda: sequential(x)[0],
        "parallel": lambda: parallel(x)[0],
        "one product in": lambda: fused(parallel, x, join_out=False),
        "one product in, one out": lambda: fused(parallel, x, join_out=True),
    }
    with torch.no_grad():
        for name in CONTESTANTS[2:]:
            torch.testing.assert_close(run[name](), run["parallel"](), rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(x)
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds + 1):
        for name in random.sample(CONTESTANTS, len(CONTESTANTS)):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
                result = run[name]()
            result.backward(upstream)
            if number:
                seconds[name].append(time.perf_counter() - start)
            for parameter in (x, *sequential.parameters(), *parallel.parameters()):
                parameter.grad = None
    return seconds


def block(width: int, *, parallel: bool = False) -> Any:
    config = get_config("gpt2-125m", n_layer=1, n_embd=width, n_head=HEADS[width], dropout=0.0)
    model = GPT2LMHeadModel(config)
    if parallel:
        apply_parallel_residual(model)
    return model.transformer.h[0]


def fused(block: Any, x: Tensor, *, join_out: bool) -> Tensor:
    """The parallel block with joined products; D is the width, x has shape (B, T, D)."""
    B, T, D = x.shape
    attn, mlp = block.attn, block.mlp
    flat = block.ln_1(x).view(B * T, D)
    weight = torch.cat([attn.c_attn.weight, mlp.c_fc.weight], dim=1)  # (D, 7 D)
    bias = torch.cat([attn.c_attn.bias, mlp.c_fc.bias])
    qkv, inner = torch.addmm(bias, flat, weight).split([3 * D, 4 * D], dim=1)
    q, k, v = qkv.view(B, T, 3, attn.num_heads, D // attn.num_heads).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    heads = heads.transpose(1, 2).reshape(B * T, D)
    inner = mlp.act(inner)
    if join_out:
        weight = torch.cat([attn.c_proj.weight, mlp.c_proj.weight])  # (5 D, D)
        bias = attn.c_proj.bias + mlp.c_proj.bias
        written = torch.addmm(bias, torch.cat([heads, inner], dim=1), weight)
        return x + written.view(B, T, D)
    return x + attn.c_proj(heads).view(B, T, D) + mlp.c_proj(inner).view(B, T, D)


if __name__ == "__main__":
    main()
