"""Commands ``prepare`` and ``verify``: text into shards, and whether they are whole."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from composer_gpt2.commands.arguments import new_lines

__all__ = ["prepare_command", "verify_command"]


def prepare_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or globs: .jsonl (plain, .gz, .zst, .xz), .parquet, .txt, "
            "openwebtext.tar.xz; or hf://owner/dataset."
        ),
    ],
    out: Annotated[str, typer.Option(help="A folder or s3://bucket/prefix (gs, oci, azure).")],
    sequence_length: Annotated[int, typer.Option(help="Tokens a sample.")] = 1024,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    split_on: Annotated[
        Optional[str],  # noqa: UP045 (typer reads annotations at run time, on 3.10 too)
        typer.Option(
            help=r"Separates the documents of a .txt (\n: new line); without it a file is one."
        ),
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents, chosen by a hash of their text.")
    ] = 0.0005,
    compression: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the shards, such as zstd. Default: none."),
    ] = None,
    shard_size_limit: Annotated[str, typer.Option(help="Before compression.")] = "64mb",
    num_threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="That tokenize; default: as many as cores."),
    ] = None,
    on_error: Annotated[
        str, typer.Option(help="At a document that cannot be read: stop, or skip and count it.")
    ] = "stop",
    overwrite: Annotated[bool, typer.Option(help="Replace a corpus that is there.")] = False,
) -> None:
    """Tokenize a corpus into MDS shards for training and validation.

    Stopped in any way and started again, it goes on where it was.
    """
    from composer_gpt2.data.preparation import prepare, summarize

    corpus = prepare(
        sources,
        out,
        sequence_length=sequence_length,
        text_field=text_field,
        split_on=new_lines(split_on),
        validation_fraction=validation_fraction,
        compression=compression,
        shard_size_limit=shard_size_limit,
        num_threads=num_threads,
        on_error=on_error,
        overwrite=overwrite,
    )
    print(summarize(corpus))


def verify_command(
    url: Annotated[str, typer.Argument(help="A prepared corpus: a folder or s3://bucket/prefix.")],
) -> None:
    """Check hashes, counts and token ranges of a prepared corpus; name the bad shard."""
    from composer_gpt2.data.preparation import summarize
    from composer_gpt2.data.verification import verify

    print(summarize(verify(url)))
