"""Algorithms as lines of recipes, in real runs through the Composer launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from settings import ALGORITHMS, runs_here

from composer_gpt2.build import build_trainer
from composer_gpt2.checkpoints import load_safely
from composer_gpt2.contract import ArchitectureMismatchError
from composer_gpt2.recipe import RecipeError, load_recipe

ROOT = Path(__file__).parents[2]
COMPOSER = str(Path(sys.executable).with_name("composer"))
FRAGMENTS = sorted((ROOT / "algorithms").glob("*/recipe.yaml"))
NEEDS_KERNELS = pytest.mark.skipif(
    not runs_here(ALGORITHMS["fused_block"]),
    reason="needs a CPU with AVX512-BF16 and a C++ compiler",
)

# A network and a corpus of seconds, under any recipe that is shipped.
SMALL = (
    "model={name: gpt2-tiny, n_embd: 32, dropout: 0.0}",
    "data.sequence_length=64",
    "train_batch_size=8",
    "device_train_microbatch_size=2",
    "max_duration=3ba",
    "precision=amp_bf16",
    "eval_interval=null",
    "eval_batch_size=2",
    "eval_subset_num_batches=1",
    "callbacks=null",
)


def launch(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    finished = subprocess.run(
        [COMPOSER, "-n", "2", str(ROOT / "run.py"), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return finished.returncode, finished.stdout + finished.stderr


def fragment(name: str) -> tuple[str, str]:
    return "-f", str(ROOT / "algorithms" / name / "recipe.yaml")


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.parent.name)
def test_a_fragment_holds_its_algorithm_and_loads_over_a_recipe(path, monkeypatch):
    monkeypatch.setenv("CORPUS_REMOTE", "s3://bucket/corpus")
    (name,) = yaml.safe_load(path.read_text())["algorithms"]
    assert name == path.parent.name
    recipe = load_recipe([ROOT / "yamls" / "gpt2-tiny.yaml", path], ["precision=amp_bf16"])
    assert name in recipe.algorithms
    assert "gradient_clipping" in recipe.algorithms


def test_the_three_together_train_on_two_ranks_and_leave_receipts(tiny_corpus, tmp_path):
    status, said = launch(
        tmp_path,
        *("-f", str(ROOT / "yamls" / "gpt2-tiny.yaml")),
        *fragment("alibi"),
        *fragment("seq_length_warmup"),
        *fragment("fused_cross_entropy"),
        *SMALL,
        f"data.remote={tiny_corpus}",
        "run_name=three",
    )
    assert status == 0, said
    assert "Traceback" not in said
    for effect in (
        "biased 2 of 2 attention layers, removed 32,768 position parameters",
        "fused 1 of 1 loss",
        "truncates batches, linear over 0.3dur; sequences of 64 tokens have 8 distinct lengths",
    ):
        assert effect in said
    assert "at init " in said
    order = "ALiBi, FusedCrossEntropy, SequenceLengthWarmup, SkipNonfinite, GradientClipping"
    assert order in said
    proofs = json.loads((tmp_path / "runs" / "three" / "receipts.json").read_text())
    assert [proof["algorithm"] for proof in proofs] == [
        "alibi",
        "fused_cross_entropy",
        "seq_length_warmup",
        "skip_nonfinite",
    ]
    assert proofs[0]["probe"]["largest error against the formula"] < 1e-5
    # The first of three batches has 8 tokens a sequence, the others are beyond three tenths.
    metrics = json.loads((tmp_path / "runs" / "three" / "metrics.json").read_text())
    assert metrics["tokens"] == 8 * (8 + 64 + 64)


@NEEDS_KERNELS
@pytest.mark.parametrize("size", ["52m"])
def test_a_fast_recipe_starts_on_two_ranks(size, tiny_corpus, tmp_path):
    """As it is, on a corpus and in a batch of seconds."""
    status, said = launch(
        tmp_path,
        *("-f", str(ROOT / "yamls" / f"gpt2-{size}-fast.yaml")),
        *SMALL[1:],
        "max_duration=2ba",
        "save_interval=null",
        f"data.remote={tiny_corpus}",
        "schedulers.cosine_decay_with_warmup.t_warmup=1ba",
        "run_name=fast",
    )
    assert status == 0, said
    proofs = json.loads((tmp_path / "runs" / "fast" / "receipts.json").read_text())
    names = [proof["algorithm"] for proof in proofs]
    assert names == ["fused_block", "fused_cross_entropy", "skip_nonfinite"]


@pytest.mark.parametrize("size", ["52m"])
def test_a_speedup_recipe_starts_on_two_ranks(size, tiny_corpus, tmp_path):
    """As it is, on a corpus and in a batch of seconds."""
    status, said = launch(
        tmp_path,
        *("-f", str(ROOT / "yamls" / f"gpt2-{size}-speedup.yaml")),
        *SMALL[1:],
        "max_duration=2ba",
        "save_interval=null",
        f"data.remote={tiny_corpus}",
        "schedulers.cosine_decay_with_warmup.t_warmup=1ba",
        "algorithms.seq_length_warmup.min_seq_length=8",
        "algorithms.seq_length_warmup.step_size=8",
        "run_name=speedup",
    )
    assert status == 0, said
    proofs = json.loads((tmp_path / "runs" / "speedup" / "receipts.json").read_text())
    assert [proof["algorithm"] for proof in proofs] == [
        "pad_vocabulary",
        "alibi",
        "fused_layernorm",
        "fused_cross_entropy",
        "seq_length_warmup",
        "skip_nonfinite",
    ]
    # Sequences of 64 tokens are trained as four of 16.
    assert "sequences of 16 tokens have 2 distinct lengths" in said
    assert "50,304" in said


def small(tiny_corpus: Path, tmp_path: Path, *overrides: str, precision: str = "fp32"):
    return load_recipe(
        [ROOT / "yamls" / "gpt2-tiny.yaml"],
        [
            *SMALL,
            f"precision={precision}",
            f"data.remote={tiny_corpus}",
            f"run_folder={tmp_path / 'run'}",
            "device=cpu",
            "schedulers.cosine_decay_with_warmup.t_warmup=1ba",
            *overrides,
        ],
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithms.alibi.train_sequence_length_scaling=0.3", "one over a whole number"),
        ("algorithms.alibi={train_sequence_length_scaling: 0.2}", "(64) into whole parts"),
        ("algorithms.alibi={kernel: flex}", "trains on GPUs only"),
        ("algorithms.fused_layernorm={}", "needs precision amp_bf16 on a CPU"),
        ("algorithms.pad_vocabulary={multiple_of: 0}", "above 0"),
        (
            "algorithms={fused_layernorm: {}, parallel_residual: {}} precision=amp_bf16",
            "got parallel_residual, which has none",
        ),
        (
            "algorithms={fused_block: {}, fused_gelu: {}} precision=amp_bf16",
            "a fused block has GELU in one kernel",
        ),
        ("algorithms.seq_length_warmup={max_seq_length: 128}", "at most"),
        ("algorithms.seq_length_warmup={duration: 2dur}", "within the run"),
        ("algorithms.seq_length_warmup={min_seq_length: 64}", "must be below the 64 tokens"),
        (
            "algorithms={alibi: {train_sequence_length_scaling: 0.25}, "
            "seq_length_warmup: {min_seq_length: 32}}",
            "at most the 16 tokens",
        ),
        (
            "schedulers={cosine_decay_with_warmup: null, cosine_decay_to_floor_with_warmup: "
            "{t_warmup: 1ba, t_decay: 900ba}}",
            "must not be longer than max_duration",
        ),
        (
            "schedulers={cosine_decay_with_warmup: null, cosine_decay_to_floor_with_warmup: "
            "{t_warmup: 1ba, t_decay: 0.1dur}}",
            "must come after t_warmup",
        ),
        (
            "schedulers={cosine_decay_with_warmup: null, cosine_decay_to_floor_with_warmup: "
            "{t_warmup: 1ba, t_decay: 1000tok}}",
            "must count in batches",
        ),
        ("algorithms.alibbi={}", "did you mean 'alibi'?"),
    ],
)
def test_what_cannot_be_is_one_mistake_of_the_recipe(override, said, tiny_corpus, tmp_path):
    with pytest.raises(RecipeError) as error:
        small(tiny_corpus, tmp_path, *override.replace(" precision", "\nprecision").split("\n"))
    assert len(error.value.mistakes) == 1
    assert said in str(error.value)


def test_without_positions_a_sequence_may_be_longer_than_they(tiny_corpus, tmp_path):
    short = "model.n_positions=32"
    with pytest.raises(RecipeError, match="n_positions"):
        small(tiny_corpus, tmp_path, short)
    trainer = build_trainer(small(tiny_corpus, tmp_path, short, "algorithms.alibi={}"))
    trainer.fit()
    trainer.close()
    assert trainer.state.timestamp.token == 3 * 8 * 64


def test_a_run_does_not_go_on_without_an_algorithm_that_it_had(tiny_corpus, tmp_path):
    own = ("save_interval=1ba", "run_name=one", f"save_folder={tmp_path / 'checkpoints'}")
    trainer = build_trainer(small(tiny_corpus, tmp_path, "algorithms.alibi={}", *own))
    trainer.fit()
    trainer.close()
    saved = load_safely(tmp_path / "checkpoints" / "latest-rank0.pt")["state"]
    assert saved["model"]["_extra_state"] == {"architecture": {"alibi": {}}}
    longer = (*own, "max_duration=4ba", "allow_recipe_changes=true")
    with pytest.raises(ArchitectureMismatchError, match=r"it has alibi \{\}, this run has none"):
        build_trainer(small(tiny_corpus, tmp_path, *longer))
    half = "algorithms.alibi={train_sequence_length_scaling: 0.5}"
    with pytest.raises(ArchitectureMismatchError, match=r"1\.0.*got.*0\.5"):
        build_trainer(small(tiny_corpus, tmp_path, half, *longer))
    trainer = build_trainer(small(tiny_corpus, tmp_path, "algorithms.alibi={}", *longer))
    trainer.fit()
    trainer.close()
    assert trainer.state.timestamp.batch == 4
