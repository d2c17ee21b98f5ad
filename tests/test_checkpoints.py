"""Checkpoints: exact to go on from, whole or not there, and free of code."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from composer import Callback
from composer.core import Event

from composer_gpt2.build import build_trainer, name_run
from composer_gpt2.checkpoints import (
    CheckpointError,
    RecipeChangedError,
    find_resume_point,
    load_safely,
    newest_batch,
)
from composer_gpt2.checkpoints.manifest import (
    file_problem,
    newest_first,
    read_manifest,
    record_file,
)
from composer_gpt2.checkpoints.resume import FREE_KEYS, recipe_changes
from composer_gpt2.data.object_store import open_store
from composer_gpt2.model import GPT2Model
from composer_gpt2.recipe import Recipe, RecipeError, load_recipe
from composer_gpt2.run_folder import run_lock
from composer_gpt2.stop_signals import StopSignals
from composer_gpt2.train import train as run

# Dropout, so that the random state matters, and epochs of some 8 batches.
RECIPE = """
model: {name: gpt2-tiny, n_embd: 32, n_layer: 2, n_head: 2, dropout: 0.1}
data: {streams: {counting: {repeat: 0.034}}, sequence_length: 64, validation_split: null}
train_batch_size: 2
device_train_microbatch_size: 1
max_duration: 12ba
optimizer: {adamw: {lr: 1.0e-2, weight_decay: 0.1}}
schedulers: {cosine_decay_with_warmup: {t_warmup: 1ba}}
precision: fp32
save_interval: 3ba
run_name: test
"""


class Killed(BaseException):
    pass


class KillAfter(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def run_event(self, event, state, logger):
        if event is Event.BATCH_START and state.timestamp.batch == self.batch:
            raise Killed


@pytest.fixture
def load(tmp_path, tiny_corpus):
    def load(*overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE)
        own = [f"data.streams.counting.remote={tiny_corpus}", f"run_folder={tmp_path / 'run'}"]
        return load_recipe([path], [*own, *overrides])

    return load


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run" / "checkpoints"


def train(recipe, kill_after=None):
    """The weights at the end, or where the run was killed."""
    trainer = build_trainer(recipe)
    if kill_after is None:
        trainer.fit()
    else:
        trainer.state.callbacks.append(KillAfter(kill_after))
        with pytest.raises(Killed):
            trainer.fit()
    trainer.close()
    return dict(trainer.state.model.named_parameters())


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def batches(folder) -> list[int]:
    return sorted(int(path.name.split("-ba")[1].split("-")[0]) for path in folder.glob("*.json"))


# Going on.


def test_a_run_killed_twice_ends_with_the_weights_of_one_that_was_not(load, tmp_path):
    whole = train(load("save_interval=null", f"run_folder={tmp_path / 'whole'}"))
    for kill_after in (5, 10):  # after the checkpoints 3 and 9
        train(load(), kill_after)
    assert_equal(train(load()), whole)


def test_resuming_at_the_end_of_an_epoch_is_exact_too(load, tmp_path):
    trainer = build_trainer(load())
    epoch = int(trainer.state.dataloader_len.value)
    trainer.close()
    assert 5 < epoch < 11  # what this test stands on
    whole = train(load("save_interval=null", f"run_folder={tmp_path / 'whole'}"))
    for interval in (f"{epoch}ba", "1ep"):
        own = (f"save_interval={interval}", f"run_folder={tmp_path / interval}")
        train(load(*own), kill_after=epoch + 2)
        assert batches(tmp_path / interval / "checkpoints") == [epoch]
        assert_equal(train(load(*own)), whole)


def test_a_finished_run_is_finished(load, folder):
    train(load("max_duration=3ba"))
    trainer = build_trainer(load("max_duration=3ba"))
    assert trainer.state.timestamp.batch == 3
    trainer.close()
    assert batches(folder) == [3]


def test_a_finished_run_makes_up_for_an_evaluation_that_was_cut_short(load, tmp_path):
    short = ("max_duration=3ba", "data.validation_split=validation", "eval_batch_size=1")
    with StopSignals() as signals:
        run(load(*short), signals)
        metrics = tmp_path / "run" / "metrics.json"
        before = json.loads(metrics.read_text())
        metrics.unlink()
        run(load(*short), signals)
    after = json.loads(metrics.read_text())
    assert after["eval"] == before["eval"]
    assert after["tokens"] == before["tokens"]


def test_without_a_name_the_same_command_is_the_same_run(load):
    named = name_run(load("run_name=null", "run_folder=null"))
    again = name_run(load("run_name=null", "run_folder=null", "log_interval=1ba"))
    other = name_run(load("run_name=null", "run_folder=null", "seed=18"))
    assert named.run_name == again.run_name != other.run_name
    assert named.run_name.startswith("gpt2-tiny-")


def test_an_own_checkpoint_comes_before_load_path(load, tmp_path, folder):
    other = f"run_folder={tmp_path / 'other'}"
    train(load("max_duration=3ba", "seed=18", other))
    start = f"load_path={tmp_path / 'other' / 'checkpoints' / 'latest-rank0.pt'}"
    recipe = load(start, "load_weights_only=true")
    train(recipe, kill_after=5)
    trainer = build_trainer(recipe)
    assert trainer.state.timestamp.batch == 3
    saved = load_safely(folder / "ep0-ba3-rank0.pt")["state"]["model"]
    assert torch.equal(
        trainer.state.model.model.transformer.wpe.weight, saved["model.transformer.wpe.weight"]
    )
    trainer.close()


# Another recipe.


def test_a_changed_recipe_is_refused_with_the_differences(load):
    train(load(), kill_after=4)
    changed = ("optimizer.adamw.lr=2.0e-2", "seed=18", "log_interval=1ba")
    with pytest.raises(RecipeChangedError, match="got 2 changes") as caught:
        build_trainer(load(*changed))
    said = str(caught.value)
    assert "optimizer.adamw.lr: was 0.01, got 0.02" in said
    assert "seed: was 17, got 18" in said
    assert "log_interval" not in said
    assert "allow_recipe_changes=true" in said
    trainer = build_trainer(load(*changed, "allow_recipe_changes=true"))
    assert trainer.state.timestamp.batch == 3
    trainer.close()


@pytest.mark.parametrize("accepted", [False, True])
def test_another_global_batch_is_refused_with_the_reason(load, accepted):
    train(load(), kill_after=4)
    with pytest.raises(RecipeChangedError, match="the schedules count batches of that size"):
        build_trainer(load("train_batch_size=4", f"allow_recipe_changes={str(accepted).lower()}"))


def test_free_keys_are_keys_of_a_recipe():
    for key in FREE_KEYS:
        schema = Recipe.model_json_schema()
        for part in key.split("."):
            assert part in schema["properties"]
            schema = Recipe.model_json_schema()["$defs"]["Data"]


def test_changes_name_what_is_missing_and_new():
    before = {"a": {"b": 1, "c": {}}, "loggers": {}}
    now = {"a": {"b": 1, "c": {"d": 2}}, "loggers": {"x": {}}}
    assert recipe_changes(before, now) == {"a.c": ({}, None), "a.c.d": (None, 2)}


# Damage.


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.fixture(scope="module")
def killed(tiny_corpus, tmp_path_factory):
    """The checkpoints 3 and 6 of a run."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "recipe.yaml").write_text(RECIPE)
    own = [f"data.streams.counting.remote={tiny_corpus}", f"run_folder={folder / 'run'}"]
    train(load_recipe([folder / "recipe.yaml"], own), kill_after=7)
    return folder / "run" / "checkpoints"


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
@pytest.mark.parametrize("what", ["ep0-ba6-rank0.pt", "ep0-ba6-rank0.json"])
def test_the_newest_checkpoint_that_verifies_is_used(killed, folder, capsys, damage, what):
    shutil.copytree(killed, folder, symlinks=True)
    assert batches(folder) == [3, 6]
    damage(folder / what)
    with find_resume_point(str(folder), str(folder.parent / "uploading")) as point:
        assert point.manifest.batch == 3
    skipped = capsys.readouterr().err
    unfinished = damage is Path.unlink and what.endswith("json")
    assert ("ep0-ba6: " in skipped) is not unfinished


