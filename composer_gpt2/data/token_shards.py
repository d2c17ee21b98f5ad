"""The output of preparation: tokens go in, MDS shards come out, and a kill loses nothing.

Shards fill in the order of the tokens, so their bytes do not depend on when a run stopped.
After each shard the state (position in the sources, counts, and the tokens for which no shard is
full yet) replaces the one before in a single step; a run that is started again goes on from it.
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from streaming import MDSWriter
from streaming.base.compression import is_compression
from streaming.base.util import bytes_to_int
from typing_extensions import Self

from composer_gpt2.data.encoding import Part
from composer_gpt2.data.object_store import ObjectStore

__all__ = [
    "INDEX",
    "STATE",
    "TOKENIZER_FOLDER",
    "Part",
    "Position",
    "TokenShards",
    "check_shard_format",
    "read_request",
]

INDEX = "index.json"
STATE = "unfinished.npz"
TOKENIZER_FOLDER = "tokenizer"  # of a corpus with one of its own
_PENDING_WRITES = 2  # more would only fill memory where the disk or the network is slow


@dataclass
class Position:
    """Where in the sources a run is: all before this is in the splits."""

    source: int = 0
    document: int = 0
    bad_documents: int = 0


@dataclass
class _Counts:
    documents: int = 0
    bytes: int = 0
    tokens: int = 0


class TokenShards:
    """Splits of token shards in a store.

    Attributes:
        position: Of the last documents that were added.
        counts: Documents, bytes and tokens of each split.

    Args:
        store: Where the shards go; claimed for writing.
        request: What was asked for, kept in the state to tell whether a run may go on from it.
            ``sequence_length``, ``compression`` and ``shard_size_limit`` are followed here.
        splits: Their names.
    """

    def __init__(self, store: ObjectStore, request: dict[str, Any], splits: list[str]) -> None:
        self.position = Position()
        self.counts = {name: _Counts() for name in splits}
        self._store = store
        self._request = request
        self._length: int = request["sequence_length"]
        self._waiting = {name: [np.zeros(0, np.uint16)] for name in splits}  # for a full shard
        self._n_waiting = dict.fromkeys(splits, 0)  # tokens
        self._writers = {name: self._open_writer(name) for name in splits}
        writer = self._writers[splits[0]]  # their headers are equal
        assert writer.size_limit is not None
        size = 2 * self._length + writer.extra_bytes_per_sample
        n_samples = (writer.size_limit - writer.extra_bytes_per_shard) // size
        self._tokens_per_shard = n_samples * self._length
        # One thread writes in the order given: no state before the shards it counts.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-shards")
        self._pending: deque[Future[None]] = deque()

    def resume(self) -> None:
        """Goes on from the state in the store.

        Raises:
            FileNotFoundError: A shard that the state counts is gone.
        """
        state, waiting = _unpack(self._store.read_bytes(STATE))
        self.position = Position(**state["position"])
        names = self._store.names()
        for split, saved in state["splits"].items():
            self.counts[split] = _Counts(**saved["counts"])
            self._writers[split].shards = saved["shards"]
            self._waiting[split] = [waiting[split]]
            self._n_waiting[split] = len(waiting[split])
            for shard in saved["shards"]:
                if f"{split}/{_basename(shard)}" not in names:
                    raise FileNotFoundError(
                        f"The unfinished corpus in {self._store.url} must still have its shard "
                        f"{split}/{_basename(shard)}, but it is gone; start again with overwrite."
                    )

    def add(self, parts: dict[str, Part], position: Position) -> None:
        """Appends tokens to the splits; shards that fill are written in the background."""
        self.position = position
        filled = False
        for split, part in parts.items():
            counts = self.counts[split]
            counts.documents += part.documents
            counts.bytes += part.bytes
            counts.tokens += len(part.tokens)
            self._waiting[split].append(part.tokens)
            self._n_waiting[split] += len(part.tokens)
            n_full = self._n_waiting[split] // self._tokens_per_shard
            if n_full:
                self._write(split, n_full * self._tokens_per_shard)
                filled = True
        if filled:
            self.save()

    def save(self) -> None:
        """Replaces the state in the store, after all shards so far."""
        position = asdict(self.position)
        counts = {split: asdict(counts) for split, counts in self.counts.items()}
        waiting = {split: np.concatenate(tokens) for split, tokens in self._waiting.items()}
        self._waiting = {split: [tokens] for split, tokens in waiting.items()}

        def write() -> None:
            splits = {
                split: {"counts": counts[split], "shards": writer.shards}
                for split, writer in self._writers.items()
            }
            state = {"request": self._request, "position": position, "splits": splits}
            self._store.put_bytes(STATE, _pack(state, waiting))

        self._submit(write)

    def finish(self) -> dict[str, dict[str, int]]:
        """Writes what fills samples but no shard, then the indexes.

        Returns:
            For each split the counts, ``samples``, ``shards`` and ``remainder_tokens``.
        """
        splits = {}
        for split, writer in self._writers.items():
            n_remainder = self._n_waiting[split] % self._length
            self._write(split, self._n_waiting[split] - n_remainder)
            self.wait()
            splits[split] = {
                **asdict(self.counts[split]),
                "samples": sum(shard["samples"] for shard in writer.shards),
                "shards": len(writer.shards),
                "remainder_tokens": n_remainder,
            }
        for split, writer in self._writers.items():
            index = {"version": 2, "shards": writer.shards}
            self._store.put_bytes(f"{split}/{INDEX}", json.dumps(index, sort_keys=True).encode())
        return splits

    def wait(self) -> None:
        """Until all is written; raises what went wrong in the background."""
        while self._pending:
            self._pending.popleft().result()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the background thread, after what it still has to write."""
        self._thread.shutdown()
        for writer in self._writers.values():
            writer.executor.shutdown()

    def _open_writer(self, split: str) -> MDSWriter:
        return MDSWriter(
            columns={"tokens": f"ndarray:uint16:{self._length}"},
            out=str(self._store.work_dir / split),
            compression=self._request["compression"],
            hashes=["xxh64"],
            size_limit=self._request["shard_size_limit"],
            max_workers=1,
        )

    def _write(self, split: str, n_tokens: int) -> None:
        """Takes the first tokens that wait and writes them as shards."""
        tokens = np.concatenate(self._waiting[split])
        self._waiting[split] = [tokens[n_tokens:].copy()]
        self._n_waiting[split] -= n_tokens
        for start in range(0, n_tokens, self._tokens_per_shard):
            shard = tokens[start : min(start + self._tokens_per_shard, n_tokens)]
            self._submit(lambda shard=shard: self._write_shard(split, shard))

    def _write_shard(self, split: str, tokens: np.ndarray) -> None:
        writer = self._writers[split]
        # What MDSWriter.write would collect, sample by sample and 40 times as slowly.
        writer.new_samples = [sample.tobytes() for sample in tokens.reshape(-1, self._length)]
        writer.flush_shard()
        writer.new_samples = []
        self._store.put(f"{split}/{_basename(writer.shards[-1])}")

    def _submit(self, task: Callable[[], None]) -> None:
        while len(self._pending) >= _PENDING_WRITES:
            self._pending.popleft().result()
        before = self._pending[-1] if self._pending else None

        def run() -> None:
            if before is not None:
                before.result()  # if that failed so does this: no state after a lost shard
            task()

        self._pending.append(self._thread.submit(run))


