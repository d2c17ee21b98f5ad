"""What the projects to learn with reach: each is trained from several seeds and tested.

    python benchmarks/projects.py --hardware 2cpu --text tinyshakespeare.txt

Writes ``benchmarks/projects_<hardware>_<yyyymm>.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("composer-gpt2"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hardware", required=True, help="in the name of the file: 2cpu")
    parser.add_argument("--text", required=True, help="tinyshakespeare")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", default="runs/benchmark-projects")
    parser.add_argument("overrides", nargs="*", help="of the recipe of characters")
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = ["--text", str(Path(arguments.text).resolve())]
    lines = []
    for name, options in (("adder", []), ("sorter", []), ("characters", text)):
        overrides = arguments.overrides if name == "characters" else []
        runs = [run(name, seed, options, overrides, folder) for seed in range(arguments.seeds)]
        for seed, (seconds, loss, right) in enumerate(runs):
            lines.append(f"| {name} | {seed} | {seconds:.0f} | {loss:.4f} | {right or ''} |")
        losses = [loss for _, loss, _ in runs]
        spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        mean = statistics.mean(losses)
        lines.append(f"| **{name}** | mean (deviation) | | {mean:.4f} ({spread:.4f}) | |")
    out = Path(__file__).with_name(f"projects_{arguments.hardware}_{datetime.date.today():%Y%m}.md")
    out.write_text(report(arguments, lines))
    print(out.read_text())


def run(
    name: str, seed: int, options: list[str], overrides: list[str], folder: Path
) -> tuple[float, float, str | None]:
    """Seconds with everything, validation loss in nats a token, and "498 of 500"."""
    start = time.monotonic()
    finished = subprocess.run(
        [COMMAND, "project", name, *options, f"seed={seed}", *overrides],
        cwd=folder,
        text=True,
        check=True,
        stdout=subprocess.PIPE,
    )
    seconds = time.monotonic() - start
    run_folder = re.search(r"The run is in (\S+);", finished.stdout)
    assert run_folder is not None
    metrics = json.loads((folder / run_folder[1] / "metrics.json").read_text())
    right = re.search(r"(\d+ of \d+) right", finished.stdout)
    return seconds, metrics["eval"]["LanguageCrossEntropy"], right and right[1]


def report(arguments: argparse.Namespace, lines: list[str]) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("mosaicml", "torch"))
    command = f"python benchmarks/projects.py --hardware {arguments.hardware} --text ..."
    return "\n".join(
        [
            f"# Projects to learn with, {arguments.hardware}, {datetime.date.today():%Y-%m-%d}",
            "",
            f"Commit {commit}; `{' '.join([command, *arguments.overrides])}`; {versions}, Python "
            f"{platform.python_version()}; {len(os.sched_getaffinity(0))} CPU cores. Seconds are "
            "of the whole command (data, start, training, test). The loss is that of the "
            "validation split, in nats a token.",
            "",
            "| project | seed | seconds | validation loss | right |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
