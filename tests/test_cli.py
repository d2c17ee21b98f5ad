"""The command line as a person meets it: processes, exit statuses, messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("composer-gpt2"))


def run(*arguments, cwd=None):
    finished = subprocess.run(
        [COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )
    return finished.returncode, finished.stdout, finished.stderr


def test_help_names_every_command_without_importing_torch():
    program = (
        "import sys\n"
        "from composer_gpt2.cli import app\n"
        "try:\n    app(['--help'])\n"
        "except SystemExit:\n    print('torch' in sys.modules)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    for command in ("prepare", "verify", "generate", "quickstart"):
        assert command in finished.stdout
    assert finished.stdout.splitlines()[-1] == "False"


def test_prepare_then_verify_then_damage(tmp_path):
    source = tmp_path / "corpus.jsonl"
    texts = [f"document {i} " + "and so on " * 30 for i in range(60)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "out"
    options = ("--out", out, "--sequence-length", 32, "--validation-fraction", 0.2)
    status, said, errors = run("prepare", source, *options)
    assert status == 0, errors
    assert "60" not in errors.splitlines()[-1] or said
    corpus = json.loads((out / "corpus.json").read_text())
    assert sum(split["documents"] for split in corpus["splits"].values()) == 60

    status, said, errors = run("verify", out)
    assert status == 0, errors
    assert "train" in said

    status, _, errors = run("prepare", source, *options)
    assert status == 2
    assert "Traceback" not in errors
    assert "--overwrite" in errors

    (shard, *_) = (out / "train").glob("shard.*")
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    status, _, errors = run("verify", out)
    assert status == 2
    assert shard.name in errors
    assert "Traceback" not in errors


def test_a_missing_source_or_checkpoint_is_one_line(tmp_path):
    status, _, errors = run("prepare", tmp_path / "none.jsonl", "--out", tmp_path / "out")
    assert status == 2
    assert "none.jsonl" in errors
    assert len(errors.strip().splitlines()) == 1
    status, _, errors = run("generate", tmp_path / "none.pt", "-p", "a")
    assert status == 2
    assert "none.pt" in errors
    assert "Traceback" not in errors
    (tmp_path / "notes.pt").write_text("no checkpoint")
    status, _, errors = run("generate", tmp_path / "notes.pt", "-p", "a")
    assert status == 2
    assert errors.startswith("CheckpointError: ")
    assert "Traceback" not in errors


def test_generate_without_a_checkpoint_says_so():
    status, said, errors = run("generate", "-p", "a")
    assert (status, said) == (2, "")
    assert "must have a trained model, got no CHECKPOINT" in errors
    assert len(errors.strip().splitlines()) == 1