def check_shard_format(
    sequence_length: int, compression: str | None, shard_size_limit: int | str
) -> int:
    """Refuses, before any work, what cannot be written as MDS.

    Args:
        sequence_length: Tokens a sample.
        compression: None or an algorithm of streaming, perhaps with a level: ``"zstd:7"``.
        shard_size_limit: Bytes, or ``"64mb"`` (1 MB is 2**20 bytes).

    Returns:
        The limit in bytes.

    Raises:
        ValueError: Streaming knows no such compression, or no sample fits below the limit.
    """
    if compression is not None and not is_compression(compression):
        raise ValueError(
            "compression must be br, bz2, gz, snappy or zstd, perhaps with a level ('zstd:7'), or "
            f"be left out, got {compression!r}."
        )
    n_bytes = bytes_to_int(shard_size_limit)
    least = 2 * sequence_length + 1024  # the header of a shard takes some 200 bytes
    if not least <= n_bytes < 2**32:  # MDS keeps positions in a shard as uint32
        raise ValueError(
            f"shard_size_limit must be at least {least} bytes (one sample) and below 4 GiB, got "
            f"{shard_size_limit!r}."
        )
    return n_bytes


def read_request(store: ObjectStore) -> dict[str, Any]:
    """The ``request`` of the unfinished run in ``store``."""
    state, _ = _unpack(store.read_bytes(STATE))
    return state["request"]


def _basename(shard: dict[str, Any]) -> str:
    return (shard["zip_data"] or shard["raw_data"])["basename"]


def _pack(state: dict[str, Any], waiting: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    np.savez(file, allow_pickle=False, state=text, **waiting)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def _unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(io.BytesIO(data)) as arrays:
        waiting = {name: arrays[name] for name in arrays.files if name != "state"}
        return json.loads(arrays["state"].tobytes()), waiting
