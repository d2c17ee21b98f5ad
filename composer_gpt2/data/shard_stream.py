"""Bring the shards of a corpus here, and let none be read that is not proven by its hash."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import numpy as np
from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.format import FileInfo, Reader
from streaming.base.hashing import get_hash

from composer_gpt2.data.download import download
from composer_gpt2.data.part_files import part_file
from composer_gpt2.data.shared_state import SharedFailure

__all__ = ["ShardError", "ShardStream"]

log = logging.getLogger(__name__)

_ATTEMPTS_AT_A_BAD_HASH = 2  # the second tells a fault on the way from a bad object


class ShardError(RuntimeError):
    """A shard cannot be had, or is not what the index of its corpus says."""


class ShardStream(Stream):
    """A stream that looks at what is on disk before it trusts it, and fetches what is bad again.

    streaming's own neither looks at files of an earlier run nor fetches a second time. A shard gets
    its name in the cache folder only when it is proven, so several runs can share one.

    Args:
        remote: Where the corpus is; None if it is read in place.
        local: The cache folder; the corpus itself if it is read in place.
        split: Subfolder of both.
        proportion: Share of this stream in a mixture, or None.
        repeat: How often its samples come in an epoch, or None for once.
        has_cache_limit: Whether streaming deletes shards and must therefore know what is on disk.

    Attributes:
        failure: Once it is set, by whichever process, a remote that is down is not waited for.
        is_abandoned: Nor is it once this returns true: the process ends, or another epoch begins.
    """

    failure: SharedFailure | None = None
    is_abandoned: Callable[[], bool] | None = None

    def __init__(
        self,
        *,
        remote: str | None,
        local: str,
        split: str,
        proportion: float | None,
        repeat: float | None,
        has_cache_limit: bool,
    ) -> None:
        super().__init__(
            remote=remote, local=local, split=split, proportion=proportion, repeat=repeat
        )
        self._has_cache_limit = has_cache_limit

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: np.ndarray) -> None:
        """Say which shards are on disk: none, so that `prepare_shard` looks at each before use.

        With a cache limit they are proven here and now, because they take part of the limit.

        Args:
            shards: All shards of this stream.
            cache_usage_per_shard: Receives the bytes of each on disk; 0 means not there.
        """
        for i, shard in enumerate(shards):
            is_here = self._has_cache_limit and self._is_sound_here(shard)
            cache_usage_per_shard[i] = shard.get_raw_size() if is_here else 0

    def prepare_shard(self, shard: Reader) -> int:
        """Make sure that the shard is on disk and sound.

        Returns:
            Its bytes, which the cache did not count before.

        Raises:
            ShardError: It is not and cannot be fetched.
        """
        if not self._is_sound_here(shard):
            self._fetch(shard)
        return shard.get_raw_size()

    def _is_sound_here(self, shard: Reader) -> bool:
        """Whether it is on disk with the right hash; deletes a bad copy, but never an original."""
        raw, _ = shard.file_pairs[0]
        path = self._path(raw)
        if not os.path.exists(path):
            return False
        fault = _fault(_read(path), raw)
        if not fault:
            return True
        if self.remote is None:
            raise ShardError(_bad_shard(path, fault))
        log.warning("Shard %s in the cache is bad (%s); fetching it again.", path, fault)
        os.remove(path)
        return False

    def _fetch(self, shard: Reader) -> None:
        raw, packed = shard.file_pairs[0]
        path = self._path(raw)
        if self.remote is None:
            raise ShardError(f"Shard {path} must exist, as index.json lists it, but it does not.")
        try:
            with part_file(path) as part:
                data = self._download(packed or raw, part)
                if packed:
                    data = decompress(shard.compression, data)
                    if fault := _fault(data, raw):
                        raise ShardError(_bad_shard(self._url(packed), f"unpacked, {fault}"))
                    with open(part, "wb") as file:
                        file.write(data)
        except OSError as error:
            raise ShardError(f"Shard {raw.basename} cannot be had: {error}") from error

    def _download(self, info: FileInfo, path: str) -> bytes:
        url = self._url(info)
        fault = ""
        for attempt in range(_ATTEMPTS_AT_A_BAD_HASH):
            if attempt:
                log.warning("Shard %s came bad (%s); fetching it again.", url, fault)
            download(
                url,
                path,
                retries=self.download_retry,
                timeout_seconds=self.download_timeout,
                stop=self._is_waiting_in_vain,
                compare_checksum=not info.hashes,
            )
            data = _read(path)
            fault = _fault(data, info)
            if not fault:
                return data
        raise ShardError(_bad_shard(url, f"{fault} (fetched {_ATTEMPTS_AT_A_BAD_HASH} times)"))

    def _is_waiting_in_vain(self) -> bool:
        return (self.failure is not None and self.failure.is_set()) or (
            self.is_abandoned is not None and self.is_abandoned()
        )

    def _path(self, info: FileInfo) -> str:
        return os.path.join(self.local, self.split, info.basename)

    def _url(self, info: FileInfo) -> str:
        assert self.remote is not None
        return os.path.join(self.remote, self.split, info.basename)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _fault(data: bytes, info: FileInfo) -> str:
    """In which way ``data`` is not the file that the index describes; empty if it is."""
    if len(data) != info.bytes:
        return f"it has {len(data)} bytes where the index says {info.bytes}"
    for algorithm, expected in info.hashes.items():
        if (got := get_hash(algorithm, data)) != expected:
            return f"its {algorithm} is {got} where the index says {expected}"
    return ""


def _bad_shard(place: str, fault: str) -> str:
    return (
        f"Shard {place} must be what index.json says, but {fault}; restore it or prepare the "
        "corpus again (`composer-gpt2 verify` finds all bad shards)."
    )
