from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from streaming import LocalDataset

from composer_gpt2.documentation import read_documentation, write_documentation
from composer_gpt2.quickstart import _launcher, quickstart, unigram_entropy
from composer_gpt2.recipe import load_recipe


def test_the_documentation_is_the_same_each_time_and_is_prose():
    first, second = (list(islice(read_documentation(), 400)) for _ in range(2))
    assert first == second
    assert "assert" in first[0]  # the first topic of Python's help()
    assert all(text.strip() for text in first)


def test_the_corpus_has_the_promised_size(tmp_path):
    path = write_documentation(tmp_path / "folder" / "documentation.jsonl")
    assert path.stat().st_size > 5e6
    lines = path.read_text().splitlines()
    assert len(lines) > 1000
    assert set(json.loads(lines[-1])) == {"text"}


def test_unigram_entropy_is_that_of_the_tokens(tiny_corpus, tmp_path):
    train = Path(tiny_corpus) / "train"
    tokens = [int(t) for sample in LocalDataset(local=str(train)) for t in sample["tokens"]]
    n = len(tokens)
    expected = -sum(c / n * math.log(c / n) for c in Counter(tokens).values())
    assert unigram_entropy(train) == pytest.approx(expected, rel=1e-9)


def test_checkpoints_are_not_saved_to_a_server_that_goes_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = str(Path(__file__).parent.parent / "yamls" / "quickstart.yaml")
    with pytest.raises(ValueError, match=r"save_folder must be a folder .* got s3://mine/run"):
        quickstart(recipe, None, ["save_folder=s3://mine/run"])
    assert not list(tmp_path.iterdir())


def test_ranks_are_as_many_as_share_the_batches_evenly(monkeypatch):
    recipe = load_recipe(["quickstart.yaml"])  # 16 sequences a batch
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert _launcher(recipe)[2] == "4"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 64)
    assert _launcher(recipe)[2] == "16"


def test_ones_own_text_and_settings_go_the_whole_way(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "mine.txt"
    verses = (f"{i} bottles of beer on the wall.\nTake one down." for i in range(2_000))
    text.write_text("\n\n".join(verses))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: {name: gpt2-tiny, n_embd: 32}\n"
        "data: {sequence_length: 64}\n"
        "train_batch_size: 8\n"
        "max_duration: 4ba\n"
        "optimizer: {adamw: {lr: 1.0e-3, weight_decay: 0.1}}\n"
    )
    settings = ["run_name=mine", "seed=3"]
    assert quickstart(str(recipe), str(text), settings, split_on="\n\n") == 0
    said = capfd.readouterr().out
    assert "Validation loss" in said
    assert "Unigram entropy" in said
    assert "A sample:\n\nReturns a new" in said
    assert "The run is in runs/mine" in said
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "latest-rank0.pt").exists()
