"""Streaming from a real S3 server: every way in which a shard can fail must end in an error.

Whatever may hang runs in processes of its own under a hard timeout.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
import weakref
from glob import glob
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_proxy import FaultyProxy
from streaming import MDSWriter

from composer_gpt2.data.local_s3 import local_s3_server
from composer_gpt2.data.streaming import ShardError, StreamingTokens, build_token_dataloader
from composer_gpt2.tokenizer import RANKS_SHA256

T = 32  # sequence length
N_SAMPLES = 112  # 8 shards of 14
SHARD_3 = set(range(42, 56))  # its samples
HARD_TIMEOUT_SECONDS = 240  # of a process, on a busy machine; what is asked of ours is below
BOUND_SECONDS = 25  # from the fault to the error, with one retry

# One rank, which reads an epoch of one or several datasets: it takes the first batch of each, waits
# for a file if told to, and reads on. Sample n begins with token n: what it prints is the order.
READER = """
import json, os, sys, time
import torch.distributed as dist
from composer_gpt2.data.streaming import ShardError, StreamingTokens, build_token_dataloader

jobs, wait_for = json.loads(sys.argv[1])
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    dist.init_process_group("gloo")
loaders = []
for job in jobs:
    num_workers = job.pop("num_workers", 0)
    loaders.append(build_token_dataloader(StreamingTokens(**job), num_workers=num_workers))
readers = [iter(loader) for loader in loaders]
firsts = []
for reader in readers:
    try:
        firsts.append([next(reader)["input_ids"][:, 0].tolist()])
    except ShardError as caught:  # another rank, which reads ahead, met the bad shard before
        firsts.append(str(caught))
print("started", flush=True)
while wait_for and not os.path.exists(wait_for):
    time.sleep(0.05)
failed = False
for first, reader in zip(firsts, readers):
    begin = time.monotonic()
    batches, error = ([], first) if isinstance(first, str) else (first, None)
    try:
        for batch in reader if error is None else ():
            batches.append(batch["input_ids"][:, 0].tolist())
    except ShardError as caught:
        error = str(caught)
    failed = failed or error is not None
    print(json.dumps([batches, error, time.monotonic() - begin]), flush=True)
if failed:
    time.sleep(2)  # on a busy machine the other rank is still in the barrier that we have left
