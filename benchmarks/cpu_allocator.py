"""What reusing large blocks of memory is worth in a training step on a CPU.

Each round runs both contestants, in alternating order and in fresh processes: the same model, batch
and optimizer, with glibc's defaults and with ``composer_gpt2.build``'s setting.

    python benchmarks/cpu_allocator.py --hardware 2cpu
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from composer_gpt2.memory import keep_freed_memory
from composer_gpt2.model import GPT2Model
from composer_gpt2.run_folder import versions

WARMUP_STEPS, STEPS = 2, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2-tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--contestant", choices=["default", "reuse"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(measure(arguments)))
        return
    rows = []
    for number in range(arguments.rounds):
        order = ["default", "reuse"] if number % 2 == 0 else ["reuse", "default"]
        result = {name: run(name) for name in order}
        rows.append((result["default"], result["reuse"]))
        print(f"round {number + 1}: {result}", flush=True)
    path = Path(__file__).with_name(f"cpu_allocator_{arguments.hardware}_{date.today():%Y%m}.md")
    path.write_text(report(arguments, rows), encoding="utf-8")
    print(path)


def run(contestant: str) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--contestant", contestant]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    if arguments.contestant == "reuse":
        keep_freed_memory()
    torch.manual_seed(17)
    model = GPT2Model.from_name(arguments.model, dropout=0.0, cpu_precision="amp_bf16")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(50257, (arguments.batch_size, arguments.sequence_length))
    batch = {"input_ids": tokens, "labels": tokens}
    for step in range(WARMUP_STEPS + STEPS):
        if step == WARMUP_STEPS:
            start, faults = time.perf_counter(), page_faults()
        model.loss(model(batch), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start  # type: ignore[reportPossiblyUnbound]
    return {
        "tokens_per_second": STEPS * tokens.numel() / seconds,
        "page_faults": (page_faults() - faults) / STEPS,  # type: ignore[reportPossiblyUnbound]
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def report(arguments: argparse.Namespace, rows: list) -> str:
    ratios = [reuse["tokens_per_second"] / default["tokens_per_second"] for default, reuse in rows]
    found = versions()
    lines = [
        f"# Reusing large blocks of memory: {arguments.hardware}",
        "",
        f"A training step runs **{statistics.median(ratios):.2f} x** as fast (median of "
        f"{len(ratios)} rounds, {min(ratios):.2f} to {max(ratios):.2f}).",
        "",
        f"- Command: `python benchmarks/cpu_allocator.py --model {arguments.model} "
        f"--batch-size {arguments.batch_size} --sequence-length {arguments.sequence_length} "
        f"--rounds {arguments.rounds} --hardware {arguments.hardware}`",
        f"- {date.today()}, commit {found['commit']}, torch {found['torch']}, "
        f"Python {found['python']}, {torch.get_num_threads()} threads",
        f"- bfloat16 autocast, AdamW (fused), no dropout; {WARMUP_STEPS} steps discarded, {STEPS} "
        "measured in a process; order alternating",
        "",
        "| round | setting | tokens/s | page faults a step | peak memory, GB |",
        "|---|---|---|---|---|",
    ]
    for number, pair in enumerate(rows, 1):
        for name, row in zip(("glibc's default", "reuse"), pair, strict=True):
            lines.append(
                f"| {number} | {name} | {row['tokens_per_second']:,.0f} | "
                f"{row['page_faults']:,.0f} | {row['peak_gb']:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
