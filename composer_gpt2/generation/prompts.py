"""Prompts as a command line gives them: words, files, standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["read_prompts"]


def read_prompts(prompts: Sequence[str], files: Sequence[str]) -> list[str]:
    """All prompts: those given, then those of the files; a new document if there are none.

    Args:
        prompts: Texts; ``-`` is standard input, as a whole, without a last line break.
        files: A text file is a prompt, without a last line break; a ``.jsonl`` file has one in each
            line, a string or an object with ``prompt``.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is not UTF-8, or a line of it is no prompt.
    """
    if prompts.count("-") > 1:
        raise ValueError("standard input must be one prompt, got -p - twice; give it once.")
    found = [_without_line_break(sys.stdin.read()) if text == "-" else text for text in prompts]
    for file in files:
        text = Path(file).read_bytes().decode("utf-8")
        found += _of_lines(file, text) if file.endswith(".jsonl") else [_without_line_break(text)]
    if not found and files:
        raise ValueError(f"{', '.join(files)} must hold at least one prompt, got none.")
    return found or [""]


def _without_line_break(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def _of_lines(file: str, text: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 may stand in a string
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number} must be JSON, got {error}.") from error
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise ValueError(
                f'{file}:{number} must be a string or {{"prompt": "..."}}, got {line[:60]!r}.'
            )
        prompts.append(prompt)
    return prompts
