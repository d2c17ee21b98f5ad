"""What several commands read alike from a shell."""

from __future__ import annotations

__all__ = ["new_lines"]


def new_lines(text: str | None) -> str | None:
    r"""``\n`` as a shell passes it on becomes a new line."""
    return text and text.replace(r"\n", "\n")
