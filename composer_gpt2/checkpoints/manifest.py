"""What makes a set of files a checkpoint: a manifest that names each with its size and hash.

A checkpoint ``ep0-ba100`` is ``ep0-ba100-rank0.pt`` (all that a run needs to go on),
``ep0-ba100-rank0.safetensors`` (the weights alone) and ``ep0-ba100-rank0.json``, the manifest. The
manifest is written last, so a checkpoint without one was never finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "MANIFEST_NAME",
    "CheckpointError",
    "FileRecord",
    "Manifest",
    "file_problem",
    "newest_first",
    "read_manifest",
    "record_file",
]

MANIFEST_NAME = re.compile(r"ep(?P<epoch>\d+)-ba(?P<batch>\d+)-rank0\.json")
"""Names of manifests among the files of a save folder."""

_FORMAT = 1
_CHUNK_BYTES = 1 << 22


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, unreadable, or would run code when it is loaded."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and the SHA-256 of its content."""

    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of, and where in which run it was made.

    Attributes:
        name: As in the names of its files: ``ep0-ba100``.
        times: The run's timestamp in Composer's units: ``ba``, ``ep``, ``sp``, ``tok``.
        files: Name to record, the manifest itself left out.
        recipe: The resolved recipe of the run.
    """

    name: str
    times: Mapping[str, int]
    files: Mapping[str, FileRecord]
    recipe: Mapping[str, Any]

    @property
    def state_file(self) -> str:
        """The file that a run goes on from."""
        return f"{self.name}-rank0.pt"

    @property
    def weights_file(self) -> str:
        """The weights as safetensors."""
        return f"{self.name}-rank0.safetensors"

    @property
    def file(self) -> str:
        """Its own name."""
        return f"{self.name}-rank0.json"

    @property
    def batch(self) -> int:
        """Batches trained."""
        return self.times["ba"]

    def to_json(self) -> str:
        """Its content as a file."""
        content = {"format": _FORMAT, **asdict(self)}
        return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


def read_manifest(text: str | bytes) -> Manifest:
    """A manifest from its file.

    Raises:
        CheckpointError: It is none.
    """
    try:
        values = json.loads(text)
        if values["format"] != _FORMAT:
            raise ValueError(f"format {values['format']}")
        if values.pop("sha256") != _digest(values):
            raise ValueError("its SHA-256 is not that of its content")
        return Manifest(
            name=str(values["name"]),
            times={unit: int(value) for unit, value in values["times"].items()},
            files={
                name: FileRecord(int(record["n_bytes"]), str(record["sha256"]))
                for name, record in values["files"].items()
            },
            recipe=dict(values["recipe"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"a manifest must be JSON of format {_FORMAT} with name, times, files and recipe, got "
            f"{type(error).__name__}: {error}."
        ) from error


def record_file(path: Path, progress: Callable[[int], object] = lambda _: None) -> FileRecord:
    """Size and hash of a file; ``progress`` is called with the bytes of each part."""
    digest, n_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            n_bytes += len(chunk)
            progress(len(chunk))
    return FileRecord(n_bytes, digest.hexdigest())


def file_problem(path: Path, expected: FileRecord) -> str | None:
    """In which way a file is not what its record says; ``None`` if it is."""
    if not path.is_file():
        return f"{path.name} is missing"
    n_bytes = path.stat().st_size
    if n_bytes != expected.n_bytes:
        return f"{path.name} has {n_bytes} bytes instead of {expected.n_bytes}"
    if record_file(path).sha256 != expected.sha256:
        return f"{path.name} has another SHA-256 than its manifest says"
    return None


def newest_first(names: Iterable[str]) -> list[str]:
    """The names of manifests among ``names``, those of later batches first."""
    found = [match for match in map(MANIFEST_NAME.fullmatch, names) if match]
    found.sort(key=lambda match: (int(match["batch"]), int(match["epoch"])), reverse=True)
    return [match[0] for match in found]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
