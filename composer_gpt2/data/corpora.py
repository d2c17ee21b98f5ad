"""Readers: every kind of corpus as a fixed sequence of documents.

A :class:`Source` is one file (or one shard of a Hub data set). It yields its documents always in
the same order, each as a ``str`` or, where it cannot, as a :class:`BadDocument` that says where and
why; so the number of items read so far is a position from which reading can go on another day.

============================================  ====================================================
``.jsonl`` ``.ndjson`` ``.json``              one JSON object a line; blank lines are no documents
``.parquet``                                  one row a document
``.txt``                                      one file a document, or cut at a separator
``.tar.xz`` ``.tar.gz`` ``.tar.zst``          text files, or (the original ``openwebtext.tar.xz``)
                                              archives of text files
``hf://OWNER/NAME[/CONFIG][@REVISION]``       the train split of a data set of the Hugging Face Hub
============================================  ====================================================

jsonl and txt may be compressed: ``.gz``, ``.xz``, ``.zst``.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import logging
import lzma
import re
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import xxhash
from typing_extensions import override

__all__ = [
    "BadDocument",
    "HubShard",
    "JsonLines",
    "Parquet",
    "Source",
    "TextArchive",
    "TextFile",
    "open_decompressed",
    "open_sources",
]

log = logging.getLogger(__name__)


def open_sources(
    sources: Sequence[str], *, text_field: str = "text", split_on: str | None = None
) -> dict[str, list[Source]]:
    """Finds the files behind each of ``sources`` and checks that they can be read as a corpus.

    A folder stands for all corpus files below it (hidden ones excepted), a glob (``**`` allowed)
    for all that match; both in the order of their paths, compared part by part.

    Args:
        sources: Files, folders, globs and ``hf://`` addresses, in the order to be read.
        text_field: Name of the field or column that holds the text (jsonl, parquet, hf).
        split_on: Cuts txt files into documents at this separator; without it a file is a document.

    Returns:
        For each of ``sources`` its files, in reading order.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: A file of an unknown kind, a parquet file without the column, a file named
            twice, a separator but no txt file.
    """
    if isinstance(sources, str) or not sources:
        raise ValueError(
            f"sources must be a list of at least one file, folder, glob or hf:// address, got "
            f"{sources!r}."
        )
    if split_on == "":
        raise ValueError("split_on must not be empty; leave it out for one document a file.")
    found: dict[str, list[Source]] = {}
    for source in sources:
        if source in found:
            raise ValueError(f"Each source must be named once, got {source!r} twice.")
        if source.startswith("hf://"):
            found[source] = _open_hub(source, text_field)
        else:
            paths = _find_files(source)
            found[source] = [_open_file(path, text_field, split_on) for path in paths]
    files = [file for group in found.values() for file in group]
    owners: dict[str, str] = {}
    for file in files:
        identity = str(Path(file.name).resolve()) if isinstance(file, _File) else file.name
        if identity in owners:
            raise ValueError(
                f"Each file must be read once, but {file.name!r} is found twice; name it once."
            )
        owners[identity] = file.name
    if split_on is not None and not any(isinstance(file, TextFile) for file in files):
        raise ValueError(
            f"split_on applies to txt files only, got {split_on!r} and no txt file; leave it out."
        )
    return found


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used.

    Attributes:
        where: The file and the line, row or member.
        reason: What is wrong with it, to be read after ``where``.
    """

    where: str
    reason: str


class Source(ABC):
    """A fixed sequence of documents.

    Attributes:
        name: As shown to people, and the path of a file.
        n_bytes: Size on disk (compressed), or None if unknown.
        n_bytes_read: How far reading has come, of ``n_bytes``; for the progress bar.
    """

    name: str
    n_bytes: int | None
    n_bytes_read: int = 0

    @abstractmethod
    def documents(self, start: int = 0) -> Iterator[str | BadDocument]:
        """Yields the documents from position ``start`` (counted from 0, bad ones included)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the content does; cheap, so it samples large files."""


