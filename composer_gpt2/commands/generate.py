"""Command ``generate``: text from a trained model."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

__all__ = ["generate_command"]


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
    from composer_gpt2.generate import generate
    from composer_gpt2.trained_model import load_trained_model

    texts = generate(
        load_trained_model(checkpoint),
        prompt,
        max_new_tokens=max_new_tokens,
        n_samples=n_samples,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    print("\n---\n".join(texts))
