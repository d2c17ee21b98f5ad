"""``composer-gpt2 train``: how often ranks that fail are started again, and from where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from composer_gpt2.checkpoints import newest_batch

ROOT = Path(__file__).parent.parent
COMMAND = str(Path(sys.executable).with_name("composer-gpt2"))

FAULT = """
import os, signal
from composer import Callback

class Fault(Callback):
    def __init__(self, batch: int, times: int, kill: bool = False) -> None:
        self.batch, self.times, self.kill = batch, times, kill

    def batch_start(self, state, logger):
        if state.timestamp.batch.value != self.batch or os.environ["RANK"] != "0":
            return
        with open("faults.txt", "a+") as file:
            file.seek(0)
            if len(file.read()) >= self.times:
                return
            file.write(".")
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("no more juice")
"""


@pytest.fixture
def start(tiny_corpus, tmp_path, monkeypatch):
    """Starts the command in a folder with a recipe and a callback ``fault``, an entry point."""
    (tmp_path / "faulty.py").write_text(FAULT)
    about = tmp_path / "faulty-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[composer_gpt2.callbacks]\nfault = faulty:Fault\n")
    (tmp_path / "recipe.yaml").write_text(
        "model: {name: gpt-nano, dropout: 0.0}\n"
        f"data: {{remote: {tiny_corpus}, sequence_length: 64, validation_split: null}}\n"
        "train_batch_size: 2\n"
        "max_duration: 6ba\n"
        "precision: fp32\n"
        "device: cpu\n"
        "log_interval: 1ba\n"
        "save_interval: 2ba\n"
        "optimizer: {adamw: {lr: 1.0e-3, weight_decay: 0.1}}\n"
    )
    monkeypatch.chdir(tmp_path)

    def launch(n_ranks, *arguments):
        return subprocess.Popen(
            [COMMAND, "train", "-f", "recipe.yaml", "-n", str(n_ranks), *arguments],
            env={
                **os.environ,
                "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return launch


def test_a_run_that_fails_once_comes_to_its_end(start):
    fault = "callbacks.fault={batch: 4, times: 1}"
    run = start(2, fault, "--max-restarts", "3", "run_name=run")
    said, _ = run.communicate(timeout=250)
    assert run.returncode == 0, said
    assert "Rank 0 failed, exit status 1: RuntimeError: no more juice" in said
    assert "Going on from batch 4 in 1 s; restarts left after that: 2." in said
    assert said.count("batch 4 (") == 1
    assert said.count("batch 5 (") == 1
    assert newest_batch("runs/run/checkpoints") == 6


def test_a_run_that_fails_twice_at_one_place_is_given_up(start):
    fault = "callbacks.fault={batch: 3, times: 9, kill: true}"
    run = start(1, fault, "--max-restarts", "5", "autoresume=false", "run_name=run")
    said, _ = run.communicate(timeout=250)
    assert run.returncode == 128 + signal.SIGKILL, said
    assert said.count("The ranks ended with SIGKILL.") == 2
    assert "No checkpoint since the failure before that, still batch 2: giving up." in said
    assert Path("faults.txt").read_text() == ".."


def test_what_only_the_user_can_mend_is_not_tried_again(start):
    run = start(1, "--max-restarts", "5", "data.remote=/no/such/corpus")
    said, _ = run.communicate(timeout=250)
    assert run.returncode == 2, said
    assert said.count("1 mistake in the recipe") == 1
    assert "Going on" not in said


def test_a_signal_is_passed_on_and_no_rank_is_left(start):
    run = start(2, "--max-restarts", "5", "max_duration=1000ba", "run_name=run")
    assert run.stdout is not None
    said = ""
    while "batch 2 (" not in said:
        line = run.stdout.readline()
        assert line, said
        said += line
    below = psutil.Process(run.pid).children(recursive=True)
    run.terminate()
    rest, _ = run.communicate(timeout=250)
    assert run.returncode == 0, said + rest
    assert "Stopped by SIGTERM after batch" in rest
    assert "Traceback" not in rest
    assert newest_batch("runs/run/checkpoints") is not None
    assert not psutil.wait_procs(below, timeout=10)[1]
