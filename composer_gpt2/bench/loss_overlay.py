"""The same training in fp32, under plain autocast, and with everything that is fast.

A faster way to compute must not move the loss: its distance from fp32 may be what autocast's is,
and no more.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from composer_gpt2.bench.contestants import (
    PlainLoop,
    SharedNetwork,
    hugging_face_loop,
    network_config,
    our_loop,
)
from composer_gpt2.bench.program import default_folder, machine
from composer_gpt2.bench.report import command
from composer_gpt2.bench.settings import Settings
from composer_gpt2.bench.tokens import text_batches
from composer_gpt2.run_folder import versions

__all__ = ["distances", "run_loss_overlay"]

WARMUP_SHARE = 0.1
LABELS = {
    "hf_fp32": "Hugging Face, fp32",
    "hf_bf16": "Hugging Face, bf16 autocast",
    "ours": "ours, all algorithms, bf16",
}


def run_loss_overlay(
    settings: Settings,
    n_steps: int = 200,
    *,
    hardware: str | None = None,
    out: str | Path | None = None,
) -> Path:
    """Trains three times and writes ``loss_overlay_<model>_<hardware>_<yyyymm>`` as for a bench.

    All begin with the same weights and see the same batches of real text: ``settings.data``, or
    the documentation inside Python. The learning rate is the recipe's, after a linear warm-up over
    a tenth of the steps. Algorithms that make another network (ALiBi) are left out.

    Args:
        settings: From :func:`composer_gpt2.bench.settings.read_settings`.
        n_steps: How long.
        hardware: As for a bench.
        out: As for a bench.

    Returns:
        The Markdown file.

    Raises:
        ValueError: The text is too short, or there are no steps.
    """
    if n_steps < 2:
        raise ValueError(f"loss_steps must be at least 2, got {n_steps}.")
    torch.set_num_threads(settings.threads)
    shape = (n_steps, settings.batch_size, settings.sequence_length)
    if settings.data is None:
        from composer_gpt2.documentation import read_documentation

        batches = text_batches(read_documentation(), *shape)
    else:
        batches = text_batches(settings.data, *shape)
    algorithms, left_out = _same_network(settings)
    network = SharedNetwork(network_config(settings))
    losses: dict[str, list[float]] = {}
    with tqdm(total=3 * n_steps, desc="loss overlay", unit=" steps", disable=None) as bar:
        for key in LABELS:
            bar.set_postfix_str(LABELS[key])
            module = network.separate_module()
            if key == "ours":
                loop = our_loop(settings, module, algorithms)
            else:
                loop = hugging_face_loop(settings, module, autocast=key == "hf_bf16")
            losses[key] = _train(loop, batches, _peak_learning_rate(settings), bar)
    results = {
        "date": f"{datetime.date.today()}",
        "versions": versions(),
        "machine": machine(),
        "settings": dataclasses.asdict(settings),
        "n_steps": n_steps,
        "learning_rate": _peak_learning_rate(settings),
        "tokens_sha256": hashlib.sha256(batches.numpy().tobytes()).hexdigest(),
        "algorithms": {name: dict(arguments) for name, arguments in algorithms.items()},
        "left_out": left_out,
        "losses": losses,
        "distances": {key: distances(losses[key], losses["hf_fp32"]) for key in list(LABELS)[1:]},
    }
    folder = default_folder() if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"loss_overlay_{settings.model}_{hardware or f'{settings.threads}cpu'}"
    path = folder / f"{name}_{datetime.date.today():%Y%m}.md"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _plot(results, path.with_suffix(".svg"))
    path.write_text(_report(results, path.with_suffix(".svg").name), encoding="utf-8")
    return path


def distances(losses: list[float], reference: list[float]) -> dict[str, float]:
    """Mean and largest absolute difference, step by step."""
    each = [abs(a - b) for a, b in zip(losses, reference, strict=True)]
    return {"mean": statistics.fmean(each), "max": max(each)}


def _train(loop: PlainLoop, batches: Tensor, peak: float, bar: tqdm) -> list[float]:
    losses = []
    warmup = max(1, math.ceil(WARMUP_SHARE * len(batches)))
    for number, tokens in enumerate(batches, 1):
        for group in loop.optimizer.param_groups:
            group["lr"] = peak * min(1.0, number / warmup)
        losses.append(loop.step({"input_ids": tokens, "labels": tokens}))
        bar.update()
    return losses


def _same_network(settings: Settings) -> tuple[dict[str, Any], dict[str, str]]:
    """The algorithms of the last line that leave the function of the network as it is."""
    from composer_gpt2 import registry

    kept, left_out = {}, {}
    for name, arguments in (settings.lines[-1].algorithms if settings.lines else {}).items():
        other = getattr(registry.get("algorithms", name).load(), "architectural", False)
        if other and name != "pad_vocabulary":  # whose new logits are never read
            left_out[name] = "makes another network"
        else:
            kept[name] = dict(arguments)
    return kept, left_out


def _peak_learning_rate(settings: Settings) -> float:
    ((_, arguments),) = settings.recipe["optimizer"].items()
    return float(arguments["lr"])


def _plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fixed"
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, sharex=True, figsize=(7, 5), layout="constrained", height_ratios=(2, 1)
    )
    steps = range(1, results["n_steps"] + 1)
    reference = results["losses"]["hf_fp32"]
    for (key, label), style in zip(LABELS.items(), ("-", "--", ":"), strict=True):
        losses = results["losses"][key]
        (line,) = above.plot(steps, losses, style, label=label)
        if key != "hf_fp32":
            each = [abs(a - b) for a, b in zip(losses, reference, strict=True)]
            below.plot(steps, each, color=line.get_color(), linewidth=1, label=label)
    above.set(ylabel="training loss, nats a token")
    below.set(xlabel="step", ylabel="|difference to fp32|", yscale="log")
    above.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _report(results: dict[str, Any], picture: str) -> str:
    settings, found = results["settings"], results["versions"]
    n_steps = results["n_steps"]
    packages = ", ".join(f"{k} {v}" for k, v in found.items() if k != "commit")
    source = settings["data"] or "documentation inside Python and installed packages"
    rows = "\n".join(
        f"| {LABELS[key]} | {d['mean']:.2e} | {d['max']:.2e} | {results['losses'][key][-1]:.5f} |"
        for key, d in results["distances"].items()
    )
    ratio = results["distances"]["ours"]["mean"] / max(
        results["distances"]["hf_bf16"]["mean"], 1e-12
    )
    left_out = "".join(f" Left out: {n} ({why})." for n, why in results["left_out"].items())
    algorithms = ", ".join(results["algorithms"]) or "none"
    raw = "\n".join(
        f"- {LABELS[key]}: {', '.join(f'{value:.5f}' for value in losses)}"
        for key, losses in results["losses"].items()
    )
    return f"""# The loss of {settings["model"]}, fast and plain: {n_steps} steps, {results["date"]}

The mean distance of ours from fp32 is **{ratio:.2f} x** that of plain bf16 autocast.

| | mean distance to fp32 | largest | last loss |
|---|---|---|---|
{rows}

fp32 ends at {results["losses"]["hf_fp32"][-1]:.5f}. Losses are those of training batches, in nats a
token, before the step on each; distances are absolute.

![losses and their distances]({picture})

- `{command(settings, "--loss-steps", str(n_steps))}`
- commit {found["commit"]}; {packages}; {settings["threads"]} threads,
  {results["machine"].get("cpu", results["machine"]["architecture"])}
- The same initial weights (seed 17), batches of {settings["batch_size"]} x
  {settings["sequence_length"]} tokens of {source} (sha256 of the tokens
  {results["tokens_sha256"][:16]}), learning rate {results["learning_rate"]:g} after a linear
  warm-up over {WARMUP_SHARE:.0%} of the steps, no dropout. One observation.
- Ours: {algorithms}.{left_out}

Raw losses:

{raw}
"""
