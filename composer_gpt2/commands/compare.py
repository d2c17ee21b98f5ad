"""Command ``compare``: several models on the same tokens."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

__all__ = ["compare_command"]


def compare_command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two or more: run folders, checkpoints (also nanoGPT's), Hugging Face folders, "
            "hub ids."
        ),
    ],
    data: Annotated[str, typer.Option(help="A prepared corpus: a folder or s3://...")],
    split: Annotated[str, typer.Option(help="Its split.")] = "validation",
    max_sequences: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="From its beginning. Default: all."),
    ] = None,
    batch_tokens: Annotated[
        int,
        typer.Option(help="Tokens of a forward pass. Default: 512 on a CPU, 32,768 on a GPU."),
    ] = 0,
) -> None:
    """Measure several models on the same validation tokens, side by side."""
    from composer_gpt2.memory import keep_freed_memory
    from composer_gpt2.side_by_side import compare, format_comparison

    keep_freed_memory()
    compared = compare(
        models, data, split=split, max_sequences=max_sequences, batch_tokens=batch_tokens
    )
    print(format_comparison(compared))
