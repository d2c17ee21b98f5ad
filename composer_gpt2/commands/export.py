"""Command ``export``: a trained model as a Hugging Face folder."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

import typer

__all__ = ["export_command"]


def export_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A run folder, a checkpoint (Composer's, here or at s3://; nanoGPT's; minGPT's), "
            "a Hugging Face folder or a hub id."
        ),
    ],
    out: Annotated[str, typer.Argument(help="The folder to write; new or empty.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the stored weights.")
    ] = "float32",
    weights: Annotated[
        Literal["evaluated", "trained"],
        typer.Option(help="Of a run with ema: its averages, or what the optimizer moved."),
    ] = "evaluated",
    heads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Attention heads of a file of minGPT's, which does not say them."),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Add model.onnx; for a plain GPT-2 in float32.")
    ] = False,
    push_to_hub: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="OWNER/NAME", help="Upload the folder to the Hugging Face hub too."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="For everybody to see; private otherwise.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export that is there.")
    ] = False,
) -> None:
    """Write a trained model as a Hugging Face folder that needs nothing of this package."""
    from composer_gpt2.export import export_model
    from composer_gpt2.export.hub import Hub

    if public and push_to_hub is None:
        raise ValueError("--public is about --push-to-hub, got no such option; add one.")
    hub = None if push_to_hub is None else Hub(push_to_hub, private=not public)
    exported = export_model(
        checkpoint,
        out,
        dtype=dtype,
        weights=weights,
        n_head=heads,
        onnx=onnx,
        overwrite=overwrite,
    )
    kind = "a plain GPT2LMHeadModel"
    if exported.changes:
        kind = f"code for {', '.join(exported.changes)} (load it with trust_remote_code=True)"
    print(f"{exported.folder}: {kind}, {exported.n_parameters:,} parameters in {dtype}")
    print(f"weights: {exported.weights}")
    print(f"largest difference of logits: {exported.difference:.3g}")
    if dtype != "float32":
        print(f"rounding to {dtype} moved logits by at most {exported.rounding:.3g}")
    if exported.onnx_difference is not None:
        print(f"largest difference of logits of model.onnx: {exported.onnx_difference:.3g}")
    if hub is not None:
        print(f"uploaded to {hub.upload(exported.folder)}")
