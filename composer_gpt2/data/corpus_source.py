"""Where a prepared corpus is read from, and whether it is the one that was asked for.

Everything here happens before any work: the index and ``corpus.json`` are read and compared with
what the run expects, so that a mistake costs seconds and not a day.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer_gpt2.data.download import is_url, read_bytes
from composer_gpt2.data.mds_columns import DTYPE, column_encodings, sample_bytes
from composer_gpt2.data.mds_index import MDSIndex, describe_problem
from composer_gpt2.data.part_files import part_file, remove_dead_parts
from composer_gpt2.tokenizer_by_name import describe_tokenizer

__all__ = ["CorpusSource", "Expectation", "find_sources"]

_CACHED_FROM = "cached-from"  # beside index.json in a cache: the address of its corpus
_STREAM_KEYS = ("remote", "local", "split", "proportion", "repeat")


def find_sources(
    remote: str | None,
    local: str | None,
    split: str,
    streams: Mapping[str, Mapping[str, Any]] | None,
    *,
    retries: int = 1,
    timeout_seconds: float = 5.0,
) -> list[CorpusSource]:
    """The corpora to read from, each with its index read.

    Args:
        remote: As for :class:`composer_gpt2.data.streaming.StreamingTokens`, like the others.
        local: The same.
        split: The same.
        streams: The same.
        retries: Attempts after the first one to read an index or a ``corpus.json``.
        timeout_seconds: How long the store may stay silent within one attempt.

    Raises:
        ValueError: The arguments contradict, or an index is none.
        OSError: A corpus cannot be read.
    """
    if streams is None:
        streams = {remote or local or "corpus": {"remote": remote, "local": local}}
    elif remote is not None or local is not None:
        raise ValueError(
            f"Either streams or remote/local must be given, got both (remote={remote!r}, "
            f"local={local!r}, streams={list(streams)}); drop one."
        )
    # By name: the order in which a recipe lists them must not change the order of training.
    sources = [
        _find_source(name, stream, split, retries, timeout_seconds)
        for name, stream in sorted(streams.items())
    ]
    if len({source.proportion is None for source in sources}) > 1:
        given = {source.name: source.proportion for source in sources}
        raise ValueError(f"All streams must have a proportion, or none of them, got {given}.")
    return sources


@dataclass(frozen=True)
class Expectation:
    """What a corpus must be.

    Attributes:
        sequence_length: Tokens in a sequence.
        tokenizer: Its tokenizer, as :func:`composer_gpt2.tokenizer_by_name.load_tokenizer` takes
            it; None if any will do.
        hashes: Whether its shards must have hashes.
    """

    sequence_length: int
    tokenizer: str | None
    hashes: bool


@dataclass
class CorpusSource:
    """One corpus to read from.

    Attributes:
        name: Of the stream and split, for messages.
        remote: Absolute path of a folder, or an address in an object store.
        local: Absolute path of the cache folder, or None for the default one.
        split: Subfolder of both.
        proportion: Share in a mixture, or None.
        repeat: How often its sequences come in an epoch, or None for once.
        retries: Attempts after the first one to read the index or ``corpus.json``.
        timeout_seconds: How long the store may stay silent within one attempt.
        n_samples: Sequences in the split.
        has_loss_mask: Whether its samples say which tokens are targets.
        in_place: Whether the shards are read where they are, without a cache.
        folder: Absolute path of the corpus or its cache, from which is read.
        shard_folder: The split in that folder.
    """

    name: str
    remote: str
    local: str | None
    split: str
    proportion: float | None
    repeat: float | None
    retries: int
    timeout_seconds: float

    def __post_init__(self) -> None:
        self._index_bytes = self._read(os.path.join(self.remote, self.split, "index.json"))
        self._shards = _parse_index(self._index_bytes, self.name)
        self.n_samples = sum(shard["samples"] for shard in self._shards)
        self.has_loss_mask = any("loss_mask" in shard["column_names"] for shard in self._shards)
        # Packed shards are unpacked into the cache: nothing is ever written to a source folder.
        packed = any(shard["zip_data"] for shard in self._shards)
        cache = self.local if self.local != self.remote else None
        self.in_place = not (is_url(self.remote) or packed or cache)
        default = self.remote if self.in_place else _default_cache(self.remote, self._index_bytes)
        self.folder = cache or default
        self.shard_folder = os.path.join(self.folder, self.split)

    def problems(self, expected: Expectation) -> list[str]:
        """What is not as expected, one sentence each."""
        problems = []
        columns = {
            ", ".join(
                map(":".join, zip(shard["column_names"], shard["column_encodings"], strict=True))
            )
            for shard in self._shards
        }
        encodings = column_encodings(expected.sequence_length, has_loss_mask=self.has_loss_mask)
        wanted = ", ".join(f"{name}:{encoding}" for name, encoding in encodings.items())
        if columns - {wanted}:
            problems.append(
                f"the shards must have the column {wanted} (sequence_length "
                f"{expected.sequence_length}), got {' and '.join(sorted(columns))}; set "
                "sequence_length to what they have, or prepare the corpus again with this "
                "--sequence-length"
            )
        size = sample_bytes(expected.sequence_length, has_loss_mask=self.has_loss_mask)
        for shard in self._shards:
            # Each sample has 4 bytes that say where it begins.
            if 8 + shard["samples"] * (4 + size) > shard["raw_data"]["bytes"]:
                problems.append(
                    f"{shard['raw_data']['basename']} must have room for the {shard['samples']} "
                    f"samples that index.json counts in it, got {shard['raw_data']['bytes']} "
                    "bytes; prepare the corpus again"
                )
        if expected.hashes and not all(shard["raw_data"]["hashes"] for shard in self._shards):
            problems.append(
                "every shard must have a hash in index.json, got shards without; write them with "
                'hashes=["xxh64"], or train on unchecked data from Python, with '
                "StreamingTokens(check_hashes=False)"
            )
        if expected.tokenizer is not None:
            problems += self._description_problems(expected, expected.tokenizer)
        return [f"{self.name}: {problem}." for problem in problems]

    def missing_shards(self) -> list[str]:
        """Paths that the index names and the folder that is read in place has not."""
        names = [shard["raw_data"]["basename"] for shard in self._shards]
        paths = [os.path.join(self.shard_folder, name) for name in names]
        return [path for path in paths if not os.path.isfile(path)]

    def prepare_cache(self) -> None:
        """Leaves the index that was checked in the cache folder, where streaming looks first.

        What processes that were killed had begun to write there is removed.

        Raises:
            ValueError: The folder holds the shards of another corpus.
            OSError: It cannot be written to.
        """
        os.makedirs(self.shard_folder, exist_ok=True)
        remove_dead_parts(self.shard_folder)
        path = os.path.join(self.shard_folder, "index.json")
        if os.path.exists(path):
            with open(path, "rb") as file:
                if file.read() == self._index_bytes:
                    return
            raise ValueError(
                f"{self.name}: the cache folder {self.shard_folder} must be empty or hold shards "
                f"of {self.remote}, got those of {self._cached_corpus()}; delete it or set `local` "
                "to another folder."
            )
        # Every rank writes them, and they write the same.
        _write(os.path.join(self.shard_folder, _CACHED_FROM), self.remote.encode())
        _write(path, self._index_bytes)

    def _cached_corpus(self) -> str:
        try:
            with open(os.path.join(self.shard_folder, _CACHED_FROM)) as file:
                theirs = file.read()
        except FileNotFoundError:  # not a cache of ours, but a corpus, or made by another program
            return "another corpus, which does not say where it is from"
        return "an older version of it" if theirs == self.remote else theirs

    def _read(self, url: str) -> bytes:
        return read_bytes(url, retries=self.retries, timeout_seconds=self.timeout_seconds)

    def _description_problems(self, expected: Expectation, tokenizer: str) -> list[str]:
        url = os.path.join(self.remote, "corpus.json")
        try:
            corpus = _parse_json(self._read(url), self.name)
        except FileNotFoundError:
            return [
                f"{url} must say with which tokenizer the shards were made, but there is none; "
                f"pass check_tokenizer=False if you know that it was {tokenizer!r}"
            ]
        its_tokenizer = corpus.get("tokenizer")
        if not isinstance(its_tokenizer, dict):
            its_tokenizer = {}
        known = describe_tokenizer(tokenizer)
        comparisons = [
            ("sequence_length", expected.sequence_length, corpus.get("sequence_length")),
            ("dtype", DTYPE, corpus.get("dtype")),
            ("tokenizer", known["name"], its_tokenizer.get("name")),
        ]
        if its_tokenizer.get("name") == known["name"]:
            comparisons += [
                (f"{key} of the tokenizer", known[key], its_tokenizer.get(key))
                for key in ("ranks_sha256", "sha256")
                if key in known
            ]
        return [
            f"the {what} must be {wanted!r}, but corpus.json says {got!r}; change the recipe, or "
            "prepare the corpus again"
            for what, wanted, got in comparisons
            if got != wanted
        ]


def _find_source(
    name: str,
    stream: Mapping[str, Any],
    default_split: str,
    retries: int,
    timeout_seconds: float,
) -> CorpusSource:
    if unknown := sorted(set(stream) - set(_STREAM_KEYS)):
        raise ValueError(f"Stream {name!r} may have the keys {_STREAM_KEYS}, got {unknown}.")
    remote, local = stream.get("remote"), stream.get("local")
    if remote is None:  # then `local` is the corpus itself
        remote, local = local, None
    if remote is None:
        raise ValueError(f"Stream {name!r} must say in `remote` where its corpus is, got nothing.")
    if not is_url(remote):
        remote = os.path.abspath(os.path.expanduser(remote))
    if local is not None:
        local = os.path.abspath(os.path.expanduser(local))
    proportion = stream.get("proportion")
    if proportion is not None and proportion <= 0:
        raise ValueError(f"The proportion of stream {name!r} must be above 0, got {proportion}.")
    repeat = stream.get("repeat")
    if repeat is not None and (repeat <= 0 or proportion is not None):
        raise ValueError(
            f"The repeat of stream {name!r} must be above 0 and stand without a proportion, got "
            f"repeat {repeat} and proportion {proportion}."
        )
    split = stream.get("split", default_split)
    label = os.path.join(name, split).rstrip("/")
    return CorpusSource(
        label, remote.rstrip("/"), local, split, proportion, repeat, retries, timeout_seconds
    )


def _default_cache(remote: str, index_bytes: bytes) -> str:
    root = os.environ.get("COMPOSER_GPT2_CACHE") or os.path.expanduser("~/.cache/composer-gpt2")
    key = hashlib.blake2s(remote.encode() + b"\0" + index_bytes, digest_size=16).hexdigest()
    return os.path.join(root, key)


def _write(path: str, data: bytes) -> None:
    with part_file(path) as part, open(part, "wb") as file:
        file.write(data)


def _parse_index(data: bytes, name: str) -> list[dict[str, Any]]:
    index = _parse_json(data, name)
    try:
        MDSIndex.model_validate(index)
    except ValueError as error:
        raise ValueError(
            f"{name}: index.json must be of MDS shards in version 2, but "
            f"{describe_problem(error)}; prepare the corpus again."
        ) from error
    return index["shards"]


def _parse_json(data: bytes, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        parsed = error
    if not isinstance(parsed, dict):
        raise ValueError(
            f"{name}: index.json and corpus.json must be JSON objects, got {parsed!r:.80}; prepare "
            "the corpus again."
        )
    return parsed
