"""Faults of an object store, made by a proxy in front of a real S3 server."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy, ProxyControl
from test_streaming import (
    HARD_TIMEOUT_SECONDS,
    N_SAMPLES,
    SHARD_3,
    Readers,
    T,
    errors_of,
    flat,
    jobs_for,
    read,
    upload,
    write_corpus,
)

from composer_gpt2.data.object_store import open_store
from composer_gpt2.data.retrying import DEFAULT_RETRIES, retry_seconds
from composer_gpt2.data.streaming import ShardError, StreamingTokens, build_token_dataloader

SOON_SECONDS = 10  # for what is no use to try again; with retries it would be two minutes


@pytest.fixture
def proxy(s3_server, s3_bucket, monkeypatch):
    with FaultyProxy(s3_server.endpoint_url) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def remote(proxy, s3_server, s3_bucket, tmp_path):
    return upload(write_corpus(tmp_path / "corpus"), s3_server, s3_bucket)


def make(remote, **options):
    return StreamingTokens(remote=remote, sequence_length=T, batch_size=4, **options)


# --- Reading in mid-epoch


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("status", {"status": 503}),
        ("status", {"status": 500}),
        ("status", {"status": 429}),
        ("reset", {}),
        ("truncate", {}),
        ("stall", {}),
        ("slow", {"seconds": 0.5}),
    ],
)
def test_a_fault_that_passes_is_tried_again(kind, options, proxy, remote, caplog):
    dataset = make(remote, download_timeout=1)
    times = 2 if options == {"status": 503} else 1
    proxy.set(kind, path=r"shard\.00003", times=times, **options)
    with caplog.at_level(logging.WARNING):
        assert flat(read(dataset)) == list(range(N_SAMPLES))
    assert proxy.hits()[kind] == times
    texts = [record.getMessage() for record in caplog.records]
    if kind != "slow":  # however often it was tried: one line when it begins, one when it is over
        assert len(texts) == 2, texts
        assert "shard.00003.mds must be reachable, but 1 attempt(s) failed" in texts[0]
        assert "Trying again for 121 s." in texts[0]
        assert "shard.00003.mds is readable again after" in texts[1]


@pytest.mark.parametrize("kind", ["corrupt", "shorten"])
def test_a_shard_that_comes_bad_once_is_fetched_again(kind, proxy, remote, caplog):
    dataset = make(remote)
    proxy.set(kind, path=r"shard\.00003", times=1)
    assert flat(read(dataset)) == list(range(N_SAMPLES))
    assert proxy.hits()[kind] == 1
    assert "shard.00003.mds came bad" in caplog.text


@pytest.mark.parametrize("kind", ["corrupt", "shorten"])
def test_a_shard_that_comes_bad_twice_is_an_error_soon(kind, proxy, remote):
    dataset = make(remote)
    proxy.set(kind, path=r"shard\.00003")
    begin, samples = time.monotonic(), []
    batches = build_token_dataloader(dataset)
    with pytest.raises(ShardError, match=r"shard\.00003\.mds must be what .* \(fetched 2 times\)"):
        samples.extend(flat(batch["input_ids"][:, :1].tolist() for batch in batches))
    assert time.monotonic() - begin < SOON_SECONDS
    assert proxy.hits()[kind] == 2
    assert not set(samples) & SHARD_3


def test_two_ranks_outlast_an_outage_in_mid_epoch(proxy, remote, tmp_path):
    jobs = jobs_for(2, tmp_path, remote=remote, download_retry=DEFAULT_RETRIES)
    readers = Readers(2, jobs, wait_for=str(tmp_path / "go"))
    readers.wait_until_started()
    proxy.set("down")
    (tmp_path / "go").touch()
    time.sleep(4)
    proxy.clear()
    results = readers.finish()
    assert [code for code, _, _ in results] == [0, 0], results
    samples = [sample for _, jobs, _ in results for sample in flat(jobs[0][0])]
    assert sorted(samples) == list(range(N_SAMPLES))
    assert any("is readable again after" in err for _, _, err in results)


def test_two_ranks_end_soon_when_access_is_denied_in_mid_epoch(proxy, remote, tmp_path):
    jobs = jobs_for(2, tmp_path, remote=remote, download_retry=DEFAULT_RETRIES)
    readers = Readers(2, jobs, wait_for=str(tmp_path / "go"))
    readers.wait_until_started()
    proxy.set("deny", path=r"shard\.00003")
    (tmp_path / "go").touch()
    for error in errors_of(readers.finish(), 1):
        assert f"Shard shard.00003.mds cannot be had: {remote}/train/shard.00003.mds must be" in (
            error
        )
        assert "access was refused" in error


def test_the_default_outlasts_two_minutes():
    default = inspect.signature(StreamingTokens).parameters["download_retry"].default
    assert retry_seconds(default) >= 120


def test_a_process_that_is_interrupted_does_not_wait_for_the_store(proxy, remote):
    program = """
