"""What an ``index.json`` of MDS shards must be before anything that it names is read or written.

mosaicml-streaming believes what it reads: a file name with ``..`` would lead out of the corpus.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from streaming.base.compression import get_compressions
from streaming.base.hashing import get_hashes

__all__ = ["SAFE_NAME", "MDSIndex", "describe_problem"]

SAFE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names that lie in the folder they are in."""

_MAX_BYTES = 2**32 - 1  # offsets in a shard have 32 bits


def describe_problem(error: Exception) -> str:
    """The first thing that is wrong, in a line."""
    if not isinstance(error, pydantic.ValidationError):
        return f"{type(error).__name__}: {error}"
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}, got {problem['input']!r:.80}".removeprefix(": ")


def _one_of_streamings_compressions(name: str | None) -> str | None:
    if name is not None and name not in get_compressions():
        raise ValueError("must be an algorithm of streaming's")
    return name


def _one_of_streamings_hashes(name: str) -> str:
    if name not in get_hashes():
        raise ValueError("must be an algorithm of streaming's")
    return name


_Hash = Annotated[str, pydantic.AfterValidator(_one_of_streamings_hashes)]
_Compression = Annotated[str | None, pydantic.AfterValidator(_one_of_streamings_compressions)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _File(_Strict):
    basename: Annotated[str, Field(pattern=SAFE_NAME, max_length=255)]
    bytes: Annotated[int, Field(gt=0, le=_MAX_BYTES)]
    hashes: dict[_Hash, str]


class _Shard(_Strict):
    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[int | None]
    compression: _Compression
    format: Literal["mds"]
    hashes: list[_Hash]
    raw_data: _File
    samples: Annotated[int, Field(gt=0, le=_MAX_BYTES)]
    size_limit: int | str | None
    version: Literal[2]
    zip_data: _File | None

    @pydantic.model_validator(mode="after")
    def _is_consistent(self) -> _Shard:
        if not len(self.column_encodings) == len(self.column_names) == len(self.column_sizes):
            raise ValueError("there must be as many column names as encodings and sizes")
        if (self.zip_data is None) != (self.compression is None):
            raise ValueError("there must be zip_data where there is a compression, and only there")
        if 4 * self.samples >= self.raw_data.bytes:
            raise ValueError(f"{self.samples} samples must fit into {self.raw_data.bytes} bytes")
        return self


class MDSIndex(_Strict):
    """The whole file."""

    shards: list[_Shard]
    version: Literal[2]

    @pydantic.model_validator(mode="after")
    def _has_each_file_once(self) -> MDSIndex:
        files = [f.basename for s in self.shards for f in (s.raw_data, s.zip_data) if f is not None]
        name, count = Counter(files).most_common(1)[0] if files else ("", 0)
        if count > 1:
            raise ValueError(f"each file must be listed once, but {name} is {count} times")
        return self
