"""Where the time goes from ``composer run.py`` to the end of the first batch.

Each run is a process of its own, started by the ``composer`` launcher as ``run.py`` is, with
stopwatches around the parts of ``composer_gpt2.train``. The corpus is a folder, no checkpoint is
written, and nothing is evaluated. A first run fills the caches (files, Python's bytecode, which
installers like pip compile) and is not reported.

    python benchmarks/start.py --hardware 2cpu

``--against FOLDER`` alternates with another checkout, such as that of an earlier commit.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PHASES = {
    "launcher": "`composer` imports Composer and starts the rank",
    "imports": "the rank imports torch, Composer and us",
    "recipe": "read and checked",
    "data": "the shards are found and checked, the loader is built",
    "model": "initialised, with its tokenizer",
    "trainer": "optimizer, Trainer, the run's record, up to the first batch",
    "first batch": "forward, backward, optimizer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="gpt2-125m-fast")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout, to compare with")
    parser.add_argument("--hardware", required=True)
    arguments = parser.parse_args()
    trees = {"this": ROOT} | ({"against": arguments.against.resolve()} if arguments.against else {})
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder, "corpus"), arguments.sequence_length, 2 * arguments.batch_size)
        for number in range(arguments.rounds + 1):
            order = list(trees) if number % 2 == 0 else list(reversed(trees))
            result = {name: run(arguments, trees[name], Path(folder)) for name in order}
            if number > 0:
                rounds.append({name: result[name] for name in trees})
                seconds = {name: f"{sum(result[name].values()):.1f} s" for name in trees}
                print(f"round {number}: {seconds}", flush=True)
    path = Path(__file__).with_name(f"start_{arguments.hardware}_{date.today():%Y%m}.md")
    path.write_text(report(arguments, rounds), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


def write_corpus(folder: Path, sequence_length: int, n_sequences: int) -> None:
    """Random tokens as ``composer-gpt2 prepare`` leaves a corpus."""
    import numpy as np
    from streaming import MDSWriter

    from composer_gpt2.tokenizer import RANKS_SHA256, VOCAB_SIZE

    folder.mkdir()
    tokens = np.random.default_rng(17).integers(VOCAB_SIZE, size=(n_sequences, sequence_length))
    columns = {"tokens": f"ndarray:uint16:{sequence_length}"}
    with MDSWriter(out=str(folder / "train"), columns=columns, hashes=["xxh64"]) as writer:
        for sequence in tokens.astype(np.uint16):
            writer.write({"tokens": sequence})
    tokenizer = {"name": "gpt2", "ranks_sha256": RANKS_SHA256}
    description = {"sequence_length": sequence_length, "dtype": "uint16", "tokenizer": tokenizer}
    (folder / "corpus.json").write_text(json.dumps(description), encoding="utf-8")


def run(arguments: argparse.Namespace, tree: Path, folder: Path) -> dict[str, float]:
    """Seconds of each phase of one run with the code of ``tree``."""
    launcher = str(Path(sys.executable).with_name("composer"))
    command = [launcher, "-n", "1", str(Path(__file__).resolve()), *settings(arguments, folder)]
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        "PYTHONDONTWRITEBYTECODE": "",
        "START_TIMES": str(folder / "times.json"),
        "START_BEGAN": str(time.time()),
    }
    finished = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if finished.returncode != 0:
        sys.exit(f"the run failed:\n{finished.stdout}\n{finished.stderr}")
    return json.loads((folder / "times.json").read_text(encoding="utf-8"))


def settings(arguments: argparse.Namespace, folder: Path) -> list[str]:
    return [
        *("-f", f"yamls/{arguments.recipe}.yaml"),
        f"data.remote={folder}/corpus",
        "data.validation_split=null",
        f"data.sequence_length={arguments.sequence_length}",
        "model.dropout=0.0",
        f"train_batch_size={arguments.batch_size}",
        f"device_train_microbatch_size={arguments.batch_size}",
        "max_duration=1ba",
        "save_interval=null",
        "schedulers.cosine_decay_with_warmup=null",
        "schedulers.constant={}",
        f"run_folder={folder}/run",
    ]


# --- In the rank ---------------------------------------------------------------------------------


def train_with_stopwatches() -> int:
    """What ``run.py`` does, with the times written down."""
    marks = {"launcher": float(os.environ["START_BEGAN"]), "imports": time.time()}
    # As in run.py; an earlier checkout's had no such line.
    collects = "gc.disable()" not in Path("run.py").read_text(encoding="utf-8")
    if not collects:
        gc.disable()
    from composer import Callback, Trainer

    from composer_gpt2 import build, train

    if not collects:
        gc.enable()
        gc.freeze()
    marks["recipe"] = time.time()

    def mark_start(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            marks.setdefault(phase, time.time())
            return function(*arguments, **named)

        return timed

    class Ends(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            marks.setdefault("first batch", time.time())

        def batch_end(self, state: Any, logger: Any) -> None:
            marks.setdefault("end", time.time())

    def fit(trainer: Trainer) -> None:
        trainer.state.callbacks.append(Ends())
        fit_as_ever(trainer)

    fit_as_ever, Trainer.fit = Trainer.fit, fit  # type: ignore[assignment]
    train.build_trainer = mark_start("data", train.build_trainer)
    build.build_model = mark_start("model", build.build_model)
    build.build_optimizer = mark_start("trainer", build.build_optimizer)
    status = train.main()
    if status != 0:
        return status
    times = [marks[phase] for phase in (*PHASES, "end")]
    seconds = [end - start for start, end in itertools.pairwise(times)]
    Path(os.environ["START_TIMES"]).write_text(
        json.dumps(dict(zip(PHASES, seconds, strict=True))), encoding="utf-8"
    )
    return status


# --- Report --------------------------------------------------------------------------------------


def report(arguments: argparse.Namespace, rounds: list[dict[str, dict[str, float]]]) -> str:
    from composer_gpt2.run_folder import versions

    found = versions()
    trees = list(rounds[0])
    totals = {tree: [sum(round_[tree].values()) for round_ in rounds] for tree in trees}
    command = " ".join(
        f"--{name} {value}"
        for name, value in (
            ("recipe", arguments.recipe),
            ("batch-size", arguments.batch_size),
            ("sequence-length", arguments.sequence_length),
            ("rounds", arguments.rounds),
            ("hardware", arguments.hardware),
        )
    )
    lines = [
        f"# From `composer run.py` to the end of the first batch: {arguments.hardware}",
        "",
        f"{arguments.recipe}, {arguments.batch_size} x {arguments.sequence_length} tokens: "
        f"**{statistics.median(totals['this']):.1f} s** (median of {len(rounds)} runs, "
        f"{min(totals['this']):.1f} to {max(totals['this']):.1f})"
        + (
            f"; before, {statistics.median(totals['against']):.1f} s "
            f"({min(totals['against']):.1f} to {max(totals['against']):.1f})."
            if "against" in trees
            else "."
        ),
        "",
        f"- Command: `python benchmarks/start.py {command}"
        + (" --against A_COPY_OF_AN_EARLIER_COMMIT`" if "against" in trees else "`"),
        f"- {date.today()}, commit {found['commit']}, torch {found['torch']}, mosaicml "
        f"{found['mosaicml']}, transformers {metadata.version('transformers')}, Python "
        f"{found['python']}, {len(os.sched_getaffinity(0))} cores, load average "
        f"{os.getloadavg()[0]:.1f} at the end",
        "- No dropout, bfloat16 autocast, shards in a folder, no evaluation, no checkpoint; one "
        "run discarded, which fills the caches of files and bytecode; order alternating",
        "",
        "Seconds, medians with the extremes of all runs:",
        "",
        "| phase | what happens | " + " | ".join(NAMES[tree] for tree in trees) + " |",
        "|---|---|" + "---|" * len(trees),
    ]
    for phase, what in PHASES.items():
        cells = [spread([round_[tree][phase] for round_ in rounds]) for tree in trees]
        lines.append(f"| {phase} | {what} | " + " | ".join(cells) + " |")
    cells = [spread(totals[tree]) for tree in trees]
    lines.append("| **all** | | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


NAMES = {"this": "now", "against": "before"}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    if "START_TIMES" in os.environ:
        sys.exit(train_with_stopwatches())
    main()
