"""Signals sent to real processes: what is saved, how they end, and how they go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from composer_gpt2.checkpoints import newest_batch
from composer_gpt2.stop_signals import StopSignals

ROOT = Path(__file__).parent.parent
COMPOSER = str(Path(sys.executable).with_name("composer"))
TRAIN = ["-m", "composer_gpt2.train", "-f", "recipe.yaml"]


@pytest.fixture
def folder(tiny_corpus, tmp_path, monkeypatch) -> Path:
    """A working folder with a recipe that draws random numbers in training."""
    (tmp_path / "recipe.yaml").write_text(
        "model: {name: gpt-nano, dropout: 0.1}\n"
        f"data: {{remote: {tiny_corpus}, sequence_length: 64}}\n"
        "train_batch_size: 4\n"
        "eval_batch_size: 2\n"
        "max_duration: 1000ba\n"
        "precision: fp32\n"
        "device: cpu\n"
        "log_interval: 1ba\n"
        "run_name: run\n"
        "optimizer: {adamw: {lr: 1.0e-3, weight_decay: 0.1}}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


class Run:
    """A command in a process group of its own; what it says can be waited for."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.said = ""

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if text in line:
                return
        raise AssertionError(f"{text!r} was not said in:\n{self.said}")

    @property
    def ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return sorted(children, key=lambda child: int(child.environ()["RANK"]))

    def end(self) -> int:
        rest, _ = self.process.communicate(timeout=120)
        self.said += rest
        return self.process.returncode


def test_a_signal_to_one_rank_saves_and_stops_all(folder):
    run = Run(COMPOSER, "-n", "2", *TRAIN, "data.validation_split=null")
    run.wait_for("batch 2 ")
    run.ranks[1].terminate()
    assert run.end() == 0, run.said
    batch = newest_batch("runs/run/checkpoints")
    assert batch is not None
    assert f"Stopped by SIGTERM after batch {batch}, which is saved" in run.said
    assert "the same command goes on from there" in run.said


def test_ctrl_c_and_the_sigterm_of_the_launcher_are_one_request(folder):
    run = Run(COMPOSER, "-n", "2", *TRAIN, "data.validation_split=null")
    run.wait_for("batch 2 ")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == 0, run.said
    assert "Stopped by SIGINT after batch" in run.said
    assert newest_batch("runs/run/checkpoints") is not None


def test_ranks_save_and_stop_when_the_launcher_is_killed(folder):
    run = Run(COMPOSER, "-n", "2", *TRAIN, "data.validation_split=null")
    run.wait_for("batch 2 ")
    ranks = run.ranks
    run.process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    run.end()
    assert "Stopped by the end of the launcher after batch" in run.said
    assert newest_batch("runs/run/checkpoints") is not None


def test_a_run_stopped_in_an_evaluation_ends_with_the_weights_of_one_that_was_not(folder):
    command = [sys.executable, *TRAIN, "max_duration=6ba", "eval_interval=2ba"]
    whole = Run(*command, "run_name=whole")
    assert whole.end() == 0, whole.said
    stopped = Run(*command)
    stopped.wait_for("batch 2 ")  # the evaluation begins: 23 batches
    stopped.process.terminate()
    assert stopped.end() == 0, stopped.said
    assert "Stopped by SIGTERM after batch 2" in stopped.said
    assert "evaluation at batch 2" not in stopped.said
    resumed = Run(*command)
    assert resumed.end() == 0, resumed.said
    assert "batch 3 " in resumed.said
    assert "batch 2 " not in resumed.said
    weights = [
        load_file(next(Path(f"runs/{name}/checkpoints").glob("*-ba6-rank0.safetensors")))
        for name in ("whole", "run")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


BLOCKED = """
import datetime, sys
from torch.distributed import HashStore
from composer_gpt2.stop_signals import StopSignals
with StopSignals() as signals:
    signals.waits_for_batch = sys.argv[1] == "training"
    print("ready", flush=True)
    HashStore().wait(["never set"], datetime.timedelta(seconds=60))  # no Python handler runs here
"""


def test_a_second_signal_ends_a_rank_at_once_that_waits_for_others():
    run = Run(sys.executable, "-c", BLOCKED, "training")
    run.wait_for("ready")
    run.process.send_signal(signal.SIGINT)
    run.wait_for("SIGINT: stopping after this batch")
    run.process.send_signal(signal.SIGTERM)  # the launcher's, for the same Ctrl-C
    time.sleep(1)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    assert "stopped at once" in run.said


def test_before_training_a_signal_ends_a_run_at_once():
    run = Run(sys.executable, "-c", BLOCKED, "starting")
    run.wait_for("ready")
    run.process.terminate()
    assert run.end() == 0
    assert "after this batch" not in run.said


def test_handlers_are_those_of_before_afterwards():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        assert signals.received is None
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_loader_process_survives_ctrl_c_and_tells_nobody():
    with StopSignals() as signals:
        signals.waits_for_batch = True
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert signals.received is None
