"""Command ``demo``: a page in the browser."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

import typer

__all__ = ["demo_command"]


def demo_command(
    checkpoints: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer reads it)
        typer.Argument(
            metavar="CHECKPOINT [CHECKPOINT2]",
            help="One model, or two to compare: a run folder, a Composer checkpoint (file or "
            "s3://), a Hugging Face folder or a hub id.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Default: the first free one from 7860 on."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="127.0.0.1 is for this machine alone, 0.0.0.0 for everybody.")
    ] = "127.0.0.1",
    precision: Annotated[
        Literal["fp32", "amp_bf16"], typer.Option(help="amp_bf16: matrix products in bfloat16.")
    ] = "fp32",
    share: Annotated[
        bool, typer.Option("--share", help="Ask Gradio's servers for a public address.")
    ] = False,
) -> None:
    """Write with a trained model in the browser, or with two side by side."""
    if not checkpoints or len(checkpoints) > 2:
        raise ValueError(
            f"demo must have one trained model or two, got {len(checkpoints or [])}; give run "
            "folders (runs/NAME), checkpoints, Hugging Face folders or hub ids."
        )
    from composer_gpt2.demo.page import build_page, check_installed, launch, model_names

    check_installed()
    from composer_gpt2.generation import TextGenerator
    from composer_gpt2.trained_model import load_trained_model

    writers = {
        name: TextGenerator(load_trained_model(checkpoint), precision)
        for name, checkpoint in zip(model_names(checkpoints), checkpoints, strict=True)
    }
    launch(build_page(writers), host=host, port=port, share=share)
