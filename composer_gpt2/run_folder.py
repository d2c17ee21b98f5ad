"""What a run leaves beside its checkpoints so that it can be understood and repeated."""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from composer import State

from composer_gpt2.recipe import Recipe

__all__ = ["has_metrics", "run_lock", "versions", "write_metrics", "write_run_folder"]

_SECONDS_FOR_THE_LOCK = 10.0  # a run that was just killed may still be dying
_PACKAGES = (
    "composer-gpt2",
    "mosaicml",
    "mosaicml-streaming",
    "torch",
    "transformers",
    "tokenizers",
    "tiktoken",
    "numpy",
)


def write_run_folder(recipe: Recipe, n_ranks: int, receipts: Sequence[Mapping[str, Any]]) -> Path:
    """Writes what the run is made of into its folder.

    ``recipe.yaml``, ``command.txt``, ``versions.json``, and ``receipts.json``: what each algorithm
    changed, and the measurement that shows it.

    ``recipe.yaml`` is the resolved recipe. ``composer run.py -f`` with it and with
    ``run_name=another run_folder=null save_folder=null`` repeats the run.

    Args:
        recipe: A recipe with a run name.
        n_ranks: Processes that train together.
        receipts: As :func:`composer_gpt2.contract.receipts` has them.

    Returns:
        The folder.
    """
    assert recipe.run_folder is not None  # follows from the run's name
    folder = Path(recipe.run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    command = ["composer", "-n", str(n_ranks), *sys.argv]
    with (folder / "command.txt").open("a", encoding="utf-8") as file:  # a resumed run has several
        file.write(shlex.join(command) + "\n")
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
    (folder / "receipts.json").write_text(json.dumps(receipts, indent=2) + "\n", encoding="utf-8")
    return folder


@contextlib.contextmanager
def run_lock(recipe: Recipe) -> Iterator[None]:
    """Keeps other runs out of the run folder until the ``with`` block, or the process, ends.

    Raises:
        BlockingIOError: Another process trains there.
    """
    assert recipe.run_folder is not None
    folder = Path(recipe.run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("wb") as lock:
        deadline = time.monotonic() + _SECONDS_FOR_THE_LOCK
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise BlockingIOError(
                        f"one process may train in a run folder, but another is at work in "
                        f"{folder}; wait for it, stop it, or choose another run_name."
                    ) from error
                time.sleep(0.2)
        yield


def write_metrics(recipe: Recipe, state: State) -> None:
    """Writes ``metrics.json``: how far the run has come, and its last values."""
    evaluated = state.eval_metric_values
    metrics = {
        "batches": state.timestamp.batch.value,
        "tokens": state.timestamp.token.value,
        "seconds": state.timestamp.total_wct.total_seconds(),
        "train": {name: float(value) for name, value in state.train_metric_values.items()},
        **(
            {"eval": {name: float(value) for name, value in evaluated.items()}} if evaluated else {}
        ),
    }
    path = _metrics_file(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)  # a new machine
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def has_metrics(recipe: Recipe) -> bool:
    """Whether ``metrics.json`` is there: the run has come to its end, the last evaluation too."""
    return _metrics_file(recipe).exists()


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a run's numbers, and our commit if known."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"  # ours, when it runs from a checkout
    found["commit"] = _commit()
    return found


def _metrics_file(recipe: Recipe) -> Path:
    assert recipe.run_folder is not None
    return Path(recipe.run_folder) / "metrics.json"


def _commit() -> str:
    """The checkout's commit, with ``+changes`` if files differ from it; ``unknown`` outside one."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return "unknown"
    described = subprocess.run(
        ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty=+changes"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"
