"""Command ``generate``: text from a trained model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from composer_gpt2.commands.arguments import new_lines

if TYPE_CHECKING:
    from composer_gpt2.generation import Piece

__all__ = ["generate_command"]

_BETWEEN = "\n---\n"


def generate_command(
    checkpoint: Annotated[
        Optional[str],  # noqa: UP045 (typer reads it)
        typer.Argument(
            help="A run folder, a Composer checkpoint (file or s3://), a Hugging Face folder or a "
            "hub id. Needed: an untrained model writes noise.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "-p",
            "--prompt",
            help="What the text begins with; '-' reads it from standard input. May be repeated. "
            "Without any, a new document.",
        ),
    ] = None,
    prompt_file: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="A text file is a prompt; a .jsonl file has one in each line (a string, or an "
            'object with "prompt"). May be repeated.'
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("-m", "--max-new-tokens", help="Tokens of a text at most.")
    ] = 100,
    n_samples: Annotated[
        int, typer.Option("-n", "--n-samples", help="How many texts for each prompt.")
    ] = 1,
    temperature: Annotated[
        float, typer.Option(help="Logits are divided by it; 0 takes the likeliest token.")
    ] = 1.0,
    top_k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Draw among this many of the likeliest tokens."),
    ] = None,
    top_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Draw among the likeliest tokens that together have this probability."),
    ] = None,
    typical_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Draw among tokens about as surprising as expected, with this probability."
        ),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Makes the texts repeatable."),
    ] = None,
    stop: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help=r"End a text before this string (\n is a line break). May be repeated."),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is written.")] = False,
    batch_size: Annotated[int, typer.Option(help="Texts written at the same time.")] = 32,
    precision: Annotated[
        Literal["fp32", "amp_bf16"], typer.Option(help="amp_bf16: matrix products in bfloat16.")
    ] = "fp32",
) -> None:
    """Continue a prompt with a trained model."""
    if checkpoint is None:
        raise ValueError(
            "generate must have a trained model, got no CHECKPOINT; give a run folder "
            "(runs/NAME), a checkpoint, a Hugging Face folder or a hub id: composer-gpt2 generate "
            "CHECKPOINT -p 'Hello'. `make train` trains one."
        )
    from composer_gpt2.generation import Sampling, TextGenerator
    from composer_gpt2.generation.prompts import read_prompts
    from composer_gpt2.trained_model import load_trained_model

    sampling = Sampling(temperature, top_k, top_p, typical_p)
    prompts = read_prompts(prompt or [], prompt_file or [])
    generator = TextGenerator(load_trained_model(checkpoint), precision)
    settings = {
        "n_samples": n_samples,
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "seed": seed,
        "stop": [new_lines(string) or "" for string in stop or []],
        "batch_size": batch_size,
    }
    began = time.perf_counter()
    if stream:
        n_tokens = _print_in_order(prompts, n_samples, generator.stream(prompts, **settings))
    else:
        samples = generator.generate(prompts, progress=sys.stderr.isatty(), **settings)
        print(_BETWEEN.join(sample.prompt + sample.text for sample in samples))
        n_tokens = sum(len(sample.tokens) for sample in samples)
    seconds = time.perf_counter() - began
    print(
        f"{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} tokens/s",
        file=sys.stderr,
    )


def _print_in_order(prompts: list[str], n_samples: int, pieces: Iterable[Piece]) -> int:
    """The first text as it comes; the others, written meanwhile, one after another behind it."""
    waiting = [[prompt] for prompt in prompts for _ in range(n_samples)]
    ended = [False] * len(waiting)
    current, n_tokens = 0, 0
    for piece in pieces:
        number = piece.prompt * n_samples + piece.sample
        waiting[number].append(piece.text)
        ended[number] = piece.ending is not None
        n_tokens += len(piece.tokens)
        while current < len(waiting):
            print("".join(waiting[current]), end="", flush=True)
            waiting[current].clear()
            if not ended[current]:
                break
            current += 1
            print(_BETWEEN if current < len(waiting) else "\n", end="", flush=True)
    return n_tokens
