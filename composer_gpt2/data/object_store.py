"""Where a prepared corpus lies: a folder or a prefix in an object store, behind one interface.

Uploads, downloads and listings are mosaicml-streaming's own, so what it can read can be written.
S3 (any endpoint with its interface: R2, MinIO, GCS and OCI with HMAC keys, ...) and folders are
under test; ``gs://``, ``oci://`` and ``azure://`` take the same way through their own clients.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import ParseResult, urlparse

from typing_extensions import Self

from composer_gpt2.data.download import download
from composer_gpt2.data.part_files import sync_to_disk
from composer_gpt2.data.retrying import DEFAULT_RETRIES, call_with_retries

__all__ = ["ObjectStore", "check_bucket", "open_store"]

_OPEN_RETRIES = 3  # 1 + 2 + 4 = 7 s
_CONNECT_SECONDS = 5.0
_TIMEOUT_SECONDS = 60.0


def open_store(
    url: str,
    *,
    what: str = "A corpus",
    retries: int = DEFAULT_RETRIES,
    open_retries: int = _OPEN_RETRIES,
) -> ObjectStore:
    """The store at ``url``, with its bucket and credentials checked.

    A fault that may pass, here and in all methods of the store, is tried again with growing pauses;
    what is wrong for good is an error within seconds.

    Args:
        url: A folder (it need not exist), or ``s3://``, ``gs://``, ``oci://``, ``azure://`` with
            bucket and prefix.
        what: What is kept there, for the messages.
        retries: Attempts after the first one in all methods; 8 outlast a fault of two minutes.
        open_retries: The same for opening. 3 tell a user who waits of a wrong endpoint after ten
            seconds; what starts unattended sets it to `retries`.

    Raises:
        ValueError: No such kind of store.
        FileNotFoundError: There is no such bucket.
        PermissionError: It refuses the credentials.
        ConnectionError: It could not be reached, however often we tried.
    """
    scheme = urlparse(url).scheme
    if scheme == "":
        return _Folder(url, what)
    if scheme not in ("s3", "gs", "oci", "azure"):
        raise ValueError(
            f"{what} must be in a folder or at an address that starts with s3://, gs://, oci:// or "
            f"azure://, got {url!r}."
        )
    if scheme == "s3":
        check_bucket(url, retries=open_retries)
    return _Bucket(url, retries, open_retries)


def check_bucket(url: str, *, retries: int = _OPEN_RETRIES) -> None:
    """Makes sure that an S3 bucket is there and lets us in.

    Args:
        url: ``s3://bucket`` with or without a prefix.
        retries: Attempts after the first one, if the endpoint does not answer or is overloaded.

    Raises:
        FileNotFoundError: The endpoint has no such bucket.
        PermissionError: Credentials are missing or refused.
        ConnectionError: The endpoint does not answer.
    """
    import boto3
    from botocore.config import Config

    bucket = urlparse(url).netloc
    endpoint = os.environ.get("S3_ENDPOINT_URL")
    place = f"bucket {bucket!r} at {endpoint or 'Amazon S3 (S3_ENDPOINT_URL is not set)'}"
    # boto3's defaults would wait for minutes on an address that does not answer.
    config = Config(
        connect_timeout=_CONNECT_SECONDS, read_timeout=20, retries={"total_max_attempts": 1}
    )
    try:
        client = boto3.Session().client("s3", endpoint_url=endpoint, config=config)
        call_with_retries(lambda: client.head_bucket(Bucket=bucket), url, retries=retries)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There must be a {place}, got 'not found'; create it, or check the name in {url} "
            "and S3_ENDPOINT_URL."
        ) from error
    except PermissionError as error:
        raise PermissionError(
            f"The {place} refuses access ({error.__cause__}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) and the permissions of the key."
        ) from error
    except (ConnectionError, ValueError) as error:  # boto3's ValueError: not the address of a host
        raise ConnectionError(
            f"The {place} cannot be reached ({error.__cause__ or error}); check S3_ENDPOINT_URL "
            "and the network."
        ) from error


class ObjectStore(ABC):
    """A flat set of files under names like ``train/index.json``; use it in a ``with``.

    Attributes:
        url: Where it is.
        work_dir: An empty local folder in which to write a file before it is put.
    """

    url: str
    work_dir: Path

    @abstractmethod
    def start_writing(self) -> None:
        """Claims the store for this process, where it can be claimed, and empties ``work_dir``."""

    @abstractmethod
    def put(self, name: str) -> None:
        """Moves ``work_dir/name`` into the store; others see all of it or nothing."""

    @abstractmethod
    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A path at which to read ``name``, for the length of the ``with``."""
        yield Path()

    @abstractmethod
    def names(self) -> set[str]:
        """The names of all files."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Deletes the files, in the order given."""

    @abstractmethod
    def close(self) -> None:
        """Removes the work folder."""

    def put_bytes(self, name: str, data: bytes) -> None:
        """Stores ``data`` under ``name``."""
        path = self.work_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.put(name)

    def read_bytes(self, name: str) -> bytes:
        """The content of ``name``."""
        with self.local_copy(name) as path:
            return path.read_bytes()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()


