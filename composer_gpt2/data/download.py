"""Bring one file of a corpus here: try again what may pass, explain at once what will not.

mosaicml-streaming gives up on a transient fault after about a second, repeats hopeless requests,
and reads a missing bucket, a missing object and refused credentials as the same thing. For S3 we
ask with one GET, whose error codes tell them apart; other stores are reached through streaming's
own clients.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from urllib.parse import urlparse

__all__ = ["download", "is_url", "read_bytes"]

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_LONGEST_DELAY_SECONDS = 30.0
_TRANSIENT_STATUSES = {408, 425, 429}  # of the 4xx; all 5xx are transient too
_HERE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # faults of our disk, not of the remote
_jitter = random.SystemRandom()  # leaves the seeded generator of the training run alone


def download(
    url: str,
    path: str,
    *,
    retries: int,
    timeout_seconds: float,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Copy one file from an object store or a folder to ``path``, replacing what is there.

    Between attempts it waits 1, 2, 4, ... seconds (at most 30), so 5 retries outlast a fault of
    half a minute. A missing file or refused credentials are not tried again.

    Args:
        url: Address of the file: ``s3://``, ``gs://``, ``oci://``, ``azure://``, ... or a path.
        path: Where to write it. After an error there may be a part of it.
        retries: Attempts after the first one.
        timeout_seconds: How long the store may stay silent within one attempt.
        stop: Asked while waiting; once true, the last error is raised without further attempts.

    Raises:
        FileNotFoundError: There is no such bucket or file.
        PermissionError: Credentials are missing, wrong or not sufficient.
        ConnectionError: All attempts failed in another way.
        OSError: The disk of ``path`` is full or read-only.
    """
    for attempt in count():
        try:
            _download_once(url, path, timeout_seconds)
            return
        except Exception as error:  # every store has exceptions of its own: _explain sorts them
            if isinstance(error, OSError) and error.errno in _HERE:
                raise
            failure, may_pass = _explain(error, url, attempts=attempt + 1)
            if not may_pass or attempt == retries or stop():
                raise failure from error
            delay = min(2.0**attempt, _LONGEST_DELAY_SECONDS) * _jitter.uniform(1.0, 1.25)
            log.warning(
                "%s Trying again in %.0f s (%d of %d).", failure, delay, attempt + 1, retries
            )
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline and not stop():
            time.sleep(0.05)


def read_bytes(url: str, *, retries: int = 1, timeout_seconds: float = 5.0) -> bytes:
    """Read one small file; the defaults report an unusable remote within 15 seconds.

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


def _download_once(url: str, path: str, timeout_seconds: float) -> None:
    if not is_url(url):
        shutil.copyfile(url, path)
    elif urlparse(url).scheme == "s3":
        _download_s3(url, path, timeout_seconds)
    else:
        from streaming.base.storage import CloudDownloader

        if os.path.exists(path):
            os.remove(path)  # CloudDownloader would take it for the file
        CloudDownloader.direct_download(url, path, timeout_seconds)


def _download_s3(url: str, path: str, timeout_seconds: float) -> None:
    client = _s3_client(os.environ.get("S3_ENDPOINT_URL"), timeout_seconds, os.getpid())
    address = urlparse(url)
    # The variable by which streaming lets the reader of a bucket pay for it.
    paid = os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")
    payer = {"RequestPayer": "requester"} if address.netloc in map(str.strip, paid) else {}
    answer = client.get_object(Bucket=address.netloc, Key=address.path.lstrip("/"), **payer)
    with open(path, "wb") as file:
        # The body knows its length and raises when the connection ends early.
        shutil.copyfileobj(answer["Body"], file, 1 << 20)


@lru_cache(maxsize=8)
def _s3_client(endpoint_url: str | None, timeout_seconds: float, process_id: int):
    """One client a process: clients may be shared by threads but not across a fork."""
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
            retries={"total_max_attempts": 1},  # `download` counts the attempts
            # Public buckets are read without credentials.
            signature_version=None if session.get_credentials() else UNSIGNED,
        ),
    )


def _explain(error: Exception, url: str, attempts: int) -> tuple[OSError, bool]:
    """What to tell the user, and whether another attempt may succeed."""
    status = _http_status(error)
    endpoint = os.environ.get("S3_ENDPOINT_URL", "Amazon S3 (S3_ENDPOINT_URL is not set)")
    store = f" at {endpoint}" if urlparse(url).scheme == "s3" else ""
    cause = f"{type(error).__name__}: {error}"
    if "NoSuchBucket" in cause:
        bucket = urlparse(url).netloc
        message = (
            f"{url} must be in a bucket that exists, but there is no bucket {bucket!r}{store}; "
            "check its name and the endpoint."
        )
        return FileNotFoundError(message), False
    if status == 404 or isinstance(error, FileNotFoundError):
        message = f"{url} must exist, but it was not found{store} ({cause}); check the address."
        return FileNotFoundError(message), False
    if status in (401, 403) or isinstance(error, PermissionError):
        message = (
            f"{url} must be readable, but access was refused{store} ({cause}); check the "
            "credentials (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and their rights."
        )
        return PermissionError(message), False
    may_pass = status is None or status >= 500 or status in _TRANSIENT_STATUSES
    message = (
        f"{url} must be reachable, but {attempts} attempt(s) failed{store} ({cause}); check the "
        "endpoint and the network."
    )
    return ConnectionError(message), may_pass


def _http_status(error: Exception) -> int | None:
    """The HTTP status in an exception of any store's client, if it holds one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("status_code", "status", "code"):  # Azure, OCI, Google
        if isinstance(status := getattr(error, name, None), int):
            return status
    return None
