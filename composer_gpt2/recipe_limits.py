"""What a recipe file may be before anybody believes it: small, shallow, plain values only.

YAML can say in a few lines what takes gigabytes to build (aliases of aliases, interpolations of
interpolations), name Python objects to be made, and point to files that never end. All of that is
refused here, before it is built; what remains costs at most a few seconds.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

__all__ = ["DEEPEST", "check_yaml", "expanded_size_problem", "read_file", "value_problem"]

DEEPEST = 20
"""Levels of nesting in a recipe, and files in a chain of bases."""

_MAX_BYTES = 256 * 1024
_MAX_NODES = 1_000  # with as many mistakes in them the message takes some seconds
_MAX_INTERPOLATED_LENGTH = 1_000
_MAX_EXPANDED_SIZE = 1_000_000
_SIZE_OF_A_REFERENCE = 100  # so that following them all takes about a second

_PLAIN_TAGS = {"!", *(f"tag:yaml.org,2002:{name}" for name in ("map", "null", "seq", "str"))}
# Python takes for ever to read some, and refuses to print others.
_LONG_NUMBER = re.compile(r"[-+]?(?:0x[0-9a-f_]{17,}|0b[01_]{64,}|[0-9_:]{19,})", re.IGNORECASE)

_KEY = r"[A-Za-z_][\w-]*(?:\.[\w-]+)*"
# An odd number of backslashes before `${` makes it plain text.
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_ALLOWED = re.compile(rf"\s*(?:oc\.env\s*:|({_KEY})\s*\}})")


def read_file(path: Path) -> bytes:
    """The content of a recipe file.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is a folder, a device or a pipe, or is too large.
    """
    # A pipe that nobody writes to would be waited for.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is a device or a pipe")
        content = file.read(_MAX_BYTES + 1)
    if content is None:  # files of the kernel, such as /proc/kmsg
        raise ValueError("there is nothing to read in it now")
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
    return content


def check_yaml(text: str) -> None:
    """Refuses text that would be large, deep or more than plain values once it is built.

    Raises:
        ValueError: With the reason.
        yaml.YAMLError: It is not YAML.
    """
    if len(text) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES:,} characters")
    n_nodes = 0  # with what aliases stand for
    sizes: dict[str, int] = {}
    enclosing: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in enclosing):
                raise ValueError(
                    f"YAML recursive aliases: *{event.anchor} of line {line} is inside itself"
                )
            n_nodes += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, n_before = enclosing.pop()
            if anchor is not None:
                sizes[anchor] = n_nodes - n_before
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            if event.tag is not None and event.tag not in _PLAIN_TAGS:
                raise ValueError(
                    f"line {line}: could not determine a constructor for the tag {event.tag:.80}; "
                    "a recipe has plain values only"
                )
            if isinstance(event, yaml.CollectionStartEvent):
                enclosing.append((event.anchor, n_nodes))
            elif "${" in event.value and len(event.value) > _MAX_INTERPOLATED_LENGTH:
                raise ValueError(
                    f"line {line}: text with ${{...}} has more than {_MAX_INTERPOLATED_LENGTH:,} "
                    "characters"
                )
            elif event.style is None and _LONG_NUMBER.fullmatch(event.value):
                raise ValueError(f"line {line}: a whole number has more than 18 digits")
            elif event.anchor is not None:
                sizes[event.anchor] = 1
            n_nodes += 1
        if len(enclosing) > DEEPEST:
            raise ValueError(f"line {line}: it is nested more than {DEEPEST} levels deep")
        if n_nodes > _MAX_NODES:
            raise ValueError(f"line {line}: it has more than {_MAX_NODES:,} keys and values")


def value_problem(value: Any) -> str | None:
    """Why a recipe may not hold a key or single value; ``None`` if it may."""
    if not isinstance(value, str):
        return None
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        return f"must be Unicode text, got {value!r}"
    for found in _INTERPOLATION.finditer(value):
        if not _ALLOWED.match(value, found.end()):
            return (
                "may refer to ${another.key}, ${oc.env:NAME} and ${oc.env:NAME,default} only, got "
                f"{value!r}; write \\${{ for a plain ${{"
            )
    return None


def expanded_size_problem(values: Any) -> str | None:
    """Whether replacing all references between values by what they mean would take too much.

    Args:
        values: What :func:`value_problem` has found nothing in.
    """
    known: dict[str, int] = {}

    def size(value: Any) -> int:
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            return 1 + sum(map(size, inner))
        if not isinstance(value, str):
            return 1
        keys = (_ALLOWED.match(value, found.end()) for found in _INTERPOLATION.finditer(value))
        referred = (key[1] for key in keys if key and key[1])
        return 1 + len(value) + sum(_SIZE_OF_A_REFERENCE + size_of(key) for key in referred)

    def size_of(key: str) -> int:
        if key not in known:
            known[key] = 0  # within itself: the loop is found when it is resolved
            known[key] = size(_select(values, key.split(".")))
        return known[key]

    try:
        expanded = size(values)
    except RecursionError:
        return "must not have chains of hundreds of ${...} that refer to one another"
    if expanded > _MAX_EXPANDED_SIZE:
        return "must not have ${...} of ${...} that multiply to millions of values"
    return None


def _select(values: Any, keys: list[str]) -> Any:
    for key in keys:
        if isinstance(values, dict):
            values = values.get(key)
        elif isinstance(values, list) and key.isdecimal() and int(key) < len(values):
            values = values[int(key)]
        else:
            return None
    return values
