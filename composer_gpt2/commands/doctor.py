"""Command ``doctor``: what is wrong with this machine or a run."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

__all__ = ["doctor_command"]


def doctor_command(
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[RUN_FOLDER] [KEY=VALUE]...",
            help="A run that was started; single settings on top of its recipe.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("-f", "--file", help="A recipe; may be given several times, later ones win."),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare every shard with its hash.")] = False,
) -> None:
    """Look at this machine and a run: what is wrong, and what to do. Changes nothing."""
    from composer_gpt2.doctor import doctor

    folders = [argument for argument in arguments or [] if "=" not in argument]
    overrides = [argument for argument in arguments or [] if "=" in argument]
    if len(folders) > 1:
        raise ValueError(f"doctor takes one run folder at most, got {', '.join(folders)}.")
    has_problem = False
    for finding in doctor(next(iter(folders), None), file or [], overrides, verify=verify):
        print(finding, flush=True)
        has_problem |= finding.status == "PROBLEM"
    sys.exit(has_problem)
