"""Recipe files and command-line overrides, merged into one mapping that remembers its sources.

This half of a recipe knows YAML and nothing about GPT-2: which file or argument set which key, on
which line, and what its interpolations mean. What the keys mean is ``recipe.py``; how large a file
may be, and what may stand in it at all, is ``recipe_limits.py``.

A *path* is a tuple of keys, such as ``("optimizer", "adamw", "lr")``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from composer_gpt2.arguments import nearest
from composer_gpt2.recipe_limits import (
    DEEPEST,
    check_yaml,
    expanded_size_problem,
    read_file,
    value_problem,
)

__all__ = ["CHOICES", "KeyPath", "Merged", "Mistake", "Origin", "merge"]

KeyPath = tuple[Any, ...]

CHOICES = ("optimizer", "schedulers", "algorithms", "callbacks", "loggers")
"""Sections whose entries are added by ``name: {arguments}`` and switched off by ``name: null``."""


class Origin(NamedTuple):
    """Who set a key."""

    source: str
    """A file as it was named, or ``command line``."""
    line: int = 0
    """Counted from 1; 0 where there is none."""
    layer: int = 0
    """Position in the order of precedence: higher wins."""


class Mistake(NamedTuple):
    """One thing that is wrong with a recipe."""

    origin: Origin | None
    """Where it was written; ``None`` where nobody wrote anything."""
    key: str
    """Dotted; empty where the mistake is about a whole file."""
    message: str

    def __str__(self) -> str:
        """``yamls/mine.yaml:7: optimizer.adamw.lr must be above 0, got -1``."""
        where = ""
        if self.origin is not None:
            line = f":{self.origin.line}" if self.origin.line else ""
            where = f"{self.origin.source}{line}: "
        return where + " ".join(filter(None, (self.key, self.message)))


class Merged(NamedTuple):
    """All layers as one mapping of plain values, without interpolations."""

    values: dict[str, Any]
    origins: dict[KeyPath, Origin]
    mistakes: list[Mistake]
    unknown: set[KeyPath]
    """Paths that are left out of the values because they could not be resolved."""
    complete: bool
    """Whether everything could be read; if not, a missing key means nothing."""

    def origin(self, path: KeyPath) -> Origin | None:
        """Who set a path, or what encloses it; ``None`` if it is the schema's default."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return None


def merge(files: Sequence[Path], overrides: Sequence[str]) -> Merged:
    """Merges ``base:`` chains, then files in order, then ``key=value`` overrides; later wins.

    Mappings merge key by key; lists and single values replace one another. A file that is reached
    twice counts once, at its first place, so that a base never undoes what was set on top of it.
    """
    reader = _Reader()
    for file in files:
        reader.read(file)
    for override in overrides:
        reader.override(override)
    merged = Merged({}, reader.origins, reader.mistakes, set(), reader.complete)
    layers = _without_refused(functools.reduce(_merge_two, reader.layers), (), merged)
    if problem := expanded_size_problem(layers):
        merged.mistakes.append(Mistake(None, "", problem))
        return merged._replace(complete=False)
    merged.values.update(_resolve(OmegaConf.create(layers), (), merged))
    return merged


