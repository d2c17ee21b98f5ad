"""How fast does ``StreamingTokens`` yield batches from a folder, against a plain numpy memmap?

All read the same tokens in the same process, in turns, and yield the same int64 batches in the same
order. mosaicml-streaming's own ``StreamingDataset`` (with our collate) shows what the checks cost.

    python benchmarks/streaming_read.py --hardware 2cpu
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

from composer_gpt2.data.streaming import StreamingTokens, build_token_dataloader
from composer_gpt2.tokenizer import RANKS_SHA256, VOCAB_SIZE

N_WARM_UP_ROUNDS = 1  # page cache, first allocations; not reported


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the reading of shards.")
    parser.add_argument("--samples", type=int, default=20_000, help="sequences in the corpus")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens in each")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences in a batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hardware", default=f"{len(os.sched_getaffinity(0))}cpu")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error(f"--rounds must be at least 5, got {arguments.rounds}")

    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), arguments.samples, arguments.sequence_length)
        readers = make_readers(folder, arguments.sequence_length, arguments.batch_size)
        n_tokens = arguments.samples * arguments.sequence_length
        rounds: list[dict[str, float]] = []
        for number in range(N_WARM_UP_ROUNDS + arguments.rounds):
            speeds, checksums = {}, set()
            names = list(readers)
            # Another one comes first in each round.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                start, checksum = time.perf_counter(), 0
                for batch in readers[name]():
                    checksum += int(batch["input_ids"][:, 0].sum())
                speeds[name] = n_tokens / (time.perf_counter() - start) / 1e6
                checksums.add(checksum)
            assert len(checksums) == 1, "they did not read the same tokens"
            if number >= N_WARM_UP_ROUNDS:
                rounds.append({name: speeds[name] for name in readers})
                print(", ".join(f"{name} {speed:.1f}" for name, speed in rounds[-1].items()))

    month = datetime.now(timezone.utc).strftime("%Y%m")
    path = Path(__file__).with_name(f"streaming_read_{arguments.hardware}_{month}.md")
    path.write_text(describe(arguments, rounds))
    print(path.read_text())


def write_corpus(folder: Path, n_samples: int, sequence_length: int) -> None:
    """The same random tokens as shards, ``train/``, and as one array, ``tokens.npy``."""
    generator = np.random.default_rng(17)
    tokens = generator.integers(VOCAB_SIZE, size=(n_samples, sequence_length), dtype=np.uint16)
    np.save(folder / "tokens.npy", tokens)
    columns = {"tokens": f"ndarray:uint16:{sequence_length}"}
    with MDSWriter(out=str(folder / "train"), columns=columns, hashes=["xxh64"]) as writer:
        for sample in tokens:
            writer.write({"tokens": sample})
    description = {
        "sequence_length": sequence_length,
        "dtype": "uint16",
        "tokenizer": {"name": "gpt2", "ranks_sha256": RANKS_SHA256},
    }
    (folder / "corpus.json").write_text(json.dumps(description))


def make_readers(
    folder: str, sequence_length: int, batch_size: int
) -> dict[str, Callable[[], Iterable[Mapping[str, torch.Tensor]]]]:
    """Each reads the corpus once, in order, when it is called."""
    ours = StreamingTokens(remote=folder, sequence_length=sequence_length, batch_size=batch_size)
    theirs = StreamingDataset(
        local=folder, split="train", batch_size=batch_size, num_canonical_nodes=1
    )

    def collate(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        stacked = np.stack([sample["tokens"] for sample in samples]).astype(np.int64)
        return {"input_ids": torch.from_numpy(stacked)}

    def memmap() -> Iterable[dict[str, torch.Tensor]]:
        tokens = np.load(Path(folder, "tokens.npy"), mmap_mode="r")
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size].astype(np.int64)
            yield {"input_ids": torch.from_numpy(batch)}

    return {
        "StreamingTokens": lambda: build_token_dataloader(ours),
        "StreamingTokens, 1 worker": lambda: build_token_dataloader(ours, num_workers=1),
        "StreamingTokens, 2 workers": lambda: build_token_dataloader(ours, num_workers=2),
        "StreamingDataset": lambda: StreamingDataLoader(
            theirs, batch_size=batch_size, collate_fn=collate
        ),
        "memmap": memmap,
    }


def describe(arguments: argparse.Namespace, rounds: list[dict[str, float]]) -> str:
    """The result file: what was run, on what, and every value."""
    names = list(rounds[0])
    means = {name: statistics.mean(round_[name] for round_ in rounds) for name in names}
    deviations = {name: statistics.stdev(round_[name] for round_ in rounds) for name in names}
    rows = [*enumerate(rounds, 1), ("mean", means), ("standard deviation", deviations)]
    table = "\n".join(
        f"| {label} | " + " | ".join(f"{values[name]:.2f}" for name in names) + " |"
        for label, values in rows
    )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = ("mosaicml-streaming", "torch", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"""# Reading shards from a folder: {arguments.hardware}

`StreamingTokens` yields **{means["StreamingTokens"]:.1f} M tokens/s** in the process itself (the
default), {means["StreamingTokens, 2 workers"]:.1f} from two workers; a numpy memmap
{means["memmap"]:.1f}, `StreamingDataset` without our checks {means["StreamingDataset"]:.1f}.

- Command: `python benchmarks/streaming_read.py --samples {arguments.samples}
  --sequence-length {arguments.sequence_length} --batch-size {arguments.batch_size}
  --rounds {len(rounds)} --hardware {arguments.hardware}`
- Commit: {commit or "before the first commit"}; {datetime.now(timezone.utc):%Y-%m-%d}
- Machine: {len(os.sched_getaffinity(0))} CPU cores; load average {os.getloadavg()[0]:.1f} at the
  end, this program included
- Versions: Python {platform.python_version()}, {versions}
- {N_WARM_UP_ROUNDS} round to warm up, discarded; in each round one epoch of each, in turns;
  files in the page cache; starting the workers is in their time

All in millions of tokens per second:

| round | {" | ".join(names)} |
|---|{"---|" * len(names)}
{table}
"""


if __name__ == "__main__":
    main()
