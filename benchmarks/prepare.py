"""How fast is ``prepare``, measured against tiktoken's own ``encode_ordinary_batch``?

Both run in this process, in turns, with the same number of threads on the same text. tiktoken gets
the documents as a list of strings in memory and returns lists of integers. ``prepare`` reads and
parses the jsonl file, chooses splits, tokenizes, and leaves finished shards with hashes on disk.

    python benchmarks/prepare.py CORPUS.jsonl... --repeat 20 --threads 2 --hardware 2cpu
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from composer_gpt2.data import prepare
from composer_gpt2.tokenizer import get_encoding

N_WARM_UP_ROUNDS = 1  # imports, page cache, first allocation; not reported


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures prepare() against tiktoken.")
    parser.add_argument("corpus", nargs="+", type=Path, help="jsonl files")
    parser.add_argument("--repeat", type=int, default=20, help="times that the corpus is taken")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hardware", default=f"{len(os.sched_getaffinity(0))}cpu")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error(f"--rounds must be at least 5, got {arguments.rounds}")

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "corpus.jsonl"), Path(folder, "out")
        lines = b"".join(path.read_bytes() for path in arguments.corpus).splitlines()
        source.write_bytes(b"".join(line + b"\n" for line in lines * arguments.repeat))
        texts = [json.loads(line)["text"] for line in lines] * arguments.repeat

        def run_ours() -> int:
            corpus = prepare(
                [str(source)],
                str(out),
                validation_fraction=0.01,
                num_threads=arguments.threads,
                progress=False,
            )
            shutil.rmtree(out)
            splits = corpus["splits"].values()
            return sum(split["tokens"] - split["documents"] for split in splits)

        def run_tiktoken() -> int:
            batch = get_encoding().encode_ordinary_batch(texts, num_threads=arguments.threads)
            return sum(map(len, batch))

        rounds: list[tuple[float, ...]] = []
        for number in range(N_WARM_UP_ROUNDS + arguments.rounds):
            # Turns in both orders, so that neither always comes when the machine is warm.
            order = [run_ours, run_tiktoken][:: 1 if number % 2 else -1]
            speeds, cpu_seconds = {}, {}
            for run in order:
                start, cpu_start = time.perf_counter(), time.process_time()
                n_tokens = run()
                speeds[run] = n_tokens / (time.perf_counter() - start) / 1e6
                cpu_seconds[run] = time.process_time() - cpu_start
            if number >= N_WARM_UP_ROUNDS:
                ours, theirs = speeds[run_ours], speeds[run_tiktoken]
                cpu = cpu_seconds[run_ours], cpu_seconds[run_tiktoken]
                rounds.append((ours, theirs, ours / theirs, *cpu))
                print(f"prepare {ours:.2f}, tiktoken {theirs:.2f} M tokens/s")
        assert run_ours() == run_tiktoken() == n_tokens

    report = describe(arguments, len(texts), n_tokens, rounds)
    month = datetime.now(timezone.utc).strftime("%Y%m")
    path = Path(__file__).with_name(f"prepare_{arguments.hardware}_{month}.md")
    path.write_text(report)
    print(report)


def describe(
    arguments: argparse.Namespace,
    n_documents: int,
    n_tokens: int,
    rounds: list[tuple[float, ...]],
) -> str:
    """The result file: what was run, on what, and every value."""
    columns = list(zip(*rounds, strict=True))
    means = [statistics.mean(column) for column in columns]
    deviations = [statistics.stdev(column) for column in columns]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    corpus = " ".join(path.name for path in arguments.corpus)
    rows = [*enumerate(rounds, 1), ("mean", means), ("standard deviation", deviations)]
    table = "\n".join(
        f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |"
        for name, values in rows
    )
    packages = ("tiktoken", "mosaicml-streaming", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"""# Preparing a corpus: {arguments.hardware}, {arguments.threads} threads

`prepare` runs at **{means[2]:.2f}** of the speed of tiktoken's `encode_ordinary_batch`
(standard deviation {deviations[2]:.2f}, {len(rounds)} rounds; at least 0.80 is asked for).
Reading and parsing jsonl, hashing and writing shards are in our time and not in tiktoken's.
In CPU seconds, which other programs on the machine disturb less, it takes {means[3] / means[4]:.2f}
times as many.

- Command: `python benchmarks/prepare.py {corpus} --repeat {arguments.repeat}
  --threads {arguments.threads} --rounds {len(rounds)} --hardware {arguments.hardware}`
- Text: {n_documents:,} documents, {n_tokens:,} tokens (the file(s) {arguments.repeat} times over)
- Commit: {commit or "before the first commit"}; {datetime.now(timezone.utc):%Y-%m-%d}
- Machine: {len(os.sched_getaffinity(0))} CPU cores; load average {os.getloadavg()[0]:.1f} at the
  end, this program's own {arguments.threads} threads included
- Versions: Python {platform.python_version()}, {versions}
- {N_WARM_UP_ROUNDS} round to warm up, discarded; in each round one run of each, order alternating

| round | prepare, M tokens/s | tiktoken, M tokens/s | ratio | prepare, CPU s | tiktoken, CPU s |
|---|---|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    sys.exit(main())
