"""A picture of what each step adds, from Hugging Face's GPT-2 to everything together."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from composer_gpt2.bench.report import ceiling_rates, tokens_per_second

__all__ = ["plot"]


def plot(results: dict[str, Any], path: Path) -> None:
    """Tokens a second, a bar for each step: what it adds, or takes; the ceiling is a line."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fixed"  # the same file from the same numbers
    from matplotlib import pyplot

    shown = [c for c in results["contestants"] if c["key"] not in ("hf_fp32",)]
    # Trainers of others are no step on our way.
    shown = [c for c in shown if c["kind"] not in ("composer", "hugging_face_trainer")]
    values = [tokens_per_second(results, c) for c in shown]
    medians = [statistics.median(v) for v in values]
    ceiling = statistics.median(ceiling_rates(results)) / results["flops_per_token"]

    height = 0.42 * len(shown) + 1.4
    figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
    for row, (contestant, median, rounds) in enumerate(zip(shown, medians, values, strict=True)):
        whole = row in (0, len(shown) - 1)
        before = 0.0 if whole else medians[row - 1]
        gained = "tab:green" if median >= before else "tab:red"
        color = "tab:blue" if whole else gained
        axes.barh(row, median - before, left=before, color=color)
        errors = [[median - min(rounds)], [max(rounds) - median]]
        axes.errorbar(median, row, xerr=errors, color="black", capsize=2, linewidth=0.8)
        axes.text(max(rounds), row, f" {median:,.0f}", va="center", fontsize=8)
        shown[row] = contestant["label"]
    label = f"ceiling: {ceiling:,.0f} (bf16 matrix products alone)"
    axes.axvline(ceiling, color="grey", linestyle=":", label=label)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set(
        xlabel="tokens a second; median, with the extremes of all rounds",
        title=f"{results['settings']['model']}, {results['settings']['batch_size']} x "
        f"{results['settings']['sequence_length']} tokens, "
        f"{results['settings']['threads']} threads",
        xlim=(0, 1.12 * max(ceiling, *(max(v) for v in values))),
    )
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