def test_a_run_goes_on_from_the_one_before_and_replaces_the_damaged(load, killed, folder, tmp_path):
    shutil.copytree(killed, folder, symlinks=True)
    flip_a_byte(folder / "ep0-ba6-rank0.pt")
    whole = train(load("save_interval=null", f"run_folder={tmp_path / 'whole'}"))
    assert_equal(train(load()), whole)
    record = read(folder, 6).files["ep0-ba6-rank0.pt"]
    assert file_problem(folder / "ep0-ba6-rank0.pt", record) is None


def read(folder, batch):
    return read_manifest((folder / f"ep0-ba{batch}-rank0.json").read_bytes())


def test_when_all_are_damaged_the_run_does_not_begin_anew_in_silence(load, folder):
    train(load(), kill_after=7)
    for path in folder.glob("*.pt"):
        if not path.is_symlink():
            truncate(path)
    with pytest.raises(CheckpointError, match="got 2 that are not") as caught:
        build_trainer(load())
    assert "ep0-ba3: ep0-ba3-rank0.pt has" in str(caught.value)


def test_what_a_killed_run_was_writing_is_cleared(load, folder):
    train(load(), kill_after=4)
    (folder / ".unfinished-ep0-ba6-rank0.pt").write_bytes(b"half")
    train(load())
    assert not list(folder.glob(".unfinished*"))