sys.exit(3 if failed else 0)
"""


def write_corpus(folder, n_samples=N_SAMPLES, sequence_length=T, first=0, split="train", **options):
    """A corpus in ``folder``; sample n holds the tokens first + n, 1, 2, 3, ..."""
    options = {"hashes": ["xxh64"], "size_limit": 1200, **options}
    columns = {"tokens": f"ndarray:uint16:{sequence_length}"}
    with MDSWriter(out=str(folder / split), columns=columns, **options) as writer:
        for n in range(n_samples):
            tokens = np.arange(sequence_length, dtype=np.uint16)
            tokens[0] = first + n
            writer.write({"tokens": tokens})
    write_description(folder, sequence_length=sequence_length)
    return folder


def write_description(folder, tokenizer="gpt2", ranks_sha256=RANKS_SHA256, **changes):
    description = {
        "format": "composer-gpt2-corpus",
        "version": 1,
        "sequence_length": T,
        "dtype": "uint16",
        "tokenizer": {"name": tokenizer, "vocab_size": 50257, "ranks_sha256": ranks_sha256},
        **changes,
    }
    (folder / "corpus.json").write_text(json.dumps(description))


def upload(folder, server, bucket, prefix="corpus"):
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder)}"
            server.client().upload_file(str(path), bucket, key)
    return f"s3://{bucket}/{prefix}"


def corrupt(data: bytes) -> bytes:
    """The same length, one token changed: only the hash can tell."""
    return data[:-1] + bytes([data[-1] ^ 1])


def read(dataset, **options) -> list[list[int]]:
    loader = build_token_dataloader(dataset, **options)
    return [batch["input_ids"][:, 0].tolist() for batch in loader]


def flat(batches) -> list[int]:
    return [sample for batch in batches for sample in batch]


class Readers:
    """READER in one rank, once in the process itself and once in workers, or in two ranks."""

    def __init__(self, n_ranks, jobs, wait_for=None, before=""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(n_ranks):
            world = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": n_ranks,
                "LOCAL_WORLD_SIZE": n_ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": 1,
            }
            process = subprocess.Popen(
                [sys.executable, "-c", before + READER, json.dumps([jobs, wait_for])],
                env={**os.environ, **{key: str(value) for key, value in world.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self.processes.append(process)

    def wait_until_started(self):
        assert [process.stdout.readline() for process in self.processes] == [
            "started\n" for _ in self.processes
        ]

    def finish(self):
        """[(exit code, [(batches, error, seconds) of each job], stderr)] of each rank."""
        results = []
        try:
            for process in self.processes:
                out, err = process.communicate(timeout=HARD_TIMEOUT_SECONDS)
                jobs = [json.loads(line) for line in out.splitlines() if line != "started"]
                results.append((process.returncode, jobs, err))
        finally:
            self.kill()
        return results

    def kill(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def jobs_for(n_ranks, tmp_path, **options):
    """What the ranks read: with one rank two datasets, the second of them in workers."""
    return [
        {
            "sequence_length": T,
            "batch_size": 4 // n_ranks,
            "predownload": 4,
            "download_retry": 1,
            "download_timeout": 5,
            "num_workers": num_workers,
            "local": str(tmp_path / f"cache-{num_workers}"),
            **options,
        }
        for num_workers in ([0, 2] if n_ranks == 1 else [0])
    ]


def errors_of(results, n_jobs_of_a_rank):
    """The error of every job of every rank, after the checks that hold for all of them."""
    errors = []
    for code, jobs, err in results:
        assert code == 3, err
        assert len(jobs) == n_jobs_of_a_rank, err
        for batches, error, seconds in jobs:
            assert error is not None, f"it ended in silence after {len(batches)} batches"
            assert not set(flat(batches)) & SHARD_3
            assert seconds < BOUND_SECONDS
            errors.append(error)
    return errors


@pytest.fixture
def corpus(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    shards = json.loads((corpus / "train/index.json").read_text())["shards"]
    assert [shard["samples"] for shard in shards] == [14] * 8
    return corpus


@pytest.fixture
def remote(corpus, s3_server, s3_bucket):
    return upload(corpus, s3_server, s3_bucket)


# --- The four cases in which streaming 0.13 ends the epoch in silence, hangs, or trains on garbage


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_shard_missing_in_the_store_is_an_error(n_ranks, remote, s3_server, s3_bucket, tmp_path):
    s3_server.client().delete_object(Bucket=s3_bucket, Key="corpus/train/shard.00003.mds")
    jobs = jobs_for(n_ranks, tmp_path, remote=remote)
    for error in errors_of(Readers(n_ranks, jobs).finish(), len(jobs)):
        assert f"{remote}/train/shard.00003.mds must exist" in error
        assert "NoSuchKey" in error


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_shard_corrupted_in_the_store_is_an_error(
    n_ranks, remote, corpus, s3_server, s3_bucket, tmp_path
):
    data = corrupt((corpus / "train/shard.00003.mds").read_bytes())
    s3_server.client().put_object(Bucket=s3_bucket, Key="corpus/train/shard.00003.mds", Body=data)
    jobs = jobs_for(n_ranks, tmp_path, remote=remote)
    for error in errors_of(Readers(n_ranks, jobs).finish(), len(jobs)):
        assert f"Shard {remote}/train/shard.00003.mds must be what index.json says" in error
        assert "its xxh64 is" in error


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_shard_corrupted_in_the_cache_is_fetched_again(n_ranks, remote, corpus, tmp_path):
    good = (corpus / "train/shard.00003.mds").read_bytes()
    jobs = jobs_for(n_ranks, tmp_path, remote=remote)
    for job in jobs:
        local = job["local"]
        read(StreamingTokens(remote=remote, local=local, sequence_length=T, batch_size=4))
        path = Path(local, "train/shard.00003.mds")
        assert path.read_bytes() == good
        path.write_bytes(corrupt(good))

    results = Readers(n_ranks, jobs).finish()
    assert [code for code, _, _ in results] == [0] * n_ranks, results
    for i, job in enumerate(jobs):
        samples = [sample for _, done, _ in results for sample in flat(done[i][0])]
        assert sorted(samples) == list(range(N_SAMPLES))
        assert Path(job["local"], "train/shard.00003.mds").read_bytes() == good
    log = "".join(err for _, _, err in results)
    assert log.count("is bad (its xxh64 is") == len(jobs)  # one process found it, for all


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_an_endpoint_that_goes_away_in_mid_epoch_is_an_error(
    n_ranks, corpus, tmp_path, monkeypatch
):
    with local_s3_server() as server:
        for variable, value in server.environment.items():
            monkeypatch.setenv(variable, value)
        server.create_bucket("bucket")
        remote = upload(corpus, server, "bucket")
        jobs = jobs_for(n_ranks, tmp_path, remote=remote)
        readers = Readers(n_ranks, jobs, wait_for=str(tmp_path / "go"))
        readers.wait_until_started()
        server.stop()
        (tmp_path / "go").touch()
        for error in errors_of(readers.finish(), len(jobs)):
            assert f"{remote}/train/shard.0000" in error
            assert f"must be reachable, but 2 attempt(s) failed at {server.endpoint_url}" in error


def test_composers_launcher_ends_with_an_error_too(remote, s3_server, s3_bucket, tmp_path):
    s3_server.client().delete_object(Bucket=s3_bucket, Key="corpus/train/shard.00003.mds")
    (tmp_path / "reader.py").write_text(READER)
    jobs = [{"remote": remote, "sequence_length": T, "batch_size": 2}]
    result = subprocess.run(
        [
            str(Path(sys.executable).parent / "composer"),
            *("-n", "2", str(tmp_path / "reader.py"), json.dumps([jobs, None])),
        ],
        capture_output=True,
        text=True,
        timeout=HARD_TIMEOUT_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode != 0
    assert "shard.00003.mds must exist" in result.stdout + result.stderr
    assert "leaked" not in result.stdout + result.stderr


def test_a_corrupt_original_is_an_error_and_stays_where_it_is(corpus):
    path = corpus / "train/shard.00003.mds"
    path.write_bytes(corrupt(path.read_bytes()))
    dataset = StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=4)
    with pytest.raises(ShardError, match=rf"Shard {path} must be .* its xxh64 is"):
        read(dataset)
    assert path.exists()


def test_a_truncated_original_is_an_error(corpus):
    path = corpus / "train/shard.00003.mds"
    path.write_bytes(path.read_bytes()[:-7])
    dataset = StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=4)
    with pytest.raises(ShardError, match="bytes where the index says"):
        read(dataset)


def test_a_failure_ahead_of_a_slow_reader_is_an_error(corpus):
    (corpus / "train/shard.00003.mds").unlink()
    dataset = StreamingTokens(
        remote=str(corpus), sequence_length=T, batch_size=4, predownload=N_SAMPLES
    )
    # Between two batches the thread that reads ahead fails, before the reader comes to the shard.
    slowly = (time.sleep(0.3) for _ in build_token_dataloader(dataset))
    with pytest.raises(ShardError, match=r"shard\.00003\.mds must exist"):
        list(slowly)


def test_after_a_failure_the_dataset_says_so_again(corpus):
    (corpus / "train/shard.00003.mds").unlink()
    dataset = StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=4)
    for _ in range(2):
        with pytest.raises(ShardError, match=r"shard\.00003\.mds must exist"):
            read(dataset)


@pytest.mark.timeout(60)
def test_asking_for_one_sequence_fails_as_often_as_it_is_tried(corpus):
    shard = corpus / "train/shard.00003.mds"
    away = shard.rename(corpus / "away")
    dataset = StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=4)
    for _ in range(2):
        with pytest.raises(ShardError, match=r"shard\.00003\.mds must exist"):
            dataset[45]
    away.rename(shard)
    assert dataset[45]["input_ids"][0] == 45


def test_a_fault_that_passes_is_outlasted(corpus, s3_bucket, s3_server, monkeypatch):
    remote = upload(corpus, s3_server, s3_bucket)
    with FaultyProxy(s3_server.endpoint_url) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        dataset = StreamingTokens(remote=remote, sequence_length=T, batch_size=4, predownload=4)
        proxy.set("down")
        timer = threading.Timer(2, proxy.clear)
        timer.start()
        try:
            assert flat(read(dataset)) == list(range(N_SAMPLES))
        finally:
            timer.join()


# --- Order


# The number that a rank finds free is its own, as if another run had come or gone meanwhile.
OTHER_NUMBERS = """
import os
from streaming.base.shared import prefix

