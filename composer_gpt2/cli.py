"""The command line ``composer-gpt2``: thin layers over functions that Python can call as well."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    help="Tools around GPT-2 pretraining with MosaicML Composer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs a command; what the user can mend is one message without a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


# Heavy imports are inside the commands, so that `--help` answers at once.


@app.command("prepare")
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
        split_on=_new_lines(split_on),
        validation_fraction=validation_fraction,
        compression=compression,
        shard_size_limit=shard_size_limit,
        num_threads=num_threads,
        on_error=on_error,
        overwrite=overwrite,
    )
    print(summarize(corpus))


@app.command("verify")
def verify_command(
    url: Annotated[str, typer.Argument(help="A prepared corpus: a folder or s3://bucket/prefix.")],
) -> None:
    """Check hashes, counts and token ranges of a prepared corpus; name the bad shard."""
    from composer_gpt2.data.preparation import summarize
    from composer_gpt2.data.verification import verify

    print(summarize(verify(url)))


@app.command("generate")
def generate_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A run folder, a Composer checkpoint (file or s3://), a Hugging Face folder or a "
            "hub id."
        ),
    ],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What the text begins with.")] = "",
    max_new_tokens: Annotated[int, typer.Option("-m", "--max-new-tokens")] = 100,
    n_samples: Annotated[int, typer.Option("-n", "--n-samples", help="How many texts.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Draw among the likeliest only."),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Makes the samples repeatable."),
    ] = None,
) -> None:
    """Continue a prompt with a trained model."""
    import torch

    from composer_gpt2.generate import find_checkpoint, generate
    from composer_gpt2.model import GPT2Model

    model = GPT2Model.from_pretrained(find_checkpoint(checkpoint))
    texts = generate(
        model.cuda() if torch.cuda.is_available() else model,
        prompt,
        max_new_tokens=max_new_tokens,
        n_samples=n_samples,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    print("\n---\n".join(texts))


@app.command("quickstart")
def quickstart_command(
    recipe: Annotated[Path, typer.Option(help="What to train.")] = Path("yamls/quickstart.yaml"),
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
        split_on=_new_lines(split_on),
        validation_fraction=validation_fraction,
    )
    sys.exit(status)


def _new_lines(split_on: str | None) -> str | None:
    r"""``\n`` as a shell passes it on."""
    return split_on and split_on.replace(r"\n", "\n")