def test_a_kill_between_the_files_leaves_the_one_before(load, folder, monkeypatch):
    """The state is there and the manifest is not: it was never a checkpoint."""
    from composer_gpt2.checkpoints import saver

    train(load(), kill_after=4)
    monkeypatch.setattr(saver, "save_model", lambda *_: (_ for _ in ()).throw(Killed))
    trainer = build_trainer(load())
    with pytest.raises(Killed):
        trainer.fit()
    trainer.close()
    assert (folder / "ep0-ba6-rank0.pt").exists()
    monkeypatch.undo()
    trainer = build_trainer(load())
    assert trainer.state.timestamp.batch == 3
    trainer.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(load, small_disk, capsys):
    trainer = build_trainer(load(f"save_folder={small_disk}/checkpoints"))
    with pytest.raises(CheckpointError, match=r"No space left|writ") as caught:
        trainer.fit()
    trainer.close()
    said = str(caught.value)
    assert "MB are free there" in said
    assert "There is none before it" in said
    assert not list((small_disk / "checkpoints").glob("*rank0*"))


def test_room_for_one_checkpoint_only(load, tmp_path, folder, monkeypatch):
    """The second is not written; the first is whole, and the run goes on from it."""
    from composer_gpt2.checkpoints import saver

    save = torch.save

    def save_while_there_is_room(content, file, **options):
        is_checkpoint = isinstance(content, dict) and "rng" in content
        if is_checkpoint and content["state"]["timestamp"]["Timestamp"]["batch"] >= 6:
            file.write(b"some")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file, **options)

    monkeypatch.setattr(saver.torch, "save", save_while_there_is_room)
    trainer = build_trainer(load())
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        trainer.fit()
    trainer.close()
    assert "That of batch 3 is whole" in str(caught.value)
    assert not list(folder.glob(".unfinished*"))
    monkeypatch.undo()
    whole = train(load("save_interval=null", f"run_folder={tmp_path / 'whole'}"))
    assert_equal(train(load()), whole)


# Which ones are kept.