class _File(Source):
    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.n_bytes = path.stat().st_size

    def fingerprint(self) -> str:
        # Not the modification time: copies and rebuilt files of equal content are the same corpus.
        n_blocks, block_size = 16, 1 << 16  # up to 1 MiB is read whole, 16 blocks of more
        assert self.n_bytes is not None
        span = max(self.n_bytes - block_size, (n_blocks - 1) * block_size)
        digest = xxhash.xxh64(str(self.n_bytes).encode())
        with open(self.name, "rb") as file:
            for block in range(n_blocks):
                file.seek(span * block // (n_blocks - 1))
                digest.update(file.read(block_size))
        return digest.hexdigest()


class JsonLines(_File):
    """One JSON object a line."""

    def __init__(self, path: Path, text_field: str = "text") -> None:
        super().__init__(path)
        self.text_field = text_field

    @override
    def documents(self, start: int = 0) -> Iterator[str | BadDocument]:
        with open(self.name, "rb") as raw, open_decompressed(raw) as file:
            position, number = 0, 0
            while True:
                number += 1
                where = f"{self.name}:{number}"
                try:
                    line = file.readline()
                except _DAMAGE as error:
                    self.n_bytes_read = raw.tell()
                    if position >= start:
                        yield _damaged(where, error)
                    return
                if not line:
                    return
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of Windows
                if line.isspace():
                    continue
                if position >= start:
                    self.n_bytes_read = raw.tell()
                    yield self._text(line, where)
                position += 1

    def _text(self, line: bytes, where: str) -> str | BadDocument:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return BadDocument(where, f"is not UTF-8 ({error})")
        except (ValueError, RecursionError) as error:
            return BadDocument(where, f"is not JSON ({error})")
        if not isinstance(record, dict):
            return BadDocument(where, f"must be a JSON object, got {type(record).__name__}")
        return _text_field(record, self.text_field, where)


class Parquet(_File):
    """One row a document."""

    def __init__(self, path: Path, text_field: str = "text") -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(path)
        self.text_field = text_field
        try:
            schema = pq.read_schema(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} must be a parquet file, but {error}") from error
        if text_field not in schema.names:
            raise ValueError(
                f"{path} must have a column {text_field!r}, got {', '.join(schema.names)}; "
                "choose the column with text_field."
            )
        kind = schema.field(text_field).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(
                f"Column {text_field!r} of {path} must hold strings, got {kind}; "
                "choose another column with text_field."
            )

    @override
    def documents(self, start: int = 0) -> Iterator[str | BadDocument]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert self.n_bytes is not None
        with pq.ParquetFile(self.name) as file:
            row = 0
            groups = []
            for group in range(file.num_row_groups):
                n_rows = file.metadata.row_group(group).num_rows
                if not groups and row + n_rows <= start:
                    row += n_rows
                else:
                    groups.append(group)
            batches = file.iter_batches(1024, row_groups=groups, columns=[self.text_field])
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    yield _damaged(f"{self.name}: row {row + 1}", error)
                    return
                if batch is None:
                    return
                for value in batch.column(0):
                    row += 1
                    if row > start:
                        self.n_bytes_read = self.n_bytes * row // file.metadata.num_rows
                        yield self._text(value, f"{self.name}: row {row}")

    def _text(self, value: Any, where: str) -> str | BadDocument:
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            return BadDocument(where, f"is not UTF-8 ({error})")
        return _text_field({self.text_field: text}, self.text_field, where)


class TextFile(_File):
    """A text file: one document, or as many as a separator cuts it into (empty ones are none)."""

    def __init__(self, path: Path, split_on: str | None = None) -> None:
        super().__init__(path)
        self.split_on = split_on

    @override
    def documents(self, start: int = 0) -> Iterator[str | BadDocument]:
        return islice(self._documents(), start, None)

    def _documents(self) -> Iterator[str | BadDocument]:
        with open(self.name, "rb") as raw, open_decompressed(raw) as file:
            line = 1
            try:
                if self.split_on is None:
                    pieces = iter([file.read()])
                else:
                    pieces = _pieces(file, self.split_on.encode())
                for piece in pieces:
                    self.n_bytes_read = raw.tell()
                    if piece or self.split_on is None:
                        yield _decode(piece, f"{self.name}:{line}")
                    line += (piece + (self.split_on or "").encode()).count(b"\n")
            except _DAMAGE as error:
                yield _damaged(f"{self.name}:{line}", error)


class TextArchive(_File):
    """A compressed tar of ``.txt`` files and of further such archives, read front to back."""

    @override
    def documents(self, start: int = 0) -> Iterator[str | BadDocument]:
        return islice(self._documents(), start, None)

    def _documents(self) -> Iterator[str | BadDocument]:
        with open(self.name, "rb") as raw, open_decompressed(raw) as file:
            for document in _archive_documents(file, self.name):
                self.n_bytes_read = raw.tell()
                yield document


class HubShard(Source):
    """One of the shards (usually one file) of a data set of the Hugging Face Hub, streamed."""

    n_bytes = None

    def __init__(self, dataset: Any, index: int, address: str, text_field: str) -> None:
        self.name = f"{address}#{index}"
        self.text_field = text_field
        self._dataset = dataset
        self._index = index

    @override
    def documents(self, start: int = 0) -> Iterator[str | BadDocument]:
        shard = self._dataset.shard(num_shards=self._dataset.num_shards, index=self._index)
        for row, record in enumerate(shard.skip(start), start + 1):
            yield _text_field(record, self.text_field, f"{self.name}: row {row}")

    @override
    def fingerprint(self) -> str:
        return self.name  # the address holds the commit


_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_COMPRESSIONS = (".gz", ".xz", ".zst")
_ARCHIVE_SUFFIXES = tuple(f".tar{compression}" for compression in _COMPRESSIONS)
_KINDS = "jsonl, parquet, txt (jsonl and txt also with .gz, .xz, .zst) or tar.xz, tar.gz, tar.zst"
# What truncated and corrupt files raise. pyarrow's zstd raises a bare OSError: see _damaged.
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, OSError)


