"""Whole runs through the Composer launcher: real processes, real S3, real checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from composer_gpt2.data.preparation import prepare

ROOT = Path(__file__).parent.parent
COMPOSER = str(Path(sys.executable).with_name("composer"))


def launch(n_ranks, *arguments, program="run.py", cwd=ROOT, timeout=300):
    """Runs a program under ``composer -n``; returns the exit status and everything it said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [COMPOSER, "-n", str(n_ranks), str(ROOT / program), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return finished.returncode, finished.stdout + finished.stderr


@pytest.fixture
def s3_corpus(s3_bucket, tmp_path) -> str:
    """256-token samples for yamls/smoke.yaml, prepared straight into a bucket."""
    source = tmp_path / "corpus.jsonl"
    with source.open("w") as file:
        for start in range(0, 40_000, 100):
            text = " ".join(str(number) for number in range(start, start + 100))
            file.write(json.dumps({"text": text}) + "\n")
    remote = f"s3://{s3_bucket}/corpus"
    prepare([str(source)], remote, sequence_length=256, validation_fraction=0.05, progress=False)
    return remote


def test_two_ranks_train_from_s3_and_the_checkpoint_in_s3_generates(
    s3_corpus, s3_bucket, tmp_path, capsys
):
    checkpoints = f"s3://{s3_bucket}/checkpoints"
    status, said = launch(
        2,
        *("-f", ROOT / "yamls" / "smoke.yaml"),
        *(f"data.remote={s3_corpus}", "run_name=smoke", f"save_folder={checkpoints}"),
        # Rank 0 writes texts while the other waits.
        "callbacks.generate_samples={prompts: ['1 2 3'], interval: 4ba, max_new_tokens: 5}",
        cwd=tmp_path,
    )
    assert status == 0, said
    assert said.count("sample at batch 4 | 1 2 3") == said.count("sample at batch 8 | 1 2 3") == 1
    assert "2 x 4 sequences, micro-batch 4" in said
    assert "batch 8 (100.0%)" in said
    assert said.count("evaluation at batch") == 2
    assert "Traceback" not in said
    assert "leaked shared_memory" not in said
    metrics = json.loads((tmp_path / "runs" / "smoke" / "metrics.json").read_text())
    assert metrics["tokens"] == 8 * 8 * 256
    assert metrics["eval"]["LanguageCrossEntropy"] < 10.5  # it began at 10.8

    from composer_gpt2 import cli

    cli.app(
        ["generate", f"{checkpoints}/latest-rank0.pt", "-p", "1 2 3", "-m", "5", "--seed", "1"],
        standalone_mode=False,
    )
    text = capsys.readouterr().out
    assert text.startswith("1 2 3")
    assert len(text.strip()) > len("1 2 3")


LOSSES = """
import json, sys
from composer import Callback
from composer.utils import dist
from composer_gpt2.build import build_trainer
from composer_gpt2.recipe import load_recipe

losses = []

class Record(Callback):
    def batch_end(self, state, logger):
        losses.append(state.total_loss_dict["loss/train/total"])

if __name__ == "__main__":
    trainer = build_trainer(load_recipe([sys.argv[1]], sys.argv[3:]))
    trainer.state.callbacks.append(Record())
    trainer.fit()
    if dist.get_global_rank() == 0:
        json.dump(losses, open(sys.argv[2], "w"))
    trainer.close()
"""


def test_two_ranks_give_the_loss_of_one(tiny_corpus, tmp_path):
    program = tmp_path / "losses.py"
    program.write_text(LOSSES)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name: gpt2-tiny, dropout: 0.0}\n"
        f"data: {{remote: {tiny_corpus}, sequence_length: 64, validation_split: null}}\n"
        "train_batch_size: 8\n"
        "max_duration: 5ba\n"
        "precision: fp32\n"
        "save_interval: null\n"
        "optimizer: {adamw: {lr: 1.0e-3, weight_decay: 0.1}}\n"
        "algorithms: {gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}}\n"
    )
    losses = {}
    for n_ranks in (1, 2):
        out = tmp_path / f"{n_ranks}.json"
        name = f"run_name=ranks-{n_ranks}"
        status, said = launch(n_ranks, recipe, out, name, program=program, cwd=tmp_path)
        assert status == 0, said
        losses[n_ranks] = json.loads(out.read_text())
    assert len(losses[1]) == 5
    assert losses[1][-1] < losses[1][0] - 0.5
    assert losses[2] == pytest.approx(losses[1], abs=1e-5)


def test_a_shard_lost_in_mid_run_is_one_message_on_all_ranks(tiny_corpus, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    (shard,) = (corpus / "train").glob("shard.*")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    status, said = launch(
        2,
        *("-f", ROOT / "yamls" / "smoke.yaml", f"data.remote={corpus}"),
        "data.sequence_length=64",
        cwd=tmp_path,
    )
    assert status == 1, said
    assert f"ShardError: Shard {shard} must be what index.json says" in said
    assert "Traceback" not in said


def test_mistakes_are_one_message_and_nothing_is_trained(tmp_path):
    status, said = launch(
        2,
        *("-f", ROOT / "yamls" / "smoke.yaml", "data.remote=/no/such/corpus"),
        *("optimizer.adamw.learning_rate=1", "max_durationn=3ba", "precision=fp8"),
        cwd=tmp_path,
    )
    assert status == 2
    assert said.count("3 mistakes in the recipe") == 1
    for key in ("optimizer.adamw.learning_rate", "max_durationn", "precision"):
        assert key in said
    assert "did you mean 'max_duration'" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_a_corpus_that_is_not_there_is_one_message(tmp_path):
    status, said = launch(
        2, "-f", ROOT / "yamls" / "smoke.yaml", "data.remote=/no/such/corpus", cwd=tmp_path
    )
    assert status == 2
    assert "/no/such/corpus" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()
