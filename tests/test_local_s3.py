from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from composer_gpt2.data.local_s3 import local_s3_server


def _answers(endpoint_url: str) -> bool:
    host, port = endpoint_url.removeprefix("http://").split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def test_objects_can_be_stored_and_read_through_the_environment(s3_bucket):
    # The fixture has set the environment from LocalS3.environment; boto3 is told nothing else.
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    client.put_object(Bucket=s3_bucket, Key="a/b", Body=b"tokens")
    assert client.get_object(Bucket=s3_bucket, Key="a/b")["Body"].read() == b"tokens"


def test_it_listens_on_the_loopback_interface_only(s3_server):
    assert s3_server.endpoint_url.startswith("http://127.0.0.1:")


def test_a_proxy_of_the_user_is_not_asked(s3_server, monkeypatch):
    monkeypatch.setenv("no_proxy", "intranet")
    assert s3_server.environment["no_proxy"] == "intranet,127.0.0.1"


def test_it_is_gone_after_the_block_also_when_the_block_raises():
    with contextlib.suppress(KeyError), local_s3_server() as server:
        assert _answers(server.endpoint_url)
        raise KeyError
    assert not _answers(server.endpoint_url)


def test_it_can_come_back_on_the_same_port():
    with local_s3_server() as first:
        port = int(first.endpoint_url.rsplit(":", 1)[1])
    with local_s3_server(port) as second:
        assert second.endpoint_url == first.endpoint_url
        assert _answers(second.endpoint_url)


def test_a_port_in_use_is_one_clear_error_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match=f"did not start on port {port}"):
            local_s3_server(port).__enter__()
    assert time.monotonic() - begin < 30


def test_it_dies_with_a_parent_that_is_killed():
    program = (
        "from composer_gpt2.data.local_s3 import local_s3_server\n"
        "import time\n"
        "with local_s3_server() as server:\n"
        "    print(server.endpoint_url, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        endpoint_url = parent.stdout.readline().strip()
        assert _answers(endpoint_url)
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        deadline = time.monotonic() + 20
        while _answers(endpoint_url) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not _answers(endpoint_url)