def _kind(name: str) -> str | None:
    """The suffix that says how to read a file: ``.jsonl``, ``.parquet``, ``.txt``, ``.tar``."""
    name = name.lower()
    if name.endswith(_ARCHIVE_SUFFIXES):
        return ".tar"
    if name.endswith(".parquet"):
        return ".parquet"
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    if name.endswith(_JSON_SUFFIXES):
        return ".jsonl"
    return ".txt" if name.endswith(".txt") else None


def _find_files(source: str) -> list[Path]:
    if "://" in source:
        raise ValueError(
            f"A source must be a file, folder, glob or hf:// address, got {source!r}; "
            "copy it to this machine first."
        )
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        files = [file for file in files if not _is_hidden(file.relative_to(path))]
        ignored = sorted(str(file) for file in files if _kind(file.name) is None)
        if ignored:
            log.warning("%s: ignored %d files, as %s", source, len(ignored), ignored[0])
        files = [file for file in files if _kind(file.name)]
    else:
        matches = glob.glob(str(path), recursive=True)
        files = [Path(match) for match in matches if Path(match).is_file()]
    if not files:
        raise FileNotFoundError(
            f"A source must be a file, a folder or a glob that holds files ({_KINDS}), got "
            f"{source!r}, which has none; check the path."
        )
    return sorted(files)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _open_file(path: Path, text_field: str, split_on: str | None) -> Source:
    match _kind(path.name):
        case ".jsonl":
            return JsonLines(path, text_field)
        case ".parquet":
            return Parquet(path, text_field)
        case ".txt":
            return TextFile(path, split_on)
        case ".tar":
            return TextArchive(path)
    raise ValueError(f"A source must be {_KINDS}, got {str(path)!r}; rename or convert it.")