find = prefix._check_and_find_retrying
prefix._check_and_find_retrying = lambda *a, **k: find(*a, **k) + int(os.environ["RANK"])
"""


def test_ranks_agree_where_they_share_memory_while_other_runs_come_and_go(corpus, tmp_path):
    jobs = jobs_for(2, tmp_path, local=str(corpus))
    results = Readers(2, jobs, before=OTHER_NUMBERS).finish()
    for code, ((batches, error, _),), err in results:
        assert code == 0, err
        assert error is None
        assert len(batches) == N_SAMPLES // 4


def test_two_ranks_take_the_global_batches_of_one(corpus):
    options = {"remote": str(corpus), "sequence_length": T}
    jobs = [{**options, "batch_size": 4, "shuffle": shuffle} for shuffle in (False, True)]
    results = Readers(2, jobs).finish()
    assert [code for code, _, _ in results] == [0, 0], results
    for i, shuffle in enumerate((False, True)):
        one = read(StreamingTokens(**options, batch_size=8, shuffle=shuffle))
        ranks = [done[i][0] for _, done, _ in results]
        two = [sorted(a + b) for a, b in zip(*ranks, strict=True)]
        assert two == [sorted(batch) for batch in one]
        assert sorted(flat(one)) == list(range(N_SAMPLES))
        assert (flat(one) == list(range(N_SAMPLES))) is not shuffle


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resume_in_mid_epoch_gives_the_next_samples(num_workers, corpus):
    def make():
        dataset = StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=8, shuffle=True)
        return build_token_dataloader(dataset, num_workers=num_workers)

    whole = [batch["input_ids"][:, 0].tolist() for batch in make()]
    loader = make()
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    del batches, loader
    resumed = make()
    resumed.load_state_dict(state)
    assert [batch["input_ids"][:, 0].tolist() for batch in resumed] == whole[5:]
    following = [batch["input_ids"][:, 0].tolist() for batch in resumed]
    assert sorted(flat(following)) == list(range(N_SAMPLES))
    assert following != whole  # another epoch, another order


def test_streams_are_mixed_by_proportion_whatever_their_order_in_the_recipe(tmp_path):
    write_corpus(tmp_path / "a")
    write_corpus(tmp_path / "b", first=1000)
    streams = {
        "a": {"remote": str(tmp_path / "a"), "proportion": 3},
        "b": {"remote": str(tmp_path / "b"), "proportion": 1},
    }
    orders = []
    for mixture in (streams, dict(reversed(streams.items()))):
        dataset = StreamingTokens(streams=mixture, sequence_length=T, batch_size=8, shuffle=True)
        orders.append(flat(read(dataset)))
    assert orders[0] == orders[1]
    assert len(orders[0]) == 2 * N_SAMPLES
    assert sum(token < 1000 for token in orders[0]) == 3 * 2 * N_SAMPLES // 4


def test_streams_come_as_often_as_they_are_repeated(tmp_path):
    write_corpus(tmp_path / "a")
    write_corpus(tmp_path / "b", first=1000)
    streams = {
        "a": {"remote": str(tmp_path / "a"), "repeat": 2},
        "b": {"remote": str(tmp_path / "b"), "repeat": 0.5},
    }
    dataset = StreamingTokens(streams=streams, sequence_length=T, batch_size=8, shuffle=True)
    tokens = flat(read(dataset))
    assert sorted(token for token in tokens if token < 1000) == sorted(2 * list(range(N_SAMPLES)))
    half = [token for token in tokens if token >= 1000]
    assert len(set(half)) == len(half) == N_SAMPLES // 2


def test_a_second_iteration_ends_the_first_with_an_error(corpus):
    dataset = StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=4)
    first = iter(dataset)
    next(first)
    next(iter(dataset))
    with pytest.raises(ShardError, match="second iteration"):
        list(first)


def test_an_epoch_left_early_is_followed_by_a_whole_one(remote):
    dataset = StreamingTokens(remote=remote, sequence_length=T, batch_size=4, predownload=4)
    for _ in build_token_dataloader(dataset):
        break
    assert flat(read(dataset)) == list(range(N_SAMPLES))
    assert flat(read(dataset, num_workers=2)) == list(range(N_SAMPLES))  # forked after threads ran
    assert dataset[5]["input_ids"][0] == 5


def test_a_dataset_left_in_mid_epoch_ends_its_threads_and_is_freed(corpus):
    dataset = StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=4, predownload=4)
    for _ in build_token_dataloader(dataset):
        break
    reference = weakref.ref(dataset)
    del dataset
    deadline = time.monotonic() + 10
    while reference() is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert reference() is None


def test_batches_are_int64_and_labels_are_the_inputs(corpus):
    dataset = StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that are not writable
        batch = next(iter(build_token_dataloader(dataset)))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (8, T)
    assert batch["input_ids"].dtype == torch.int64
    assert batch["labels"] is batch["input_ids"]
    assert batch["input_ids"][3].tolist() == [3, *range(1, T)]


def test_drop_last(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", n_samples=20)
    dataset = StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=8)
    assert [len(batch) for batch in read(dataset)] == [8, 8, 4]
    assert [len(batch) for batch in read(dataset, drop_last=True)] == [8, 8]


# --- What is refused before any work


def refused(corpus, **options):
    options = {"remote": str(corpus), "sequence_length": T, "batch_size": 4, **options}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at its text
        StreamingTokens(**options)
    return str(caught.value)


def test_another_sequence_length_is_refused_also_a_multiple(corpus):
    for length in (16, 64):
        message = refused(corpus, sequence_length=length)
        assert f"must have the column tokens:ndarray:uint16:{length}" in message
        assert "got tokens:ndarray:uint16:32" in message
        assert f"sequence_length must be {length}, but corpus.json says 32" in message


def test_another_dtype_or_column_is_refused(tmp_path):
    for column, encoding in (("tokens", "ndarray:int32:32"), ("ids", "ndarray:uint16:32")):
        corpus = tmp_path / column
        with MDSWriter(
            out=str(corpus / "train"), columns={column: encoding}, hashes=["xxh64"]
        ) as w:
            for _ in range(8):
                w.write({column: np.zeros(32, encoding.split(":")[1])})
        write_description(corpus)
        message = refused(corpus)
        assert "must have the column tokens:ndarray:uint16:32" in message
        assert f"got {column}:{encoding}" in message


def test_another_tokenizer_is_refused_by_name_and_by_its_ranks(corpus):
    write_description(corpus, tokenizer="llama")
    message = refused(corpus)
    assert "must be 'gpt2', but corpus.json says 'llama'" in message
    write_description(corpus, ranks_sha256="abc")
    message = refused(corpus)
    assert f"must be '{RANKS_SHA256}', but corpus.json says 'abc'" in message
    StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=4, check_tokenizer=False)


def test_shards_of_other_tools_are_read_only_when_told_to(corpus):
    (corpus / "corpus.json").unlink()
    assert "pass check_tokenizer=False" in refused(corpus)
    StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=4, check_tokenizer=False)


def test_shards_without_hashes_are_read_only_when_told_to(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", hashes=None)
    assert "StreamingTokens(check_hashes=False)" in refused(corpus)
    dataset = StreamingTokens(
        remote=str(corpus), sequence_length=T, batch_size=4, check_hashes=False
    )
    assert flat(read(dataset)) == list(range(N_SAMPLES))


def test_less_than_one_global_batch_is_refused(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", n_samples=10)
    message = refused(corpus, batch_size=11)
    assert "at least one global batch (11 sequences), got 10" in message
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "global batch (12 sequences), got 10" in refused(corpus, batch_size=6)


def test_a_cache_limit_on_the_only_copy_is_refused(corpus, tmp_path):
    message = refused(corpus, cache_limit="1gb")
    assert "the only copy would be deleted" in message
    assert "the only copy" in refused(corpus, local=str(corpus), cache_limit="1gb")
    message = refused(corpus, remote=None, local=str(corpus), cache_limit=10**9)
    assert "the only copy" in message


def test_contradicting_arguments_are_refused(corpus):
    assert "at least 1 sequence, got 0" in refused(corpus, batch_size=0)
    streams = {"a": {"remote": str(corpus)}}
    assert "got both" in refused(corpus, streams=streams)
    streams = {"a": {"remote": str(corpus), "weight": 1}}
    assert "got ['weight']" in refused(corpus, remote=None, streams=streams)
    streams = {"a": {"proportion": 1}}
    assert "got nothing" in refused(corpus, remote=None, streams=streams)
    streams = {"a": {"remote": str(corpus), "proportion": 0}}
    assert "above 0, got 0" in refused(corpus, remote=None, streams=streams)
    streams = {"a": {"remote": str(corpus), "proportion": 1, "repeat": 2}}
    assert "stand without a proportion" in refused(corpus, remote=None, streams=streams)
    streams = {"a": {"remote": str(corpus), "proportion": 1}, "b": {"remote": str(corpus)}}
    assert "or none of them" in refused(corpus, remote=None, streams=streams)


def test_all_mistakes_come_in_one_message(corpus):
    write_description(corpus, tokenizer="llama")
    message = refused(corpus, sequence_length=64, cache_limit="1gb", batch_size=1000)
    for part in ("ndarray:uint16:64", "'llama'", "the only copy", "one global batch"):
        assert part in message


def test_a_broken_index_is_refused(corpus):
    (corpus / "train/index.json").write_text("{")
    assert "must be JSON objects" in refused(corpus)
    (corpus / "train/index.json").write_text('{"version": 2, "shards": [{"format": "csv"}]}')
    assert "must be of MDS shards" in refused(corpus)


def test_a_missing_split_or_folder_is_named(corpus, tmp_path):
    options = {"sequence_length": T, "batch_size": 4}
    with pytest.raises(FileNotFoundError, match=r"corpus/test/index\.json must exist"):
        StreamingTokens(remote=str(corpus), split="test", **options)
    with pytest.raises(FileNotFoundError, match=r"nothing/train/index\.json must exist"):
        StreamingTokens(local=str(tmp_path / "nothing"), **options)


# --- The store


def fails_within_15_seconds(kind, match, remote, **options):
    begin = time.monotonic()
    with pytest.raises(kind, match=match):
        StreamingTokens(remote=remote, sequence_length=T, batch_size=4, **options)
    assert time.monotonic() - begin < 15


def test_a_missing_bucket_is_named(s3_bucket):
    fails_within_15_seconds(
        FileNotFoundError, "no bucket 'no-such-bucket'", "s3://no-such-bucket/x"
    )


def test_a_missing_corpus_is_named(s3_bucket):
    match = rf"s3://{s3_bucket}/x/train/index\.json must exist.*NoSuchKey"
    fails_within_15_seconds(FileNotFoundError, match, f"s3://{s3_bucket}/x")


def test_wrong_credentials_are_told_from_a_missing_object(corpus, monkeypatch):
    with local_s3_server() as server:
        server.create_bucket("bucket")
        remote = upload(corpus, server, "bucket")
        # From now on moto checks signatures against its users, of which there are none.
        url = f"{server.endpoint_url}/moto-api/reset-auth"
        text = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, data=b"0", headers=text)).close()
        for variable, value in server.environment.items():
            monkeypatch.setenv(variable, value)
        fails_within_15_seconds(PermissionError, "credentials.*AWS_ACCESS_KEY_ID", remote)


def test_a_closed_port_is_an_unreachable_endpoint(s3_bucket, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
    match = f"must be reachable.*{endpoint}"
    fails_within_15_seconds(ConnectionError, match, "s3://bucket/x", download_retry=1)


def test_a_server_that_never_answers_is_an_unreachable_endpoint(s3_bucket, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
        options = {"download_retry": 1, "download_timeout": 5}
        fails_within_15_seconds(ConnectionError, "ReadTimeout", "s3://bucket/x", **options)


# --- The cache


def test_a_folder_is_read_in_place(corpus, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    for options in ({"remote": str(corpus)}, {"local": str(corpus)}):
        dataset = StreamingTokens(**options, sequence_length=T, batch_size=4)
        assert flat(read(dataset)) == list(range(N_SAMPLES))
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before
    assert not (tmp_path / "cache").exists()


def test_a_folder_can_be_copied_to_a_faster_disk(corpus, tmp_path):
    dataset = StreamingTokens(
        remote=str(corpus), local=str(tmp_path / "fast"), sequence_length=T, batch_size=4
    )
    assert flat(read(dataset)) == list(range(N_SAMPLES))
    assert len(list((tmp_path / "fast/train").glob("*.mds"))) == 8


def test_packed_shards_are_unpacked_into_the_cache_only(tmp_path, s3_server, s3_bucket):
    corpus = write_corpus(tmp_path / "corpus", compression="zstd")
    before = set(corpus.rglob("*"))
    for remote in (str(corpus), upload(corpus, s3_server, s3_bucket)):
        dataset = StreamingTokens(remote=remote, sequence_length=T, batch_size=4)
        assert flat(read(dataset)) == list(range(N_SAMPLES))
    assert set(corpus.rglob("*")) == before
    assert {path.suffix for path in (tmp_path / "cache").rglob("*.*")} == {".mds", ".json"}


def test_a_corpus_that_was_replaced_is_not_read_from_the_old_cache(
    tmp_path, remote, s3_server, s3_bucket
):
    options = {"remote": remote, "sequence_length": T, "batch_size": 4}
    assert flat(read(StreamingTokens(**options))) == list(range(N_SAMPLES))
    upload(write_corpus(tmp_path / "new", first=500), s3_server, s3_bucket)
    assert flat(read(StreamingTokens(**options))) == list(range(500, 500 + N_SAMPLES))


def test_a_cache_folder_of_another_corpus_is_refused(tmp_path, corpus):
    local = str(tmp_path / "mine")
    StreamingTokens(remote=str(corpus), local=local, sequence_length=T, batch_size=4)
    other = write_corpus(tmp_path / "other", first=500)
    message = refused(other, local=local)
    assert f"hold shards of {other}, got those of {corpus}" in message
    index = corpus / "train/index.json"
    index.write_bytes(index.read_bytes() + b"\n")  # the same address, another content
    assert "got those of an older version of it" in refused(corpus, local=local)
    # A corpus itself, which was never a cache, for example by a wrong `local`.
    message = refused(other, local=str(corpus))
    assert f"{corpus}/train must be empty" in message
    assert "got those of another corpus, which does not say where it is from" in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_limit_is_kept(num_workers, tmp_path, remote, corpus):
    # 4 of 8 shards fit beside the index; a shuffled order comes back to all of them.
    index_bytes = (corpus / "train/index.json").stat().st_size
    shard_bytes = max(path.stat().st_size for path in (corpus / "train").glob("*.mds"))
    limit = index_bytes + 4 * shard_bytes
    options = {"remote": remote, "sequence_length": T, "batch_size": 4, "predownload": 4}
    for _ in range(2):  # the second begins with what the first left
        dataset = StreamingTokens(**options, cache_limit=limit, shuffle=True)
        assert sorted(flat(read(dataset, num_workers=num_workers))) == list(range(N_SAMPLES))
        used = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.*"))
        n_fetching = 2 * max(1, num_workers)  # threads, each of which may exceed it by a shard
        assert index_bytes + shard_bytes <= used <= limit + n_fetching * shard_bytes
        del dataset


# --- Shared memory


def test_a_killed_run_does_not_block_the_next_and_a_live_one_is_not_disturbed(
    remote, tmp_path, monkeypatch
):
    # streaming looks for a conflict only where it finds no lock files: after a reboot, in another
    # container, or with a TMPDIR for each job, as here.
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "theirs"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "ours"))
    options = {"remote": remote, "sequence_length": T, "batch_size": 4}

    def their_segments():
        cache = str(tmp_path / "cache").encode()
        return [path for path in glob("/dev/shm/*_locals") if cache in Path(path).read_bytes()]

    readers = Readers(1, [options], wait_for=str(tmp_path / "never"))
    readers.wait_until_started()
    with pytest.raises(ValueError, match="used by one dataset at a time"):
        StreamingTokens(**options)
    assert readers.processes[0].poll() is None
    assert len(their_segments()) == 1
    readers.kill()  # the whole session, Python's resource tracker included
    assert len(their_segments()) == 1  # nobody has cleaned up
    dataset = StreamingTokens(**options)
    assert len(their_segments()) == 1  # ours
    assert flat(read(dataset)) == list(range(N_SAMPLES))