class _Folder(ObjectStore):
    def __init__(self, url: str, what: str) -> None:
        self.url = url
        self._root = Path(url).expanduser()
        if self._root.exists() and not self._root.is_dir():
            raise NotADirectoryError(f"{what} must be in a folder, got the file {url!r}.")
        # Inside the folder, so that putting is a rename; a killed run's leftovers go with it.
        self.work_dir = self._root / ".unfinished"
        self._lock: IO[bytes] | None = None

    def start_writing(self) -> None:
        self.work_dir.mkdir(parents=True, exist_ok=True)
        lock = (self.work_dir / "lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it on any death
        except BlockingIOError as error:
            lock.close()
            raise BlockingIOError(
                f"Only one process may write to a folder, but another is at work in {self.url}; "
                "wait for it or stop it."
            ) from error
        self._lock = lock
        for leftover in self.work_dir.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != "lock":
                leftover.unlink()

    def put(self, name: str) -> None:
        source, target = self.work_dir / name, self._root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        sync_to_disk(source)  # a rename must not survive a power cut that the data did not
        source.replace(target)
        sync_to_disk(target.parent)
        sync_to_disk(self._root)  # in which the parent may be new

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        yield self._root / name

    def names(self) -> set[str]:
        # Two levels and nothing hidden: the folder may be a home, and another run may be at work.
        visible = [path for path in _children(self._root) if not path.name.startswith(".")]
        files = [*visible, *(path for folder in visible for path in _children(folder))]
        return {str(path.relative_to(self._root)) for path in files if path.is_file()}

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self._root / name).unlink()

    def close(self) -> None:
        if self._lock is not None:
            shutil.rmtree(self.work_dir)
            self._lock.close()


class _Bucket(ObjectStore):
    def __init__(self, url: str, retries: int, open_retries: int) -> None:
        self.url = url.rstrip("/")
        self._retries = retries
        self._temporary = tempfile.TemporaryDirectory(prefix="composer-gpt2-")
        self.work_dir = Path(self._temporary.name)
        self._uploader: Any = call_with_retries(self._make_uploader, self.url, retries=open_retries)

    def start_writing(self) -> None:
        pass  # object stores have no locks; the temporary folder is new

    def put(self, name: str) -> None:
        url = f"{self.url}/{name}"
        try:
            self._ask(lambda: self._uploader.upload_file(name), url, must_be="writable")
        except ConnectionError as error:
            raise ConnectionError(
                f"{error} To go on from here, start the same command again."
            ) from error

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="composer-gpt2-") as folder:
            path = Path(folder, Path(name).name)
            download(
                f"{self.url}/{name}",
                str(path),
                retries=self._retries,
                timeout_seconds=_TIMEOUT_SECONDS,
            )
            yield path

    def names(self) -> set[str]:
        address = urlparse(self.url)
        prefix = f"{address.path.strip('/')}/" if address.path.strip("/") else ""
        keys = self._ask(lambda: self._keys(address, prefix), self.url)
        return {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            url = f"{self.url}/{name}"
            self._ask(partial(self._delete, urlparse(url)), url, must_be="writable")

    def close(self) -> None:
        self._temporary.cleanup()

    def _ask(self, call: Callable[[], Any], url: str, must_be: str = "readable") -> Any:
        return call_with_retries(call, url, retries=self._retries, must_be=must_be)

    def _make_uploader(self) -> Any:
        from streaming.base.storage import CloudUploader

        uploader: Any = CloudUploader.get((str(self.work_dir), self.url), retry=1)
        if urlparse(self.url).scheme == "s3":
            import boto3
            from botocore.config import Config

            # boto3's defaults would wait for ten minutes on an address that does not answer. Parts
            # of a large file are tried again each, or it would never arrive over a bad network.
            config = Config(
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=_TIMEOUT_SECONDS,
                retries={"total_max_attempts": 2},
            )
            endpoint = os.environ.get("S3_ENDPOINT_URL")
            uploader.s3 = boto3.Session().client("s3", endpoint_url=endpoint, config=config)
        return uploader

    def _keys(self, address: ParseResult, prefix: str) -> list[str]:
        if address.scheme == "azure":  # the one for which streaming cannot list
            container = self._uploader.azure_service.get_container_client(address.netloc)
            return [blob.name for blob in container.list_blobs(name_starts_with=prefix)]
        return self._uploader.list_objects()

    def _delete(self, address: ParseResult) -> None:
        from streaming.base.storage.upload import GCSAuthentication

        key, uploader = address.path.lstrip("/"), self._uploader
        match address.scheme:
            case "s3":
                uploader.s3.delete_object(Bucket=address.netloc, Key=key)
            case "gs" if uploader.authentication == GCSAuthentication.HMAC:
                uploader.gcs_client.delete_object(Bucket=address.netloc, Key=key)
            case "gs":
                uploader.gcs_client.bucket(address.netloc).blob(key).delete()
            case "oci":
                bucket = address.netloc.split(f"@{uploader.namespace}")[0]
                uploader.client.delete_object(uploader.namespace, bucket, key)
            case "azure":
                uploader.azure_service.get_blob_client(address.netloc, key).delete_blob()


def _children(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []
