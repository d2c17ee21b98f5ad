"""Command ``project``: small tasks to learn with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

__all__ = ["project_command"]


def project_command(
    name: Annotated[
        str, typer.Argument(help="adder, sorter, characters, text8, enwik8 or dialogue.")
    ],
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The text of characters, text8, enwik8; dialogues as JSON lines."),
    ] = None,
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="In place of the project's own."),
    ] = None,
    data_only: Annotated[bool, typer.Option(help="Write the data and do not train.")] = False,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Single settings of the recipe: key=value."),
    ] = None,
) -> None:
    """Train a small model on a task one can learn with, and test it."""
    from composer_gpt2.projects.program import run_project

    status = run_project(
        name,
        None if text is None else str(text),
        recipe_file=recipe,
        overrides=overrides or [],
        data_only=data_only,
    )
    sys.exit(status)
