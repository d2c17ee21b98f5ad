"""Bring one file here from an object store or a folder.

mosaicml-streaming gives up on a transient fault after about a second, repeats hopeless requests,
and reads a missing bucket, a missing object and refused credentials as the same thing. For S3 we
ask with one GET, whose error codes tell them apart; other stores are reached through streaming's
own clients.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import urlparse

from composer_gpt2.data.retrying import call_with_retries

__all__ = ["download", "is_url", "read_bytes", "s3_client"]

_CONNECT_SECONDS = 5.0


def download(
    url: str,
    path: str,
    *,
    retries: int,
    timeout_seconds: float,
    stop: Callable[[], bool] = lambda: False,
    compare_checksum: bool = True,
) -> None:
    """Copy one file from an object store or a folder to ``path``, replacing what is there.

    Between attempts it waits as :func:`~composer_gpt2.data.retrying.call_with_retries` says. A
    missing file or refused credentials are not tried again.

    Args:
        url: Address of the file: ``s3://``, ``gs://``, ``oci://``, ``azure://``, ... or a path.
        path: Where to write it. After an error there may be a part of it.
        retries: Attempts after the first one.
        timeout_seconds: How long the store may stay silent within one attempt.
        stop: Asked while waiting; once true, the last error is raised without further attempts.
        compare_checksum: Whether content that differs from the checksum that S3 holds for it
            counts as a fault that may pass. Switch off where a hash is checked anyway.

    Raises:
        FileNotFoundError: There is no such bucket or file.
        PermissionError: Credentials are missing, wrong or not sufficient.
        ConnectionError: All attempts failed in another way.
        OSError: The disk of ``path`` is full or read-only.
    """
    call_with_retries(
        lambda: _download_once(url, path, timeout_seconds, compare_checksum),
        url,
        retries=retries,
        stop=stop,
    )


def read_bytes(url: str, *, retries: int, timeout_seconds: float) -> bytes:
    """Read one small file.

    Args:
        url: As for :func:`download`, which also lists what is raised.
        retries: Attempts after the first one.
        timeout_seconds: How long the store may stay silent within one attempt.

    Returns:
        Its content.
    """
    with tempfile.TemporaryDirectory(prefix="composer-gpt2-") as folder:
        path = os.path.join(folder, "file")
        download(url, path, retries=retries, timeout_seconds=timeout_seconds)
        with open(path, "rb") as file:
            return file.read()


def is_url(address: str) -> bool:
    """Whether ``address`` is in an object store, as against a folder of this machine."""
    return bool(urlparse(address).scheme)


def _download_once(url: str, path: str, timeout_seconds: float, compare_checksum: bool) -> None:
    if not is_url(url):
        shutil.copyfile(url, path)
    elif urlparse(url).scheme == "s3":
        _download_s3(url, path, timeout_seconds, compare_checksum)
    else:
        from streaming.base.storage import CloudDownloader

        if os.path.exists(path):
            os.remove(path)  # CloudDownloader would take it for the file
        CloudDownloader.direct_download(url, path, timeout_seconds)


def _download_s3(url: str, path: str, timeout_seconds: float, compare_checksum: bool) -> None:
    client = s3_client(
        os.environ.get("S3_ENDPOINT_URL"), timeout_seconds, compare_checksum, os.getpid()
    )
    address = urlparse(url)
    # The variable by which streaming lets the reader of a bucket pay for it.
    paid = os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")
    payer = {"RequestPayer": "requester"} if address.netloc in map(str.strip, paid) else {}
    answer = client.get_object(Bucket=address.netloc, Key=address.path.lstrip("/"), **payer)
    with open(path, "wb") as file:
        # The body knows its length and raises when the connection ends early.
        shutil.copyfileobj(answer["Body"], file, 1 << 20)


@lru_cache(maxsize=8)
def s3_client(
    endpoint_url: str | None, timeout_seconds: float, compare_checksum: bool, process_id: int
):
    """One client a process: clients may be shared by threads but not across a fork.

    Args:
        endpoint_url: ``None`` for Amazon's.
        timeout_seconds: How long it may stay silent.
        compare_checksum: As in :func:`download`.
        process_id: That of this process.
    """
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    session = boto3.Session()
    return session.client(
        "s3",
        endpoint_url=endpoint_url,
        config=Config(
            connect_timeout=min(timeout_seconds, _CONNECT_SECONDS),
            read_timeout=timeout_seconds,
            retries={"total_max_attempts": 1},  # `call_with_retries` counts the attempts
            # Public buckets are read without credentials.
            signature_version=None if session.get_credentials() else UNSIGNED,
            response_checksum_validation="when_supported" if compare_checksum else "when_required",
        ),
    )
