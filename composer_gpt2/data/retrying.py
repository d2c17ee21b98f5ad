"""Ask an object store again when a fault may pass, and explain at once when it will not.

One place knows which errors of the clients of all stores are transient: whatever reads or writes
objects goes through :func:`call_with_retries`.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar
from urllib.parse import urlparse

__all__ = ["DEFAULT_RETRIES", "call_with_retries", "retry_seconds"]

DEFAULT_RETRIES = 8  # 1 + 2 + 4 + 8 + 16 + 30 + 30 + 30 = 121 s

log = logging.getLogger(__name__)
Result = TypeVar("Result")

_LONGEST_DELAY_SECONDS = 30.0
_TRANSIENT_STATUSES = {408, 425, 429}  # of the 4xx; all 5xx are transient too
# Faults of our disk, not of the store; the last is a limit on the size of files.
_HERE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
# A client that is not installed, an address that is none, a bug: waiting does not help.
_MISTAKES = (ImportError, ValueError, TypeError, AttributeError, LookupError)
_jitter = random.SystemRandom()  # leaves the seeded generator of the training run alone


def call_with_retries(
    call: Callable[[], Result],
    url: str,
    *,
    retries: int,
    must_be: str = "readable",
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """The result of ``call``, which is repeated as long as its error may pass.

    Between attempts it waits 1, 2, 4, ... seconds (at most 30) and up to a quarter more, so that
    many processes do not come back at once; 8 retries outlast a fault of two minutes. It logs one
    warning when the waiting begins and one when it was worth it.

    Args:
        call: Does one attempt and leaves nothing behind that hinders the next.
        url: What it reads or writes, for the messages.
        retries: Attempts after the first one.
        must_be: What the object must be for it: "readable" or "writable".
        stop: Asked while waiting; once true, the last error is raised without further attempts.

    Raises:
        FileNotFoundError: There is no such bucket or object.
        PermissionError: Credentials are missing, wrong or not sufficient.
        ConnectionError: All attempts failed in another way.
        OSError: A disk of this machine is full or read-only.
    """
    begin = time.monotonic()
    for attempt in count():
        try:
            result = call()
        except Exception as error:  # every store has exceptions of its own: _explain sorts them
            if isinstance(error, OSError) and error.errno in _HERE:
                raise
            failure, may_pass = _explain(error, url, must_be, n_attempts=attempt + 1)
            if not may_pass or attempt == retries or stop():
                raise failure from error
            if attempt == 0:
                log.warning("%s Trying again for %.0f s.", failure, retry_seconds(retries))
        else:
            if attempt > 0:
                waited = time.monotonic() - begin
                log.warning("%s is %s again after %.0f s.", url, must_be, waited)
            return result
        deadline = time.monotonic() + _delay(attempt) * _jitter.uniform(1.0, 1.25)
        while time.monotonic() < deadline and not stop():
            time.sleep(0.05)
    raise AssertionError("count() does not end")


def retry_seconds(retries: int) -> float:
    """How long a fault may last, at least, that so many retries outlast."""
    return sum(map(_delay, range(retries)))


def _delay(attempt: int) -> float:
    return min(2.0**attempt, _LONGEST_DELAY_SECONDS)


def _explain(error: Exception, url: str, must_be: str, n_attempts: int) -> tuple[OSError, bool]:
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
    if (
        status in (401, 403)
        or isinstance(error, PermissionError)
        or type(error).__name__ == "NoCredentialsError"  # botocore's
    ):
        message = (
            f"{url} must be {must_be}, but access was refused{store} ({cause}); check the "
            "credentials (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and their rights."
        )
        return PermissionError(message), False
    if isinstance(error, _MISTAKES):
        may_pass = False
    else:
        may_pass = status is None or status >= 500 or status in _TRANSIENT_STATUSES
    message = (
        f"{url} must be reachable, but {n_attempts} attempt(s) failed{store} ({cause}); check the "
        "endpoint and the network."
    )
    return ConnectionError(message), may_pass


def _http_status(error: BaseException) -> int | None:
    """The HTTP status in an exception of any store's client, if it holds one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("status_code", "status", "code"):  # Azure, OCI, Google
        if isinstance(status := getattr(error, name, None), int):
            return status
    # boto3 wraps the error of an upload in one that keeps its text only.
    return _http_status(error.__context__) if error.__context__ else None
