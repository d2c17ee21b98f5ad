"""Command ``bench``: how fast a training step is here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

__all__ = ["bench_command"]


def bench_command(
    file: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("-f", "--file", help="Our recipe; may be given several times."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Default: the recipe's; gpt2-tiny with --loss-steps."),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Sequences of a step. Default: 4; 8 with --loss-steps."),
    ] = None,
    sequence_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens of a sequence. Default: 1024; 128 with --loss-steps."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Steps of each contestant that count.")] = 5,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Of each process; default: as many as cores."),
    ] = None,
    steps: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Lines of the waterfall: 'name,name;name' adds two algorithms, then one; what a "
            "new one cannot stand beside is dropped. Default: the recipe's, one by one."
        ),
    ] = None,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A text to take tokens from. Default: random ones."),
    ] = None,
    peers: Annotated[bool, typer.Option(help="Hugging Face and stock Composer as well.")] = True,
    peer_adamw: Annotated[
        str, typer.Option(help="fused, as ours, or default: torch's own choice.")
    ] = "fused",
    memory: Annotated[bool, typer.Option(help="Peak memory and time to the first step.")] = True,
    overhead: Annotated[bool, typer.Option(help="What Composer's loop costs a step.")] = True,
    loss_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Compare losses over this many steps instead of speed."),
    ] = None,
    hardware: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="In the names of files; default: such as 2cpu."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the report. Default: benchmarks, if there is one."),
    ] = None,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Single settings of the recipe: key=value."),
    ] = None,
) -> None:
    """Measure a training step on this CPU: Hugging Face, Composer, ours, and the ceiling."""
    from composer_gpt2.bench.settings import RECIPE, read_settings

    losses = loss_steps is not None
    settings = read_settings(
        file or [RECIPE],
        overrides or [],
        model=model or ("gpt2-tiny" if losses else None),
        batch_size=batch_size if batch_size is not None else 8 if losses else 4,
        sequence_length=sequence_length if sequence_length is not None else 128 if losses else 1024,
        rounds=rounds,
        threads=threads,
        steps=steps,
        data=data,
        peers=peers,
        peer_adamw=peer_adamw,
    )
    if loss_steps is not None:
        from composer_gpt2.bench.loss_overlay import run_loss_overlay

        print(run_loss_overlay(settings, loss_steps, hardware=hardware, out=out))
        return
    from composer_gpt2.bench.program import run_bench

    print(run_bench(settings, memory=memory, overhead=overhead, hardware=hardware, out=out))
