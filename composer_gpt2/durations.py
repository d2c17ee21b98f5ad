"""Times as recipes write them (``140ba``, ``0.01dur``), read without importing Composer.

Composer's own parser takes five seconds to import and reads the bare number ``"5"`` as 50 seconds;
what this one accepts, Composer reads the same way.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["UNITS", "Duration", "parse_duration"]

# Not Composer's `iter`: its Trainer has no argument that makes an iteration end, so such a time
# would never come.
UNITS = {
    "ba": "batches",
    "tok": "tokens",
    "sp": "sequences",
    "ep": "epochs",
    "dur": "fraction of max_duration",
    "sec": "seconds",
}


class Duration(NamedTuple):
    """An amount, whole unless it is a fraction (``dur``), and its unit, one of :data:`UNITS`."""

    value: int | float
    unit: str


def parse_duration(text: object, units: tuple[str, ...] = tuple(UNITS)) -> Duration:
    """Reads ``140ba``, ``2e9tok``, ``0.01dur``.

    Args:
        text: A number that is not negative, directly followed by a unit.
        units: The units that make sense where the time stands.

    Raises:
        ValueError: ``text`` is not such a time; the message says what is.
    """
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is not None and match["unit"] in units:
        value = float(match["value"])
        if value >= _END_OF_TIME:
            raise ValueError(f"must be below 2**63 {UNITS[match['unit']]}, got {text!r}")
        if match["unit"] == "dur":
            return Duration(value, "dur")
        if value.is_integer():
            return Duration(int(value), match["unit"])
        raise ValueError(f"must be a whole number of {UNITS[match['unit']]}, got {text!r}")
    meanings = ", ".join(f"{unit} ({UNITS[unit]})" for unit in units)
    example = f"140{units[0]}"
    if isinstance(text, int | float) and not isinstance(text, bool):
        example = f"{text:g}{units[0]}" if text >= 1 else example
    raise ValueError(
        f"must be a number with a unit, {meanings}; got {text!r}, write e.g. {example}"
    )


_DURATION = re.compile(
    r"(?P<value>\d+(\.\d*)?(e\+?\d+)?|\d*\.\d+(e-?\d+)?)(?P<unit>[a-z]+)", re.ASCII
)
_END_OF_TIME = 2**63  # Composer's timestamps are 64-bit integers