import sys
from composer_gpt2.data.streaming import StreamingTokens, build_token_dataloader
dataset = StreamingTokens(remote=sys.argv[1], sequence_length=32, batch_size=4, predownload=4)
for batch in build_token_dataloader(dataset):
    print("batch", flush=True)
    if batch["input_ids"][0, 0] == 0:
        sys.stdin.readline()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, remote],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "batch\n"
        proxy.set("down")
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        _, err = process.communicate(timeout=HARD_TIMEOUT_SECONDS)
    finally:
        process.kill()
    assert time.monotonic() - begin < SOON_SECONDS
    assert "Trying again" in err
    assert "KeyboardInterrupt" in err


# --- At the start


def test_an_index_is_tried_again(proxy, remote):
    for kind in ("status", "truncate", "corrupt"):  # the last is found by S3's own checksum
        proxy.set(kind, path=r"index\.json", times=1)
        assert len(make(remote)) == N_SAMPLES
        assert proxy.hits()[kind] == 1


def test_refused_credentials_are_an_error_soon(proxy, remote):
    proxy.set("deny")
    begin = time.monotonic()
    with pytest.raises(PermissionError, match=r"index\.json must be readable"):
        make(remote)
    assert time.monotonic() - begin < SOON_SECONDS
    assert proxy.hits()["deny"] == 1


# --- Writing


@pytest.mark.parametrize(
    ("kind", "options"),
    [("status", {"status": 503}), ("status", {"status": 429}), ("reset", {"method": "PUT|GET"})],
)
def test_a_store_outlasts_faults_that_pass(kind, options, proxy, s3_bucket):
    proxy.set(kind, times=1, **{"method": "HEAD", **options})  # reset is for bodies only
    proxy.set("truncate", path="/second", method="GET", times=1)
    with open_store(f"s3://{s3_bucket}/run") as store:
        proxy.set(kind, times=2, **{"method": "PUT", **options})
        store.put_bytes("first", b"1" * 1000)
        store.put_bytes("second", b"2" * 1000)
        proxy.set(kind, times=1, **{"method": "GET", **options})
        assert store.names() == {"first", "second"}
        assert store.read_bytes("second") == b"2" * 1000
        proxy.set("status", method="DELETE", times=1)
        store.delete(["first"])
        assert store.names() == {"second"}
    assert proxy.hits()["truncate"] == 1
    assert proxy.hits()[kind] >= 3


def test_a_store_that_is_down_for_a_moment_is_waited_for(proxy, s3_bucket):
    proxy.set("down")
    threading.Timer(2, proxy.clear).start()
    with open_store(f"s3://{s3_bucket}/run") as store:
        proxy.set("down")
        threading.Timer(2, proxy.clear).start()
        store.put_bytes("a", b"1")
        assert store.read_bytes("a") == b"1"


def test_a_store_that_refuses_says_so_soon(proxy, s3_bucket):
    url = f"s3://{s3_bucket}/run"
    with open_store(url) as store:
        store.put_bytes("a", b"1")
        proxy.set("deny")
        begin = time.monotonic()
        with pytest.raises(PermissionError, match=f"{url}/b must be writable"):
            store.put_bytes("b", b"1")
        with pytest.raises(PermissionError, match=f"{url}/a must be readable"):
            store.read_bytes("a")
        with pytest.raises(PermissionError, match=f"{url} must be readable"):
            store.names()
        with pytest.raises(PermissionError, match=f"{url}/a must be writable"):
            store.delete(["a"])
        with pytest.raises(PermissionError, match=r"refuses access.*403"):
            open_store(url)
        proxy.clear()
        with pytest.raises(FileNotFoundError, match=f"{url}/c must exist"):
            store.read_bytes("c")
        with pytest.raises(FileNotFoundError, match="There must be a bucket 'no-such-bucket'"):
            open_store("s3://no-such-bucket/run")
        assert time.monotonic() - begin < SOON_SECONDS
        assert store.names() == {"a"}


