"""The parts of a fast training step on a CPU against what they replaced, and what was dropped.

Each pair computes the same thing in alternating order, in one process that keeps the memory it
frees, at the shapes of gpt2-125m and gpt2-52m with 4 x 1024 tokens in bfloat16.

    python benchmarks/cpu_kernels.py --hardware 2cpu
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.fused_cross_entropy import fused_cross_entropy
from composer_gpt2 import cpu_kernels as kernels
from composer_gpt2.memory import keep_freed_memory
from composer_gpt2.run_folder import versions

BATCH, LENGTH, VOCABULARY, ROWS = 4, 1024, 50257, 1024
SIZES = {"gpt2-125m": (12, 768), "gpt2-52m": (8, 512)}  # heads, width

Pair = tuple[str, Callable[[], object], str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hardware", required=True)
    arguments = parser.parse_args()
    keep_freed_memory()
    rows = []
    for model, (n_heads, width) in SIZES.items():
        for ours, run_ours, theirs, run_theirs in pairs(n_heads, width):
            seconds = compare(run_ours, run_theirs, arguments.rounds)
            rows.append((model, ours, theirs, seconds))
            print(line(rows[-1]), flush=True)
    path = Path(__file__).with_name(f"cpu_kernels_{arguments.hardware}_{date.today():%Y%m}.md")
    path.write_text(report(arguments, rows), encoding="utf-8")
    print(path)


def pairs(n_heads: int, width: int) -> list[Pair]:
    """What is compared: ours and its name, the other and its name."""
    generator = torch.Generator().manual_seed(17)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    qkv = random(BATCH, LENGTH, 3, n_heads, width // n_heads)
    gradient = random(BATCH, LENGTH, n_heads, width // n_heads)
    scale = (width // n_heads) ** -0.5

    def our_attention() -> None:
        output, log_sums = kernels.attention(qkv, scale)
        kernels.attention_backward(qkv, output, log_sums, gradient, scale)

    leaf = qkv.clone().requires_grad_()

    def their_attention() -> None:
        query, key, value = leaf.transpose(1, 3).unbind(2)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(output, leaf, gradient.transpose(1, 2))

    logits, buffer = random(ROWS, VOCABULARY), torch.empty(ROWS, VOCABULARY, dtype=torch.bfloat16)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    losses = torch.empty(ROWS)

    def softmax(function: Callable[..., None]) -> Callable[[], None]:
        def run() -> None:
            buffer.copy_(logits)
            function(buffer, None, targets, losses, torch.float32)

        return run

    states, total = random(ROWS, width), torch.zeros(VOCABULARY, width)
    padded = torch.empty(ROWS, 50304, dtype=torch.bfloat16)[:, :VOCABULARY].copy_(logits)

    def add_whole() -> None:
        total.add_(logits.T @ states)

    stream, weight = random(BATCH * LENGTH, width, dtype=torch.float32), torch.ones(width)
    inner, inner_gradient = random(BATCH * LENGTH, 4 * width), random(BATCH * LENGTH, 4 * width)
    inner_leaf = inner.clone().requires_grad_()
    added = random(BATCH * LENGTH, width)

    def their_gelu() -> None:
        output = F.gelu(inner_leaf, approximate="tanh")
        torch.autograd.grad(output, inner_leaf, inner_gradient)
        inner_gradient.sum(0)

    def our_gelu() -> None:
        kernels.gelu(inner)
        kernels.gelu_backward_(inner, inner_gradient.clone())

    def their_norm() -> Tensor:
        return F.layer_norm(stream + added, (width,), weight, weight).to(torch.bfloat16)

    def our_norm() -> None:
        kernels.add_layer_norm(stream, added, weight, weight, 1e-5, torch.bfloat16, return_sum=True)

    module = fused_cross_entropy
    return [
        ("attention, forward and backward", our_attention, "PyTorch's SDPA", their_attention),
        (
            f"softmax, loss and gradient of {ROWS:,} rows in one pass",
            softmax(module._in_one_pass_),
            "torch's operations on 64 rows at a time",
            softmax(module._losses_and_gradient_),
        ),
        (
            "vocabulary's weight gradient summed by slices",
            lambda: module._add_product_(total, logits.T, states),
            "as a whole",
            add_whole,
        ),
        (
            "the same, rows of logits padded to 64 bytes (dropped)",
            lambda: module._add_product_(total, padded.T, states),
            "not padded",
            lambda: module._add_product_(total, logits.T, states),
        ),
        ("addition and LayerNorm", our_norm, "torch's three operations", their_norm),
        (
            "GELU, forward and backward with the bias's gradient (and one copy more)",
            our_gelu,
            "torch's kernels",
            their_gelu,
        ),
    ]


def compare(ours: Callable, theirs: Callable, rounds: int) -> list[tuple[float, float]]:
    """Seconds of both in each round, after one that does not count."""
    found = []
    for number in range(rounds + 1):
        seconds = {}
        for run in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            start = time.perf_counter()
            run()
            seconds[run] = time.perf_counter() - start
        found.append((seconds[ours], seconds[theirs]))
    return found[1:]


def line(row: tuple) -> str:
    model, ours, theirs, seconds = row
    ratios = [mine / other for mine, other in seconds]
    medians = [1e3 * statistics.median(column) for column in zip(*seconds, strict=True)]
    return (
        f"| {model} | {ours} | {medians[0]:.1f} | {theirs} | {medians[1]:.1f} | "
        f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |"
    )


def report(arguments: argparse.Namespace, rows: list) -> str:
    found = versions()
    return "\n".join(
        [
            f"# Kernels of a training step: {arguments.hardware}",
            "",
            "Time of ours as a part of the other's; below 1 is faster.",
            "",
            f"- Command: `python benchmarks/cpu_kernels.py --rounds {arguments.rounds} "
            f"--hardware {arguments.hardware}`",
            f"- {date.today()}, commit {found['commit']}, torch {found['torch']}, "
            f"Python {found['python']}, {torch.get_num_threads()} threads",
            f"- {BATCH} x {LENGTH} tokens in bfloat16, random numbers; {arguments.rounds} rounds "
            "in alternating order after one that does not count: medians, and extremes of ratios",
            "",
            "| shape of | ours | ms | against | ms | ratio |",
            "|---|---|---|---|---|---|",
            *map(line, rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()
