"""One large file from the web or an object store, in as many attempts as it takes.

What has arrived stays when a connection or the process ends, and the rest is asked for. The file
gets its name when it is whole and its hash is right.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from tqdm import tqdm

from composer_gpt2.checkpoints.manifest import CheckpointError, FileRecord, record_file
from composer_gpt2.data.download import download
from composer_gpt2.data.part_files import sync_to_disk
from composer_gpt2.data.retrying import DEFAULT_RETRIES, call_with_retries

__all__ = ["download_resumable"]

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60.0


def download_resumable(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    n_bytes: int | None = None,
    headers: Mapping[str, str] | None = None,
    retries: int = DEFAULT_RETRIES,
) -> bool:
    """Brings a file here, going on where an earlier call was interrupted.

    Beside ``path`` lie ``.NAME.part`` and ``.NAME.part.json`` meanwhile; the latter says of which
    version of which file the part is. A broken connection is no failure as long as bytes arrive.

    Args:
        url: ``http(s)://`` and ``s3://`` are resumed; other stores are asked for all of it.
        path: Where to; a file that is there and has the hash is left alone.
        sha256: What its content must have, in hexadecimal digits.
        n_bytes: Its size, if known.
        headers: Sent to the host of ``url``, not to those that it redirects to.
        retries: Attempts, after the first one, in which not a byte arrives.

    Returns:
        Whether the hash was checked.

    Raises:
        CheckpointError: Size or hash are wrong, twice; nothing is in place.
        FileNotFoundError: There is no such file.
        PermissionError: It is not for us.
        ConnectionError: It cannot be reached.
        OSError: The disk is full or read-only.
    """
    part = path.with_name(f".{path.name}.part")
    for is_last in (False, True):
        if path.exists():
            problem = None if sha256 is None else _problem(path, sha256, n_bytes)
            if problem is None and sha256 is not None:
                return True
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, headers or {}, retries, path.name)
        problem = _problem(part, sha256, n_bytes)
        if problem is None:
            sync_to_disk(part)
            part.replace(path)
            _note(part).unlink(missing_ok=True)
            sync_to_disk(path.parent)
            return sha256 is not None
        part.unlink()
        _note(part).unlink(missing_ok=True)
        if is_last:
            raise CheckpointError(
                f"{url} must be the file that was published, but what arrived {problem}, also when "
                "it was fetched again from the start; nothing has been kept. Check the address and "
                "the hash, or ask who published it."
            )
        tqdm.write(f"{path.name} {problem}; fetching it again")
    raise AssertionError("the loop ends above")


def _problem(file: Path, sha256: str | None, n_bytes: int | None) -> str | None:
    size = file.stat().st_size
    if n_bytes is not None and size != n_bytes:
        return f"has {size:,} bytes instead of {n_bytes:,}"
    if sha256 is None:
        return None
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {file.name}") as bar:
        found = record_file(file, bar.update)
    if found != FileRecord(size, sha256.lower()):
        return f"has the SHA-256 {found.sha256} instead of {sha256.lower()}"
    return None


def _fetch(url: str, part: Path, headers: Mapping[str, str], retries: int, name: str) -> None:
    """Completes the part."""
    scheme = urlparse(url).scheme
    ask = {"http": _ask_http, "https": _ask_http, "s3": _ask_s3}.get(scheme)
    if ask is None:
        download(url, str(part), retries=retries, timeout_seconds=_TIMEOUT_SECONDS)
        return
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=name) as bar:
        while not call_with_retries(
            lambda: _go_on(ask, url, part, headers, bar), url, retries=retries
        ):
            pass


def _go_on(
    ask: Callable[..., Any], url: str, part: Path, headers: Mapping[str, str], bar: tqdm
) -> bool:
    """One connection; whether the file is complete. Raises if not a byte has arrived."""
    version, start = _version(part, url), 0
    if version is not None and part.exists():
        start = part.stat().st_size
    with ask(url, headers, start, version) as answer:
        if answer.start != start:  # it has changed, or its host cannot resume
            start = 0
        _note(part).write_text(json.dumps({"url": url, "version": answer.version}))
        bar.total, bar.n = answer.n_bytes, start
        bar.initial = start  # for the rate
        bar.refresh()
        arrived = start
        failure: Exception | None = None
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            while failure is None:
                try:
                    chunk = answer.stream.read(_CHUNK_BYTES)
                except Exception as error:  # http.client's and botocore's, when a connection ends
                    failure = error
                    break
                if not chunk:
                    break
                file.write(chunk)
                arrived += len(chunk)
                bar.update(len(chunk))
    if failure is None and arrived >= (answer.n_bytes or 0):
        return True
    if arrived == start or answer.version is None:  # nothing gained
        raise failure or ConnectionError("the connection ended early")
    return False


class _Stream(Protocol):
    def read(self, amount: int, /) -> bytes: ...


@dataclass(frozen=True)
class _Answer:
    stream: _Stream
    start: int
    """The first byte that comes."""
    n_bytes: int | None
    """Of the whole file."""
    version: str | None
    """What its host calls this content; ``None`` where it cannot be resumed."""


@contextmanager
def _ask_http(
    url: str, headers: Mapping[str, str], start: int, version: str | None
) -> Iterator[_Answer]:
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    if start and version is not None:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", version)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # it is not that long: begin anew
            raise
        request.remove_header("Range")
        request.remove_header("If-range")
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    with response:
        length, first = response.headers.get("Content-Length"), 0
        n_bytes = None if length is None else int(length)
        if response.status == 206:
            span, _, total = response.headers["Content-Range"].partition(" ")[2].partition("/")
            first, n_bytes = int(span.partition("-")[0]), int(total)
        etag = response.headers.get("ETag")
        # A weak one does not promise the same bytes.
        strong = etag if etag and not etag.startswith("W/") else None
        yield _Answer(response, first, n_bytes, strong)


@contextmanager
def _ask_s3(
    url: str, headers: Mapping[str, str], start: int, version: str | None
) -> Iterator[_Answer]:
    from botocore.exceptions import ClientError

    from composer_gpt2.data.download import s3_client

    client = s3_client(os.environ.get("S3_ENDPOINT_URL"), _TIMEOUT_SECONDS, False, os.getpid())
    address = urlparse(url)
    place = {"Bucket": address.netloc, "Key": address.path.lstrip("/")}
    rest: dict[str, Any] = {}
    if start and version is not None:
        rest = {"Range": f"bytes={start}-", "IfMatch": version}
    try:
        answer = client.get_object(**place, **rest)
    except ClientError as error:
        if not rest or error.response["ResponseMetadata"]["HTTPStatusCode"] not in (412, 416):
            raise
        start, answer = 0, client.get_object(**place)  # another content, or not that long
    with closing(answer["Body"]) as body:
        first = start if "ContentRange" in answer else 0
        yield _Answer(body, first, first + answer["ContentLength"], answer["ETag"])


def _version(part: Path, url: str) -> str | None:
    """What the part is a part of, as its host called it; ``None`` to begin anew."""
    try:
        note = json.loads(_note(part).read_text())
        return note["version"] if note["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")
