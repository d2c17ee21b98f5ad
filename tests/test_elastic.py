"""A checkpoint of one number of ranks goes on on another: the same batches, the same weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batch_recorder import RECORDS, BatchRecorder, install, read_batches
from safetensors.torch import load_file

from composer_gpt2 import train as program
from composer_gpt2.build import build_trainer
from composer_gpt2.checkpoints import load_safely
from composer_gpt2.recipe import load_recipe

COMPOSER = str(Path(sys.executable).with_name("composer"))
N_BATCHES, SAVED = 12, 6

# Without dropout, for each rank draws its own random numbers. In epochs of 8 batches and 2 samples,
# which no number of ranks may make a ninth. EMA keeps a copy of the weights of its own.
# Gradients of the keys' biases are rounding errors, of which AdamW's usual epsilon makes steps.
RECIPE = f"""
model: {{name: gpt2-tiny, n_embd: 16, n_layer: 2, n_head: 2, dropout: 0.0}}
data: {{streams: {{counting: {{repeat: 0.075}}}}, sequence_length: 64, validation_split: null}}
train_batch_size: 4
max_duration: {N_BATCHES}ba
precision: fp32
device: cpu
optimizer: {{adamw: {{lr: 1.0e-2, weight_decay: 0.1, eps: 1.0e-4}}}}
schedulers: {{cosine_decay_with_warmup: {{t_warmup: 1ba}}}}
algorithms: {{ema: {{half_life: 2ba}}}}
save_interval: {SAVED}ba
run_name: elastic
"""


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def train(tiny_corpus, module_folder):
    """Trains in a folder on so many ranks: one here, several under the launcher."""
    recipe = module_folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    package = install(module_folder / "package")

    def train(folder, n_ranks):
        own = [f"data.streams.counting.remote={tiny_corpus}", f"run_folder={folder}"]
        records = {RECORDS: str(folder / "records" / f"{n_ranks}-ranks")}
        if n_ranks == 1:
            trainer = build_trainer(load_recipe([recipe], own))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(RECORDS, records[RECORDS])
                trainer.state.callbacks.append(BatchRecorder())
            trainer.fit()
            trainer.close()
            return
        finished = subprocess.run(
            [
                *(COMPOSER, "-n", str(n_ranks), "-m", "composer_gpt2.train", "-f", str(recipe)),
                *("callbacks.batch_recorder={}", *own),
            ],
            env={**os.environ, **package, **records, "OMP_NUM_THREADS": "1"},
            cwd=module_folder,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr

    return train


@pytest.fixture(scope="module")
def whole(train, module_folder):
    """Folder of a run that was never stopped, on so many ranks."""
    folders = {}

    def whole(n_ranks):
        if n_ranks not in folders:
            folders[n_ranks] = module_folder / f"{n_ranks}-ranks"
            train(folders[n_ranks], n_ranks)
        return folders[n_ranks]

    return whole


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4)])
def test_a_run_goes_on_on_another_number_of_ranks(train, whole, tmp_path, before, after):
    (tmp_path / "checkpoints").mkdir()  # as if the run had been killed after that one
    for file in (whole(before) / "checkpoints").glob(f"*-ba{SAVED}-*"):
        shutil.copy(file, tmp_path / "checkpoints")
    train(tmp_path, after)

    expected = _global_batches(whole(1))
    assert list(expected) == list(range(1, N_BATCHES + 1))
    assert [epoch for epoch, _ in expected.values()] == [0] * 8 + [1] * 4
    assert _global_batches(whole(before)) == expected
    assert _global_batches(tmp_path) == {b: expected[b] for b in expected if b > SAVED}

    weights, expected = _final_weights(tmp_path), _final_weights(whole(1))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=name)


def test_another_global_batch_is_refused(whole, tiny_corpus, capsys):
    recipe = whole(1).parent / "recipe.yaml"
    own = [f"data.streams.counting.remote={tiny_corpus}", f"run_folder={whole(1)}"]
    assert program.main(["-f", str(recipe), *own, "train_batch_size=8"]) == 2
    assert "train_batch_size cannot change, because the order of samples" in capsys.readouterr().err


def _global_batches(folder) -> dict[int, tuple[int, list[int]]]:
    """The samples of each batch; which rank took which of them is not the question."""
    batches = read_batches(folder / "records")
    return {batch: (epoch, sorted(ids)) for batch, (epoch, ids) in batches.items()}


def _final_weights(folder) -> dict[str, torch.Tensor]:
    """The averages, which EMA saves as the model, and the trained weights, which it keeps aside."""
    (file,) = (folder / "checkpoints").glob(f"*-ba{N_BATCHES}-rank0.pt")
    average = dict(load_safely(file)["state"]["algorithms"])["EMA"]
    assert average["ema_weights_active"]
    trained = {
        f"trained {name.removeprefix('module.')}": weight
        for name, weight in average["ema_model"]["named_parameters_dict"].items()
    }
    return {**load_file(file.with_suffix(".safetensors")), **trained}