def _merge_two(below: dict[Any, Any], above: dict[Any, Any]) -> dict[Any, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(below.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge_two(below[key], value) if both else value
    return merged


class _Reader:
    """Collects layers in the order of precedence, and the mistakes on the way."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Any]] = [{}]
        self.origins: dict[KeyPath, Origin] = {}
        self.mistakes: list[Mistake] = []
        self.complete = True
        self._seen: set[Path] = set()

    def read(
        self, file: Path, chain: tuple[Path, ...] = (), named_in: Origin | None = None
    ) -> None:
        """Adds a file's bases, then the file."""
        try:
            resolved = file.resolve()
            content = read_file(file)
        except OSError as error:
            self._fail(named_in, "base" if named_in else "", _cannot_open(file, error))
            return
        except (ValueError, RuntimeError) as error:  # pathlib's, for NUL and a loop of links
            where = f"recipe must be a readable file, got {str(file)!r} ({error})"
            self._fail(named_in, "base" if named_in else "", where)
            return
        if resolved in chain:
            loop = " -> ".join(p.name for p in (*chain[chain.index(resolved) :], resolved))
            self._fail(named_in, "base", f"must not lead back to its file, got {loop}")
            return
        if len(chain) == DEEPEST:
            self._fail(named_in, "base", f"must not be in a chain of more than {DEEPEST} files")
            return
        if resolved in self._seen:
            return
        self._seen.add(resolved)
        try:
            tree, layer = _parse(content)
        except ValueError as error:
            self._fail(Origin(str(file)), "", str(error))
            return
        lines = list(_lines(tree, ()))
        base_line = next((line for path, line, _ in lines if path == ("base",)), 0)
        bases = layer.pop("base", [])
        for base in bases if isinstance(bases, list) else [bases]:
            named_here = Origin(str(file), base_line, len(self.layers))
            if isinstance(base, str):
                self.read(file.parent / base, (*chain, resolved), named_here)
            else:
                self._fail(named_here, "base", f"must be a path or a list of paths, got {base!r}")
        self._add(layer, lines, str(file))

    def override(self, override: str) -> None:
        """Adds one ``key=value`` of the command line."""
        key, equals, text = override.partition("=")
        path = key.strip().split(".")
        origin = Origin("command line", layer=len(self.layers))
        if not equals or not all(path):
            self._fail(origin, "", f"must be key=value, got {override!r}; e.g. max_duration=100ba")
            return
        if len(path) > DEEPEST:
            self._fail(origin, "", f"must have at most {DEEPEST} keys before =, got {len(path)}")
            return
        if not text.strip():
            self._fail(origin, key, "has no value; write null, '' or {} if you mean one of them")
            return
        try:
            check_yaml(text)
            tree = yaml.compose(text, Loader=yaml.SafeLoader)
            layer: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            self._fail(origin, key, f"must be a plain YAML value: {_one_line(error)}")
            return
        layer = layer["value"]
        for name in reversed(path):
            layer = {name: layer}
        prefixes: list[tuple[KeyPath, int, bool]] = [
            (tuple(path[: n + 1]), 0, False) for n in range(len(path))
        ]
        below = [(inner, 0, empty) for inner, _, empty in _lines(tree, tuple(path))]
        self._add(layer, prefixes + below, origin.source)

    def _add(
        self, layer: dict[str, Any], lines: list[tuple[KeyPath, int, bool]], source: str
    ) -> None:
        number = len(self.layers)
        for section in CHOICES:
            if isinstance(layer.get(section), list):
                layer[section] = self._from_list(
                    layer[section], section, Origin(source, _line_of(lines, (section,)), number)
                )
        for path, line, is_empty in lines:
            if is_empty and path[0] in CHOICES and len(path) <= 2:
                self._fail(
                    Origin(source, line, number),
                    _dotted(path),
                    "has no value; write {} for its defaults, or null to switch it off",
                )
        set_here = {path: Origin(source, line, number) for path, line, _ in lines}
        replaced = {path for path in set_here if not isinstance(_at(layer, path), dict)}
        for path in list(self.origins):
            if any(path[: n + 1] in replaced for n in range(len(path))):
                del self.origins[path]
        self.origins.update(set_here)
        self.layers.append(layer)

    def _from_list(self, items: list[Any], section: str, origin: Origin) -> dict[str, Any]:
        """The spelling of 2022: a list of names, or of mappings with one name each."""
        section_as_mapping: dict[str, Any] = {}
        for item in items:
            named = {item: {}} if isinstance(item, str) else item
            if not isinstance(named, dict) or len(named) != 1 or named.keys() & section_as_mapping:
                self._fail(
                    origin,
                    section,
                    f"must be a mapping, or a list that has each name once, got {item!r} in it",
                )
                continue
            section_as_mapping |= named
        return section_as_mapping

    def _fail(self, origin: Origin | None, key: str, message: str) -> None:
        self.mistakes.append(Mistake(origin, key, message))
        self.complete = False


def _parse(content: bytes) -> tuple[yaml.Node | None, dict[str, Any]]:
    """The YAML tree, which has line numbers, and the plain values."""
    try:
        text = content.decode("utf-8")
        check_yaml(text)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(tree, yaml.MappingNode | None):
            raise ValueError("must be a mapping of keys to values")
        # OmegaConf reads 6e-4 as a number, refuses duplicate keys and builds no Python objects.
        layer: Any = OmegaConf.to_container(OmegaConf.create(text))
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8 text: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"must be plain YAML: {_one_line(error)}") from error
    return tree, layer


def _lines(node: yaml.Node | None, path: KeyPath) -> Iterator[tuple[KeyPath, int, bool]]:
    """Each path below a node with its line and whether nothing at all stands after its key."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            yield here, key.start_mark.line + 1, _is_empty(value)
            yield from _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            if len(path) == 1 and path[0] in CHOICES:  # The list spelling: names, not positions.
                if isinstance(value, yaml.ScalarNode):
                    yield (*path, value.value), value.start_mark.line + 1, False
                yield from _lines(value, path)
            else:
                yield (*path, index), value.start_mark.line + 1, False
                yield from _lines(value, (*path, index))


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None


def _line_of(lines: list[tuple[KeyPath, int, bool]], wanted: KeyPath) -> int:
    return next((line for path, line, _ in lines if path == wanted), 0)


def _at(value: Any, path: KeyPath) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _without_refused(value: Any, path: KeyPath, merged: Merged) -> Any:
    """The values that a recipe may hold; each of the others becomes a mistake."""
    if not isinstance(value, dict | list):
        return value
    kept: dict[Any, Any] = {}
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        here = (*path, key)
        if problem := value_problem(key) or value_problem(inner):
            merged.mistakes.append(Mistake(merged.origin(here), _dotted(here), problem))
            merged.unknown.add(here)
        else:
            kept[key] = _without_refused(inner, here, merged)
    return kept if isinstance(value, dict) else list(kept.values())


def _resolve(node: Any, path: KeyPath, merged: Merged) -> Any:
    """Plain values of a node; what cannot be resolved is left out and becomes a mistake."""
    if len(path) > DEEPEST:  # two keys that refer to each other
        raise RecursionError
    is_list = isinstance(node, ListConfig)
    keys: Iterable[Any] = range(len(node)) if is_list else node.keys()
    plain: dict[Any, Any] = {}
    for key in keys:
        here = (*path, key)
        try:
            value = node[key]
            if isinstance(value, DictConfig | ListConfig):
                value = _resolve(value, here, merged)
        except (OmegaConfBaseException, RecursionError) as error:
            if isinstance(error, RecursionError) and path:
                raise  # Reported once, at the top.
            merged.mistakes.append(
                Mistake(merged.origin(here), _dotted(here), _cannot_resolve(error, _dotted(here)))
            )
            merged.unknown.add(here)
        else:
            plain[key] = value
    return list(plain.values()) if is_list else plain


def _cannot_resolve(error: Exception, key: str) -> str:
    variable = re.search(r"Environment variable '(.*?)' not found", str(error))
    if variable:
        return (
            f"needs the environment variable {variable[1]}, which is not set; "
            f"export {variable[1]}=... or pass {key}=..."
        )
    if isinstance(error, MissingMandatoryValue):
        return f"must be given; pass {key}=..."
    if isinstance(error, RecursionError):
        return "must not refer to itself"
    return f"cannot be resolved: {_one_line(error)}"


def _cannot_open(file: Path, error: OSError) -> str:
    there = [path.name for path in file.parent.glob("*.yaml")]
    suggestion = nearest(file.name, there) if isinstance(error, FileNotFoundError) else ""
    return f"recipe must be a readable file, got {str(file)!r} ({error.strerror}){suggestion}"


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _one_line(error: Exception) -> str:
    """A parser's message without its line breaks and its Python details."""
    text = str(error).split("\n    full_key:")[0]
    return " ".join(text.replace('in "<unicode string>", ', "at ").split())
