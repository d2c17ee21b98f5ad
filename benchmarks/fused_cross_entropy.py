"""Time and peak memory of the vocabulary projection with its loss, forward and backward, on a CPU.

The plain path is Hugging Face's: ``lm_head``, then its loss on logits in float32. The fused path is
``linear_cross_entropy`` at several chunk sizes. Each measurement is a process of its own, forked
from this one, so that its peak is nobody else's: it makes the inputs, notes its resident memory,
runs one pass that is discarded and one that counts. Rounds take the contestants in turning order.

    python benchmarks/fused_cross_entropy.py --hardware 2cpu
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from algorithms.fused_cross_entropy import linear_cross_entropy
from composer_gpt2.configs import get_config
from composer_gpt2.memory import keep_freed_memory
from composer_gpt2.run_folder import versions

DEFAULT_ROWS = 1024
# Model, autocast, chunk sizes; 0 is the plain path.
CONTESTS = [
    ("gpt2-52m", True, [0, 128, 256, 512, DEFAULT_ROWS]),
    ("gpt2-52m", False, [0, DEFAULT_ROWS]),
    ("gpt2-125m", True, [0, DEFAULT_ROWS]),
    ("gpt2-125m", False, [0, DEFAULT_ROWS]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hardware", required=True)
    arguments = parser.parse_args()

    # Milliseconds, megabytes and loss for each round.
    results: dict[tuple[str, bool, int], list[tuple[float, float, float]]] = {}
    for number in range(arguments.rounds):
        for model, autocast, sizes in CONTESTS:
            turn = number % len(sizes)
            for rows in sizes[turn:] + sizes[:turn]:
                # A fresh fork; this process itself never computes.
                with multiprocessing.get_context("fork").Pool(1) as pool:
                    shape = (arguments.batch_size, arguments.sequence_length)
                    result = pool.apply(measure, (model, autocast, rows, *shape))
                results.setdefault((model, autocast, rows), []).append(result)
                print(f"round {number + 1}", model, autocast, rows, result, flush=True)
    text = report(arguments, results)
    name = f"fused_cross_entropy_{arguments.hardware}_{date.today():%Y%m}.md"
    Path(__file__).with_name(name).write_text(text, encoding="utf-8")
    print(text)


def measure(model: str, autocast: bool, rows: int, B: int, T: int) -> tuple[float, float, float]:
    """Milliseconds of a pass, megabytes at its peak above the inputs, and the loss."""
    keep_freed_memory()  # as in our trainer
    config = get_config(model)
    torch.manual_seed(17)
    head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    hidden = torch.randn(B, T, config.n_embd, requires_grad=True)
    labels = torch.randint(config.vocab_size, (B, T))

    def loss() -> Tensor:
        if rows == 0:
            return ForCausalLMLoss(head(hidden), labels, vocab_size=config.vocab_size)
        states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return linear_cross_entropy(states, head.weight, targets, rows=rows)

    before, seconds, value = resident_megabytes(), 0.0, 0.0
    for _ in range(2):
        hidden.grad = head.weight.grad = None
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = loss()
        result.backward()
        seconds = time.perf_counter() - start
        value = result.item()
        del result
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of KiB
    return 1000 * seconds, peak - before, value


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def report(
    arguments: argparse.Namespace,
    results: dict[tuple[str, bool, int], list[tuple[float, float, float]]],
) -> str:
    found = versions()
    lines = [
        f"# Fused cross entropy: {arguments.hardware}",
        "",
        f"The vocabulary projection with its loss, {arguments.batch_size} x "
        f"{arguments.sequence_length} tokens, 50257 tokens of vocabulary, forward and backward. "
        "Medians, with the extremes of all rounds. Memory is the peak above the inputs, in MiB, "
        "and includes the gradients.",
        "",
        f"- Command: `python benchmarks/fused_cross_entropy.py --batch-size {arguments.batch_size} "
        f"--sequence-length {arguments.sequence_length} --rounds {arguments.rounds} "
        f"--hardware {arguments.hardware}`",
        f"- {date.today()}, commit {found['commit']}, torch {found['torch']}, transformers "
        f"{found['transformers']}, Python {found['python']}, {torch.get_num_threads()} threads",
        f"- {arguments.rounds} rounds in turning order, a process for each measurement; in each "
        "one pass discarded, one measured",
        "",
        "| head | precision | path | ms | against plain | peak memory, MiB | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, autocast, rows), rounds in sorted(results.items(), key=lambda item: item[0]):
        times, peaks = [ms for ms, _, _ in rounds], [peak for _, peak, _ in rounds]
        plain = [ms for ms, _, _ in results[model, autocast, 0]]
        ratios = [a / b for a, b in zip(times, plain, strict=True)]
        lines.append(
            f"| {model} | {'bf16 autocast' if autocast else 'fp32'} | "
            f"{f'{rows} rows' if rows else 'plain'} | {spread(times, '.0f')} | "
            f"{spread(ratios, '.2f')} | {spread(peaks, '.0f')} | {rounds[0][2]:.5f} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: list[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
