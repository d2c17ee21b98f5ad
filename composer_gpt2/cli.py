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


@app.command("train")
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


@app.command("doctor")
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


@app.command("bench")
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


def _new_lines(split_on: str | None) -> str | None:
    r"""``\n`` as a shell passes it on."""
    return split_on and split_on.replace(r"\n", "\n")
