"""What runs leave in shared memory: nothing, however they ended, and they let each other be.

Other programs and tests use the same folder at the same time, so these tests look only at datasets
that cache in folders of their own, and recognise their files by inode: numbers are used again.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest
from streaming import StreamingDataset
from test_streaming import N_SAMPLES, Readers, T, flat, jobs_for, read, write_corpus

from composer_gpt2.data.streaming import StreamingTokens

SHARED_MEMORY = Path("/dev/shm")

pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="a system without /dev/shm")


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus")


def files_of(folder: Path) -> dict[str, int]:
    """Name to inode of all that datasets which cache below ``folder`` have in shared memory."""
    found = {}
    for path in SHARED_MEMORY.glob("[0-9]*_locals"):
        if f"{folder}/".encode() in path.read_bytes():
            for file in SHARED_MEMORY.glob(f"{path.name.removesuffix('locals')}*"):
                found[file.name] = file.stat().st_ino
    return found


def still_there(files: dict[str, int]) -> set[str]:
    now = {path.name: path.stat().st_ino for path in SHARED_MEMORY.glob("[0-9]*_*")}
    return {name for name, inode in files.items() if now.get(name) == inode}


def test_a_killed_run_is_cleaned_up_by_the_next_and_a_living_one_goes_on(corpus, tmp_path):
    def start(n_ranks, name):
        (tmp_path / name).mkdir()
        jobs = jobs_for(n_ranks, tmp_path / name, remote=str(corpus))[:1]
        return Readers(n_ranks, jobs, wait_for=str(tmp_path / name / "go"))

    living, killed = start(1, "living"), start(2, "killed")
    try:
        living.wait_until_started()
        killed.wait_until_started()
        files = files_of(tmp_path / "killed")
        names = {name.split("_", 1)[1] for name in files}
        assert {"locals", "failure", "barrier", "shard_states"} <= names
        assert {"barrier_filelock", "cache_filelock"} <= names
        killed.kill()  # the whole session, Python's resource tracker included
        assert still_there(files) == files.keys()  # nobody has cleaned up

        others = files_of(tmp_path / "living")
        dataset = StreamingTokens(
            remote=str(corpus), local=str(tmp_path / "next"), sequence_length=T, batch_size=4
        )
        assert still_there(files) == set()
        assert still_there(others) == others.keys()
        assert flat(read(dataset)) == list(range(N_SAMPLES))

        (tmp_path / "living" / "go").touch()
        ((code, ((batches, error, _),), err),) = living.finish()
        assert (code, error) == (0, None), err
        assert flat(batches) == list(range(N_SAMPLES))
        assert files_of(tmp_path / "living") == {}
        assert still_there(others) == set()  # the lock files of the one that ended well too
    finally:
        living.kill()
        killed.kill()


# As when its answer from the store broke off and was asked for again, and the other rank's was not.
SLOW_FIRST_RANK = """
import os, time
from composer_gpt2.data import shared_state
if os.environ["RANK"] == "0":
    remove = shared_state._remove_leftovers
    shared_state._remove_leftovers = lambda: (time.sleep(3), remove())
"""


def test_a_killed_run_goes_on_in_its_cache_also_if_the_first_rank_is_slow(corpus, tmp_path):
    jobs = jobs_for(2, tmp_path, remote=str(corpus))
    killed = Readers(2, jobs, wait_for=str(tmp_path / "never"))
    try:
        killed.wait_until_started()
    finally:
        killed.kill()
    assert files_of(tmp_path)  # nobody has cleaned up
    for code, results, err in Readers(2, jobs, before=SLOW_FIRST_RANK).finish():
        assert (code, [error for _, error, _ in results]) == (0, [None]), err
    assert files_of(tmp_path) == {}


def test_datasets_of_other_programs_are_left_alone(corpus, tmp_path):
    # streaming's own, which holds no lock by which it could be seen to live.
    stock = StreamingDataset(
        remote=str(corpus), local=str(tmp_path / "stock"), split="train", batch_size=4
    )
    files = files_of(tmp_path / "stock")
    assert files
    foreign = SHARED_MEMORY / f"999999_{threading.get_native_id()}"
    foreign.touch()
    try:
        StreamingTokens(
            remote=str(corpus), local=str(tmp_path / "ours"), sequence_length=T, batch_size=4
        )
        assert still_there(files) == files.keys()
        assert foreign.exists()
    finally:
        foreign.unlink()
    assert len(stock) == N_SAMPLES


def test_no_lock_files_are_left_in_the_temporary_folder(corpus, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    dataset = StreamingTokens(
        remote=str(corpus), local=str(tmp_path / "cache"), sequence_length=T, batch_size=4
    )
    assert flat(read(dataset)) == list(range(N_SAMPLES))
    assert list(temporary.iterdir()) == []
    assert any(name.endswith("cache_filelock") for name in files_of(tmp_path / "cache"))
