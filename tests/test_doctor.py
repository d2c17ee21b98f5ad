"""The doctor finds each fault that it looks for, in a real run, and nothing in a sound one."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from composer_gpt2 import cli, tokenizer
from composer_gpt2 import doctor as doctor_module
from composer_gpt2.data.local_s3 import local_s3_server
from composer_gpt2.doctor import Finding, doctor

ROOT = Path(__file__).parent.parent
RECIPE = """\
model: {{name: gpt-nano, n_positions: 64}}
data: {{remote: {corpus}, sequence_length: 64}}
train_batch_size: 2
eval_subset_num_batches: 1
max_duration: 2ba
optimizer: {{adamw: {{lr: 1.0e-3, weight_decay: 0.1}}}}
precision: fp32
device: cpu
save_interval: 1ba
save_num_checkpoints_to_keep: 2
"""


@pytest.fixture(scope="module")
def trained(tiny_corpus, tmp_path_factory) -> Path:
    """A run folder in which two batches were trained."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(RECIPE.format(corpus=tiny_corpus))
    finished = subprocess.run(
        [sys.executable, "-m", "composer_gpt2.train", "-f", "recipe.yaml", "run_name=sound"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return folder / "runs" / "sound"


@pytest.fixture
def run(trained, tmp_path) -> str:
    """A copy, in another place than its recipe says."""
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return str(tmp_path / "run")


def findings(*arguments, status="PROBLEM", **options) -> dict[str, str]:
    """Topic to text of all findings of a status."""
    found = [f for f in doctor(*arguments, **options) if f.status == status]
    return {f.topic: f.text for f in found}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")
    }


def test_a_sound_run_has_no_problem_and_nothing_is_changed(run, tmp_path, tiny_corpus, capsys):
    before = snapshot(tmp_path) | snapshot(Path(tiny_corpus))
    with pytest.raises(SystemExit) as exit_status:
        cli.app(["doctor", run, "--verify"], standalone_mode=False)
    said = capsys.readouterr().out
    assert exit_status.value.code in (0, None), said
    assert "PROBLEM" not in said
    for part in (
        "ok       recipe         is sound; the run is sound",
        "corpus/train: ",
        "every shard of",
        "ep0-ba2 is whole and runs no code",
        f"nobody trains in {run}",
        "the rank table has its published hash",
    ):
        assert part in said, part
    assert snapshot(tmp_path) | snapshot(Path(tiny_corpus)) == before


def test_a_machine_alone():
    found = list(doctor())
    assert {f.topic for f in found} >= {"versions", "gpu", "cpu", "memory", "tokenizer"}
    assert not {f.topic for f in found} & {"recipe", "corpus", "checkpoint"}


def test_a_problem_is_the_exit_status(run, capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.app(["doctor", run, "model.name=gpt-nanoo"], standalone_mode=False)
    assert exit_status.value.code == 1
    assert "did you mean 'gpt-nano'?" in capsys.readouterr().out


def test_no_run_folder(tmp_path):
    assert "readable file" in findings(str(tmp_path / "nothing"))["recipe"]


def test_a_check_that_fails_itself_is_a_finding_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(doctor_module.os, "sysconf", lambda name: 1 // 0)
    found = list(doctor())
    assert Finding("PROBLEM", "memory", found[3].text) == found[3]
    assert "cannot be checked: ZeroDivisionError" in found[3].text
    assert found[-1].topic == "tokenizer"


def test_another_version(monkeypatch):
    original = metadata.version
    versions = {"torch": "2.1.0"}
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or original(name))
    text = findings()["versions"]
    assert text.startswith("torch must be <2.7.1,>=2.6.0, got 2.1.0; pip install 'torch")


def test_a_damaged_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "r50k_base.tiktoken").write_bytes(b"IQ== 0\n")
    tokenizer._load_ranks.cache_clear()
    tokenizer.get_encoding.cache_clear()
    monkeypatch.setattr(tokenizer.resources, "files", lambda package: tmp_path)
    assert "is damaged; install the package again" in findings()["tokenizer"]


def test_few_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        assert "must be allowed 1024, got 512; run ulimit -n 1024" in findings()["open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_model_that_does_not_fit_in_memory(run):
    found = findings(None, [f"{run}/recipe.yaml"], ["model.n_layer=1000", "model.n_embd=12288"])
    assert "choose a smaller model" in found["memory"]


def test_a_recipe_for_a_gpu_without_one(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "device: gpu, but torch finds none" in findings(run, (), ["device=gpu"])["gpu"]


@pytest.fixture
def little_room(monkeypatch):
    """What the system answers for a folder that is nearly full."""

    def fill(name: str, free: int) -> None:
        original = shutil.disk_usage

        def disk_usage(path):
            usage = original(path)
            return usage._replace(free=free) if name in str(path) else usage

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)

    return fill


def test_a_full_disk(run, little_room):
    little_room("checkpoints", 1_000_000)
    assert "the next checkpoint takes" in findings(run)["disk"]


def test_little_shared_memory(run, little_room):
    little_room("shm", 1_000_000)
    assert "got 1.0 MB; make it larger" in findings(run)["shared memory"]


def test_segments_of_a_dead_run(tmp_path, monkeypatch):
    # Not the real place: a run that starts meanwhile would, rightly, clean it.
    monkeypatch.setattr("composer_gpt2.data.shared_state._SHARED_MEMORY", tmp_path)
    path = tmp_path / "987654_locals"
    path.write_bytes(b"dead" + b"composer-gpt2")
    assert "1 dead dataset(s) are left" in findings(status="note")["shared memory"]
    assert path.exists()
    with path.open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_SH)
        assert "dead" not in findings(status="note").get("shared memory", "")


def test_a_missing_and_a_damaged_shard(run, tiny_corpus, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    shard = corpus / "train" / "shard.00000.mds"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    options = (run, (), [f"data.remote={corpus}"])
    assert "xxh64" in findings(*options, verify=True)["corpus"]
    assert "corpus" not in findings(*options)
    shard.unlink()
    assert f"1 shard(s) are missing, first {shard}" in findings(*options)["corpus"]


def test_a_corpus_of_another_length(run):
    text = findings(run, (), ["data.sequence_length=32"])["corpus"]
    assert "sequence_length" in text
    assert "prepare the corpus again" in text


def test_no_corpus(run, tmp_path):
    assert "must exist" in findings(run, (), [f"data.remote={tmp_path}/nowhere"])["corpus"]


def test_damaged_checkpoints(run):
    newest, older = (Path(run, "checkpoints", f"ep0-ba{n}-rank0.pt") for n in (2, 1))
    newest.write_bytes(newest.read_bytes()[:-7])
    note = findings(run, status="note")["checkpoint"]
    assert "skipping a damaged checkpoint" in note
    assert "checkpoint" not in findings(run)
    older.unlink()
    text = findings(run)["checkpoint"]
    assert "got 2 that are not" in text
    assert "Restore one of them" in text


def test_a_changed_recipe(run):
    text = findings(run, (), ["optimizer.adamw.lr=2.0e-3", "seed=3"])["checkpoint"]
    assert "got 2 changes" in text
    assert "optimizer.adamw.lr: was 0.001, got 0.002" in text


def test_leftovers(run):
    Path(run, "checkpoints", ".unfinished-ep0-ba3-rank0.pt").write_bytes(b"half")
    assert "1 half-written file(s)" in findings(run, status="note")["leftovers"]


def test_another_process_trains_there(run):
    with Path(run, ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"a process trains in {run}" in findings(run, status="note")["run lock"]


def test_stores(run, s3_bucket):
    good, bad = f"s3://{s3_bucket}/checkpoints", f"s3://{s3_bucket}-not/checkpoints"
    assert good in findings(run, (), [f"save_folder={good}"], status="ok")["stores"]
    assert "got 'not found'" in findings(run, (), [f"save_folder={bad}"])["stores"]


def test_a_store_that_is_down(run, monkeypatch):
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    found = findings(run, (), ["save_folder=s3://bucket/checkpoints"])
    assert "cannot be reached" in found["stores"]
    assert "check S3_ENDPOINT_URL" in found["stores"]


def test_wrong_credentials(run, monkeypatch):
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "1")  # then it looks at keys
    with local_s3_server() as server:
        for variable, value in server.environment.items():
            monkeypatch.setenv(variable, value)
        server.create_bucket("guarded")
        found = findings(run, (), ["save_folder=s3://guarded/checkpoints"])
    assert "refuses access" in found["stores"]
    assert "AWS_ACCESS_KEY_ID" in found["stores"]