def test_the_newest_and_the_landmarks_are_kept(load, folder):
    keep = ("save_interval=1ba", "save_num_checkpoints_to_keep=2", "save_keep_every=4ba")
    train(load(*keep, "max_duration=11ba"))
    assert batches(folder) == [4, 8, 10, 11]
    names = {path.name.rsplit("-", 1)[0] for path in folder.glob("ep*.pt")}
    assert len(names) == len(list(folder.glob("ep*.safetensors"))) == 4
    assert os.readlink(folder / "latest-rank0.pt") == "ep1-ba11-rank0.pt" or os.readlink(
        folder / "latest-rank0.pt"
    ).endswith("ba11-rank0.pt")


def test_landmarks_have_an_effect_or_are_refused(load):
    with pytest.raises(RecipeError, match=r"save_keep_every .*no effect"):
        load("save_keep_every=4ba")


def test_starting_anew_replaces_what_was_there_when_it_has_a_checkpoint(load, folder):
    train(load(), kill_after=10)
    assert batches(folder) == [3, 6, 9]
    anew = ("autoresume=false", "save_overwrite=true", "save_interval=2ba")
    train(load(*anew), kill_after=1)
    assert batches(folder) == [3, 6, 9]
    train(load(*anew), kill_after=3)
    assert batches(folder) == [2]


def test_a_damaged_later_one_does_not_crowd_out_the_new(load, folder):
    train(load(), kill_after=7)
    truncate(folder / "ep0-ba6-rank0.pt")
    train(load("save_interval=1ba", "save_num_checkpoints_to_keep=1"), kill_after=5)
    with find_resume_point(str(folder), str(folder.parent / "uploading")) as point:
        assert point.manifest.batch == 5


def test_names_are_ordered_by_batch():
    names = ["ep0-ba9-rank0.json", "ep1-ba10-rank0.json", "latest-rank0.pt", "ep0-ba10-rank0.json"]
    assert newest_first(names) == [
        "ep1-ba10-rank0.json",
        "ep0-ba10-rank0.json",
        "ep0-ba9-rank0.json",
    ]


