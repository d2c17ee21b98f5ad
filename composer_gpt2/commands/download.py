"""Command ``download``: a published checkpoint or model."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

__all__ = ["download_command"]


def download_command(
    name: Annotated[
        str,
        typer.Argument(
            help="An address (https://, s3://, ...) of a file, of a checkpoint's manifest (.json) "
            "or of a folder with manifests; a hub id (owner/name); or gpt2, gpt2-medium, "
            "gpt2-large, gpt2-xl."
        ),
    ],
    out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="The folder to be. Default: the last word of NAME, here."),
    ] = None,
    sha256: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What one file must have; a manifest and the hub say it themselves."),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="Of a checkpoint, without the optimizer's state."),
    ] = False,
) -> None:
    """Download a published checkpoint; go on where an earlier attempt was interrupted."""
    from composer_gpt2.published import download_published

    downloaded = download_published(name, out, sha256=sha256, weights_only=weights_only)
    print(f"{downloaded.use_as}: {downloaded.n_checked} files with the published SHA-256")
    if downloaded.unchecked:
        print(f"without a published SHA-256: {', '.join(downloaded.unchecked)}")
