"""Records which samples each batch held, in real runs, as a callback of another package.

In a test::

    environment = {**os.environ, **install(tmp_path / "package"), RECORDS: str(records)}
    ... callbacks.batch_recorder={} ...
    read_batches(records)
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from composer import Callback
from composer.utils import dist

__all__ = ["RECORDS", "BatchRecorder", "install", "read_batches", "read_events", "sample_id"]

RECORDS = "BATCH_RECORDS"
"""Environment variable: the folder to write to."""


class BatchRecorder(Callback):
    """Appends a line for each batch that was trained, and for the begin of each evaluation.

    Each process has a file of its own. A line is one ``write``, so a process that is killed leaves
    all that it has written.
    """

    def __init__(self) -> None:
        folder = Path(os.environ[RECORDS])
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns()}-rank{dist.get_global_rank()}.jsonl"
        self._file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def batch_start(self, state, logger):
        # Now: at the end of the batch it holds the last micro-batch.
        self._ids = [sample_id(tokens) for tokens in state.batch["input_ids"].numpy()]

    def batch_end(self, state, logger):
        now = state.timestamp
        self._write(kind="batch", epoch=now.epoch.value, batch=now.batch.value, ids=self._ids)

    def eval_start(self, state, logger):
        self._write(kind="evaluation", batch=state.timestamp.batch.value)

    def _write(self, **event) -> None:
        line = json.dumps({**event, "rank": dist.get_global_rank()}) + "\n"
        os.write(self._file, line.encode())


def sample_id(tokens) -> int:
    """Identifies a sample by its content, an int64 array of tokens."""
    return zlib.crc32(tokens.tobytes())


def install(folder: Path) -> dict[str, str]:
    """Makes ``callbacks.batch_recorder`` known to processes with this environment."""
    package = folder / "batch_recorder-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: batch-recorder\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[composer_gpt2.callbacks]\nbatch_recorder = batch_recorder:BatchRecorder\n"
    )
    here = Path(__file__).parent
    return {"PYTHONPATH": os.pathsep.join(map(str, (here.parent, here, folder)))}


def read_events(folder: Path, rank: int | None = None) -> Iterator[dict]:
    """All that processes have recorded below a folder; those of one rank."""
    for path in sorted(folder.rglob("*.jsonl" if rank is None else f"*-rank{rank}.jsonl")):
        for line in path.read_text().splitlines():
            yield json.loads(line)


def read_batches(folder: Path) -> dict[int, tuple[int, list[int]]]:
    """Number of a batch to its epoch and its samples, rank after rank.

    A batch that came after the last checkpoint is trained again after a restart. It must hold the
    same samples each time, on each rank; so it does not matter which time counts.
    """
    parts: dict[int, dict[int, tuple[int, list[int]]]] = {}
    for event in read_events(folder):
        if event["kind"] == "batch":
            part = (event["epoch"], event["ids"])
            before = parts.setdefault(event["batch"], {}).setdefault(event["rank"], part)
            assert before == part, f"batch {event['batch']} was {before}, then {part}"
    batches = {}
    for batch, ranks in sorted(parts.items()):
        (epoch,) = {epoch for epoch, _ in ranks.values()}
        batches[batch] = (epoch, [i for rank in sorted(ranks) for i in ranks[rank][1]])
    return batches