# Code in a checkpoint.


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("in_archive", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused(load, tmp_path, folder, in_archive):
    marker = tmp_path / "was-run"
    evil = tmp_path / "evil.pt"
    torch.save({"state": Malicious(marker)}, evil, _use_new_zipfile_serialization=in_archive)
    with pytest.raises(CheckpointError, match=r"posix\.system|torch\.save wrote"):
        GPT2Model.from_pretrained(evil)
    with pytest.raises(CheckpointError, match="has not been loaded"):
        build_trainer(load(f"load_path={evil}"))
    # Its manifest verifies: whoever can write the one can write the other.
    train(load(), kill_after=4)
    state = folder / "ep0-ba3-rank0.pt"
    shutil.copy(evil, state)
    manifest = read(folder, 3)
    forged = dataclasses.replace(manifest, files={**manifest.files, state.name: record_file(state)})
    (folder / forged.file).write_text(forged.to_json())
    with pytest.raises(CheckpointError, match="has not been loaded"):
        build_trainer(load())
    assert not marker.exists()
    torch.load(evil, weights_only=False)
    assert marker.exists()  # it would have


def test_ours_loads_with_torchs_restricted_reader(load, folder):
    train(load("max_duration=3ba"))
    content = load_safely(folder / "ep0-ba3-rank0.pt")
    assert content["state"]["timestamp"]["Timestamp"]["batch"] == 3
    assert len(content["rng"]) == 1


# The weights alone.


def test_the_safetensors_are_the_model(load, folder):
    train(load("max_duration=3ba", "algorithms.alibi={}"))
    weights = GPT2Model.from_pretrained(folder / "ep0-ba3-rank0.safetensors")
    state = GPT2Model.from_pretrained(folder / "latest-rank0.pt")
    assert_equal(dict(weights.named_parameters()), dict(state.named_parameters()))
    ids = torch.arange(12).reshape(1, 12)
    batch = {"input_ids": ids}
    assert torch.equal(weights(batch).logits, state(batch).logits)


def test_other_safetensors_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("other", "text"):
        with pytest.raises(ValueError, match=f"{name}.safetensors must be the weights"):
            GPT2Model.from_pretrained(tmp_path / f"{name}.safetensors")


# An object store.


def test_a_run_saves_to_s3_and_goes_on_from_there(load, s3_bucket, tmp_path):
    address = f"s3://{s3_bucket}/run"
    own = (f"save_folder={address}", "save_num_checkpoints_to_keep=2")
    whole = train(load("save_interval=null", f"run_folder={tmp_path / 'whole'}"))
    train(load(*own), kill_after=10)
    assert newest_batch(address) == 9
    with open_store(address) as store:
        names = store.names()
        pointer = store.read_bytes("latest-rank0.pt.symlink").decode()
    assert {name for name in names if name.endswith(".json")} == {
        "ep0-ba6-rank0.json",
        pointer.split("/")[-1].replace(".pt", ".json"),
    }
    assert pointer.startswith("run/ep")
    shutil.rmtree(tmp_path / "run")  # a new machine
    assert_equal(train(load(*own)), whole)
    assert newest_batch(address) == 12
    assert not list((tmp_path / "run" / "uploading").iterdir())
    model = GPT2Model.from_pretrained(f"{address}/latest-rank0.pt")
    assert_equal(
        {f"model.{name}": p for name, p in model.model.named_parameters()},
        {name: p for name, p in whole.items()},
    )


def test_what_could_not_be_uploaded_is_gone_on_from_and_uploaded(load, s3_bucket, tmp_path):
    address = f"s3://{s3_bucket}/run"
    own = f"save_folder={address}"
    train(load(own), kill_after=4)
    trainer = build_trainer(load(own))
    saver = trainer._checkpoint_saver
    saver._uploader.shutdown()
    saver._start_upload = lambda manifest: None  # killed before the thread could begin
    trainer.state.callbacks.append(KillAfter(7))
    with pytest.raises(Killed):
        trainer.fit()
    trainer.close()
    assert newest_batch(address) == 3
    uploading = tmp_path / "run" / "uploading"
    assert newest_batch(str(uploading)) == 6
    (uploading / "ep0-ba7-rank0.pt").write_bytes(b"killed before the manifest")
    trainer = build_trainer(load(own))
    assert trainer.state.timestamp.batch == 6
    trainer.fit()
    trainer.close()
    assert not list(uploading.iterdir())
    assert newest_batch(address) == 12
    with open_store(address) as store:
        assert "ep0-ba6-rank0.json" in store.names()


def test_an_upload_that_fails_stops_the_run_and_says_where_the_checkpoint_is(
    load, s3_bucket, tmp_path, s3_server
):
    address = f"s3://{s3_bucket}/run"
    trainer = build_trainer(load(f"save_folder={address}"))

    class LoseBucket(Callback):
        def run_event(self, event, state, logger):
            if event is Event.BATCH_START and state.timestamp.batch == 1:
                s3_server.client().delete_bucket(Bucket=s3_bucket)

    trainer.state.callbacks.append(LoseBucket())
    with pytest.raises(CheckpointError, match="goes on from it and uploads it") as caught:
        trainer.fit()
    trainer.close()
    assert address in str(caught.value)
    assert newest_batch(str(tmp_path / "run" / "uploading")) == 3


# One run, one folder.


def test_two_processes_cannot_train_in_one_folder(load, tmp_path, monkeypatch):
    monkeypatch.setattr("composer_gpt2.run_folder._SECONDS_FOR_THE_LOCK", 0.5)
    with run_lock(load()):
        with pytest.raises(BlockingIOError, match="another is at work in"), run_lock(load()):
            pass
        with run_lock(load(f"run_folder={tmp_path / 'other'}")):
            pass
    with run_lock(load()):
        pass
