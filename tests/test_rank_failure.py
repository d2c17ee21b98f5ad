"""Ranks that fail in each way a rank can: the run ends everywhere, and says why, once and last."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPOSER = str(Path(sys.executable).with_name("composer"))

FAULTY = """
import os, signal, sys, time
from composer import Callback
from composer.utils import dist
from composer_gpt2 import train as program

class Fault(Callback):
    def batch_start(self, state, logger):
        if state.timestamp.batch.value == 2 and dist.get_global_rank() == int(os.environ["RANK_"]):
            print(f"fault at {time.time()}", flush=True)
            if os.environ["FAULT"] == "raise":
                raise KeyError("the flux capacitor")
            if os.environ["FAULT"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while True:
                time.sleep(1)

build = program.build_trainer

def build_with_fault(recipe):
    trainer = build(recipe)
    trainer.state.callbacks.append(Fault())
    return trainer

program.build_trainer = build_with_fault
if __name__ == "__main__":
    sys.exit(program.main())
"""


@pytest.fixture
def run(tiny_corpus, tmp_path):
    """Two ranks, one of which has a fault; exit status, what was said, seconds from the fault."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "recipe.yaml").write_text(
        "model: {name: gpt-nano, dropout: 0.0}\n"
        f"data: {{remote: {tiny_corpus}, sequence_length: 64, validation_split: null}}\n"
        "train_batch_size: 4\n"
        "max_duration: 1000ba\n"
        "precision: fp32\n"
        "device: cpu\n"
        "save_interval: null\n"
        "optimizer: {adamw: {lr: 1.0e-3, weight_decay: 0.1}}\n"
    )

    def launch(fault, rank, *overrides):
        out = tmp_path / "rank{rank}.txt"
        finished = subprocess.run(
            [COMPOSER, "-n", "2", "--stdout", str(out), "faulty.py", "-f", "recipe.yaml"]
            + list(overrides),
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "FAULT": fault,
                "RANK_": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=250,
            check=False,
        )
        said = finished.stdout
        told = said if rank == 0 else (tmp_path / "rank1.txt").read_text()
        began = float(told.split("fault at ")[1].split()[0])
        return finished.returncode, said, time.time() - began

    return launch


@pytest.mark.parametrize("rank", [0, 1])
def test_the_traceback_of_the_rank_that_raised_comes_once_and_last(run, rank):
    status, said, seconds = run("raise", rank)
    assert status == 1, said
    assert seconds < 30
    assert said.count("Traceback") == 1, said
    assert "KeyError: 'the flux capacitor'" in said
    after = said.split("KeyError: 'the flux capacitor'\n")[1]
    launchers = ("ERROR:composer.cli.launcher:", "Waiting up to 30 seconds", "Global rank 0 (PID")
    assert all(line.startswith(launchers) for line in after.splitlines()), said
    assert "closed by peer" not in said


def test_a_killed_rank_is_named(run):
    status, said, seconds = run("kill", 1)
    assert status == 1, said
    assert seconds < 30
    assert said.count("Rank 1 has ended without a word") == 1, said
    assert "Rank 1 crashed with exit code -9" in said
    assert "Traceback" not in said


def test_without_rank_0_the_others_say_so(run):
    status, said, seconds = run("kill", 0)
    assert status == 256 - 9, said
    assert seconds < 30
    assert said.count("Rank 0 has ended without a word") == 1, said
    assert "Traceback" not in said


def test_a_hanging_rank_is_named_and_where_it_hangs(run):
    status, said, seconds = run("hang", 1, "dist_timeout=5")
    assert status == 1, said
    assert seconds < 30
    assert "Rank 1 was at:" in said
    assert "in batch_start\n    time.sleep(1)" in said
    assert "Rank 0 gave up waiting for rank 1 (dist_timeout)." in said
    assert said.count("Traceback") == 1, said
