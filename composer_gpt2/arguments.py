"""Whether a value that YAML can say may be passed to a parameter of a Python function.

A parameter's annotation says what type it takes; a :data:`Limit` what the type does not say.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pydantic

from composer_gpt2.durations import parse_duration

__all__ = [
    "BELOW_ONE",
    "BETAS",
    "NOT_NEGATIVE",
    "POSITIVE",
    "Limit",
    "each",
    "limit",
    "nearest",
    "one_of",
    "problem",
    "time",
    "type_hints",
]

Limit = Callable[[Any], str | None]
"""Says what is wrong with a value of the right type; ``None`` if nothing is."""


def nearest(name: object, known: Iterable[object]) -> str:
    """``" (did you mean 'x'?)"``, or nothing where no known name resembles ``name``."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def limit(holds: Callable[[Any], bool], text: str) -> Limit:
    """A condition and its words, as they follow "must be"."""
    return lambda value: None if holds(value) else f"must be {text}, got {value!r}"


def one_of(*allowed: str) -> Limit:
    """One of a few words."""
    return lambda value: (
        None
        if value in allowed
        else f"must be one of {', '.join(allowed)}; got {value!r}{nearest(value, allowed)}"
    )


def time(*units: str) -> Limit:
    """A time in some units; in any of them if none is given."""

    def problem(value: Any) -> str | None:
        try:
            parse_duration(value, *([units] if units else []))
        except ValueError as error:
            return str(error)
        return None

    return problem


def each(limit: Limit) -> Limit:
    """A limit on every item of a list."""
    return lambda values: next(filter(None, map(limit, values)), None)


POSITIVE = limit(lambda x: 0 < x < math.inf, "above 0")
NOT_NEGATIVE = limit(lambda x: 0 <= x < math.inf, "0 or above")
BELOW_ONE = limit(lambda x: 0 <= x < 1, "in [0, 1)")
BETAS = limit(lambda pair: all(0 <= x < 1 for x in pair), "two numbers in [0, 1)")


def problem(value: Any, hint: Any, limit: Limit | None = None) -> str | None:
    """What is wrong with ``value`` for a parameter annotated ``hint``; ``None`` if nothing is."""
    try:
        # Strict JSON is what YAML can say: a list may become a tuple, "1" never becomes 1.
        adapter = pydantic.TypeAdapter(
            hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True, strict=True)
        )
        adapter.validate_json(json.dumps(value))
    except (pydantic.ValidationError, TypeError):
        return f"must be {_describe(hint)}, got {value!r}"
    if limit is None and isinstance(value, str) and any(map(_is_time, _options(hint))):
        limit = time()
    return limit(value) if limit is not None and value is not None else None


def _describe(hint: Any) -> str:
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    options = [option for option in _options(hint) if option is not types.NoneType]
    if any(map(_is_time, options)):
        options = [option for option in options if option is not str]
    said = [
        words.get(option)
        or ("a time such as 10ba" if _is_time(option) else None)
        or ("a list" if inspect.isclass(option) and issubclass(option, Sequence) else None)
        for option in (typing.get_origin(option) or option for option in options)
    ]
    return " or ".join(filter(None, said)) or "left out: YAML cannot express it"


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _is_time(hint: Any) -> bool:
    return getattr(hint, "__module__", "") == "composer.core.time" and hint.__name__ == "Time"


def type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations as types; those that only exist for type checkers become :data:`typing.Any`."""
    from composer.core import Time

    scope = {**getattr(function, "__globals__", {}), "Time": Time}
    hints = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        try:
            hints[name] = typing.get_type_hints(
                types.SimpleNamespace(__annotations__={name: annotation}), scope
            )[name]
        except (NameError, TypeError):
            hints[name] = Any
    return hints
