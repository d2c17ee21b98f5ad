"""Command ``evaluate``: what a trained model is worth, in numbers."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

__all__ = ["evaluate_command"]


def evaluate_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A run folder, a Composer checkpoint (file or s3://), a Hugging Face folder or a "
            "hub id."
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="Names, with commas: lambada, piqa, hellaswag, winogrande; wikitext, enwik8, "
            "text8; names of --data; tasks of the lm-evaluation-harness. Default: all of --data."
        ),
    ] = "",
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="NAME=PATH, several times: the file of a task or text, or a corpus of your own "
            "(prepared: a folder or s3://; jsonl, parquet, txt)."
        ),
    ] = None,
    contexts: Annotated[
        str,
        typer.Option(
            help="Context lengths at which texts are measured, with commas: 512,1024. Default: "
            "what the model was made for."
        ),
    ] = "",
    stride: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Tokens by which windows over a text move: smaller is slower and gives each token "
            "more context. Default: the context, without overlap."
        ),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Examples of each task."),
    ] = None,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens of each text."),
    ] = None,
    out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A file for the results as JSON."),
    ] = None,
    plot: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="An SVG file for the perplexity over the context length."),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32 or amp_bf16.")] = "fp32",
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens of a forward pass; 0: 512 on a CPU, 32,768 on a GPU.")
    ] = 0,
    harness: Annotated[
        bool, typer.Option("--harness", help="Have the lm-evaluation-harness ask our tasks, too.")
    ] = False,
    num_fewshot: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Solved examples before each question of the harness."),
    ] = None,
    include_path: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A folder with YAML files of further tasks for the harness."),
    ] = None,
) -> None:
    """Measure a trained model: perplexity of texts, accuracy on tasks."""
    import json
    from pathlib import Path

    if precision not in ("fp32", "amp_bf16"):
        raise ValueError(f"--precision must be fp32 or amp_bf16, got {precision!r}.")
    lengths = _numbers(contexts, "--contexts")
    for option, path in (("--out", out), ("--plot", plot)):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise FileNotFoundError(
                f"{option} must be a file in a folder that is there, got {path!r}."
            )
    paths = _pairs(data or [])
    names = [name.strip() for name in tasks.split(",") if name.strip()]

    from composer_gpt2._version import __version__
    from composer_gpt2.evaluation.evaluations import evaluate, find_evaluations
    from composer_gpt2.evaluation.harness import HarnessSettings
    from composer_gpt2.evaluation.measurements import format_table, plot_contexts, to_json

    evaluations = find_evaluations(
        names,
        paths,
        limit=limit,
        max_tokens=max_tokens,
        harness=HarnessSettings(include_path, num_fewshot),
        ours_by_harness=harness,
    )
    if plot is not None and not evaluations.texts:
        raise ValueError("--plot is of texts, got none; add one with --data NAME=PATH.")
    if (lengths or stride) and not evaluations.texts:
        raise ValueError("--contexts and --stride are of texts, got none; add --data NAME=PATH.")

    import torch

    from composer_gpt2.evaluation.likelihood import Scorer
    from composer_gpt2.memory import keep_freed_memory
    from composer_gpt2.trained_model import load_trained_model

    keep_freed_memory()
    model = load_trained_model(checkpoint)
    dtype = torch.bfloat16 if precision == "amp_bf16" else None
    scorer = Scorer(model, batch_tokens=batch_tokens, autocast_dtype=dtype)
    found = evaluate(scorer, evaluations, contexts=lengths, stride=stride)
    print(format_table(found))
    for note in dict.fromkeys(f"{each.task}: {each.note}" for each in found if each.note):
        print(note)
    if out is not None:
        report = {
            "model": checkpoint,
            "precision": precision,
            "limit": limit,
            "max_tokens": max_tokens,
            "versions": {"composer_gpt2": __version__, "torch": torch.__version__},
            "measurements": to_json(found),
        }
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
    if plot is not None:
        plot_contexts(found, plot)


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ValueError(f"{option} must be whole numbers above 0 with commas, got {text!r}.")
    return numbers


def _pairs(items: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (name and equals and path) or name in pairs:
            raise ValueError(f"--data must be NAME=PATH, each name once, got {item!r}.")
        pairs[name] = path
    return pairs
