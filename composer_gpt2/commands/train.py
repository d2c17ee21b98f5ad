"""Commands ``train`` and ``quickstart``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from composer_gpt2.commands.arguments import new_lines

__all__ = ["quickstart_command", "train_command"]


def train_command(
    file: Annotated[
        list[str],
        typer.Option("-f", "--file", help="A recipe; may be given several times, later ones win."),
    ],
    n_ranks: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("-n", "--n-ranks", help="Default: one for each GPU, without any just one."),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(help="How often a failed run may be started again.")
    ] = 0,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Single settings of the recipe: key=value."),
    ] = None,
) -> None:
    """Train on this machine, and start again from the last checkpoint when a rank fails."""
    from composer_gpt2.restarts import train_with_restarts

    sys.exit(train_with_restarts(file, overrides or [], n_ranks=n_ranks, max_restarts=max_restarts))


def quickstart_command(
    recipe: Annotated[Path, typer.Option(help="What to train.")] = Path("quickstart.yaml"),
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="A corpus to prepare, or a prepared one (folder or address). Default: the "
            "documentation inside Python and installed packages."
        ),
    ] = None,
    split_on: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help=r"As for prepare: \n\n makes each paragraph of a .txt a document."),
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents to evaluate on.")
    ] = 0.03,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Single settings of the recipe: key=value."),
    ] = None,
) -> None:
    """Train on text at hand, streamed from a local S3 server, and show what came of it."""
    from composer_gpt2.quickstart import quickstart

    status = quickstart(
        str(recipe),
        data,
        overrides or [],
        split_on=new_lines(split_on),
        validation_fraction=validation_fraction,
    )
    sys.exit(status)