def test_a_store_that_stays_down_is_an_error_that_says_how_to_go_on(proxy, s3_bucket):
    with open_store(f"s3://{s3_bucket}/run", retries=1) as store:
        proxy.set("status", status=503)
        with pytest.raises(ConnectionError, match=r"2 attempt\(s\) failed.*start the same command"):
            store.put_bytes("a", b"1")
        with pytest.raises(ConnectionError, match=r"cannot be reached.*503"):
            open_store(f"s3://{s3_bucket}/run", open_retries=1)


def test_messages_say_what_is_stored(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="A checkpoint must be in a folder"):
        open_store(str(tmp_path / "file"), what="A checkpoint")
    with pytest.raises(ValueError, match="A checkpoint must be in a folder or at an address"):
        open_store("ftp://x", what="A checkpoint")


# --- The disk of the cache


def test_a_full_disk_names_disk_and_shard_and_leaves_the_others_whole(proxy, remote, tmp_path):
    local = tmp_path / "cache"
    dataset = make(remote, local=str(local))
    path = local / "train/shard.00003.mds"
    part = Path(f"{path}.part-{socket.gethostname()}-{os.getpid()}")
    part.symlink_to("/dev/full")  # on which the kernel answers ENOSPC
    with pytest.raises(ShardError) as caught:
        read(dataset)
    assert f"Shard shard.00003.mds cannot be had: [Errno {errno.ENOSPC}] {path} must be" in str(
        caught.value
    )
    assert "the disk mounted at /" in str(caught.value)
    assert not path.exists()
    assert not list(local.rglob("*.part-*"))
    for shard in (local / "train").glob("*.mds"):
        assert shard.read_bytes() == (tmp_path / "corpus/train" / shard.name).read_bytes()
    assert flat(read(make(remote, local=str(tmp_path / "other")))) == list(range(N_SAMPLES))


def test_a_small_disk_that_runs_full(proxy, remote, tmp_path):
    local = tmp_path / "small"
    local.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(local)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.raises(ShardError, match=rf"the disk mounted at {local} takes no more"):
            read(make(remote, local=str(local)))
        assert not list(local.rglob("*.part-*"))
        shards = list(local.rglob("*.mds"))
        assert shards
        for shard in shards:
            assert shard.read_bytes() == (tmp_path / "corpus/train" / shard.name).read_bytes()
    finally:
        subprocess.run(["umount", "--lazy", str(local)], check=True)


def test_part_files_of_dead_processes_are_removed(proxy, remote, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = tmp_path / "cache/train"
    folder.mkdir(parents=True)
    host = socket.gethostname()
    kept = {f"a.mds.part-{host}-{os.getpid()}", "b.mds.part-elsewhere-1", "keep.txt"}
    for name in (*kept, f"c.mds.part-{host}-{dead.pid}", "d.mds.part-elsewhere-1"):
        (folder / name).touch()
    os.utime(folder / "d.mds.part-elsewhere-1", (0, 0))
    make(remote, local=str(tmp_path / "cache"))
    assert {path.name for path in folder.iterdir()} == kept | {"index.json", "cached-from"}


# --- The proxy itself


def test_the_proxy_runs_as_a_program_too(s3_server, s3_bucket, monkeypatch):
    path = Path(__file__).with_name("faulty_proxy.py")
    process = subprocess.Popen(
        [sys.executable, str(path), s3_server.endpoint_url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        url, control_url = process.stdout.readline().split()
        monkeypatch.setenv("S3_ENDPOINT_URL", url)
        control = ProxyControl(control_url)
        control.set("status", times=1)
        with open_store(f"s3://{s3_bucket}/run") as store:
            store.put_bytes("a", json.dumps({}).encode())
            assert store.read_bytes("a") == b"{}"
        assert control.hits()["status"] == 1
        control.set("down")
        with pytest.raises(ConnectionError):
            open_store(f"s3://{s3_bucket}/run", open_retries=0)
        control.clear()
        open_store(f"s3://{s3_bucket}/run").close()