def _open_hub(address: str, text_field: str) -> list[Source]:
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:/([^@]+))?(?:@(.+))?", address)
    if match is None:
        raise ValueError(
            f"A Hub source must read hf://OWNER/NAME[/CONFIG][@REVISION], got {address!r}."
        )
    from datasets import load_dataset
    from huggingface_hub import HfApi

    name, config, revision = match.groups()
    try:
        # The commit is pinned, so that a run that is continued next week reads the same data.
        commit = HfApi().dataset_info(name, revision=revision).sha
        dataset = load_dataset(name, config, split="train", streaming=True, revision=commit)
    except OSError as error:
        raise ConnectionError(
            f"{address} cannot be opened: {error}. Check the name, the network, HF_TOKEN for "
            "private data and that HF_HUB_OFFLINE is not set."
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"{address} cannot be read without running its code: {error}. Its conversion to "
            f"parquet may be there: hf://{name}@refs/convert/parquet."
        ) from error
    if dataset.column_names is not None and text_field not in dataset.column_names:
        raise ValueError(
            f"{address} must have a column {text_field!r}, got {', '.join(dataset.column_names)}; "
            "choose the column with text_field."
        )
    pinned = f"hf://{name}{f'/{config}' if config else ''}@{commit}"
    return [HubShard(dataset, i, pinned, text_field) for i in range(dataset.num_shards)]


def open_decompressed(raw: IO[bytes], name: str | None = None) -> IO[bytes]:
    """The content of a file by the suffix of its name."""
    suffix = Path(name or raw.name).suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        # Not the zstandard package: its reader ends a truncated file without an error.
        import pyarrow as pa

        return io.BufferedReader(cast(Any, pa.CompressedInputStream(raw, "zstd")))
    return raw


def _damaged(where: str, error: Exception) -> BadDocument:
    if isinstance(error, OSError) and error.errno is not None:
        raise error  # the disk, not the data
    return BadDocument(where, f"and all after it cannot be read: the file is damaged ({error})")


def _text_field(record: dict[str, Any], field: str, where: str) -> str | BadDocument:
    if field not in record:
        fields = ", ".join(map(repr, record)) or "none"
        return BadDocument(where, f"must have a field {field!r}, got {fields}")
    text = record[field]
    if not isinstance(text, str):
        return BadDocument(where, f"field {field!r} must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\ud800"
        return BadDocument(where, f"field {field!r} is not Unicode text ({error})")
    return text


def _decode(text: bytes, where: str) -> str | BadDocument:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadDocument(where, f"is not UTF-8 ({error})")


def _pieces(file: IO[bytes], separator: bytes) -> Iterator[bytes]:
    """What lies between the separators, in memory that a piece and not the file determines."""
    tail = b""
    # Reading as much again as is waiting keeps the copying linear in the longest piece.
    while chunk := file.read(max(1 << 20, len(tail))):
        *pieces, tail = (tail + chunk).split(separator)
        yield from pieces
    yield tail


def _archive_documents(file: IO[bytes], name: str) -> Iterator[str | BadDocument]:
    where = name
    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            while (member := archive.next()) is not None:
                # tarfile remembers each member, and there may be millions.
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                if not member.isfile():
                    continue
                where = f"{name}!{member.name}"
                content = archive.extractfile(member)
                assert content is not None
                if member.name.endswith(".txt"):
                    yield _decode(content.read(), where)
                elif member.name.endswith(_COMPRESSIONS):
                    with open_decompressed(content, member.name) as inner:
                        yield from _archive_documents(inner, where)
                else:
                    yield BadDocument(where, "must be a .txt file or a compressed archive of them")
    except _DAMAGE as error:
        yield _damaged(where, error)
