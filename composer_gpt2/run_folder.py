"""What a run leaves beside its checkpoints so that it can be understood and repeated."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from composer import State

from composer_gpt2.recipe import Recipe

__all__ = ["versions", "write_metrics", "write_run_folder"]

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


def write_metrics(recipe: Recipe, state: State) -> None:
    """Writes ``metrics.json``: how far the run has come, and its last values."""
    assert recipe.run_folder is not None
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
    path = Path(recipe.run_folder) / "metrics.json"
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


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
