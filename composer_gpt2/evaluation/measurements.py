"""What an evaluation found, as a table, as JSON and as a plot over context lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Measurement", "format_table", "plot_contexts", "to_json"]


class Measurement(NamedTuple):
    """One number."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    """Examples of a task, or tokens of a text."""
    context_length: int
    stride: int | None
    """Of the windows over a text."""
    note: str = ""

    @property
    def log_name(self) -> str:
        """What it is called in the logs of a training run."""
        return f"metrics/{self.task}/{self.metric}"


def format_table(measurements: Sequence[Measurement]) -> str:
    """Lines for people."""
    rows = [("task", "metric", "value", "+-", "n", "context", "stride")]
    for each in measurements:
        rows.append(
            (
                each.task,
                each.metric,
                _number(each.value),
                "" if each.stderr is None else _number(each.stderr),
                f"{each.n:,}",
                f"{each.context_length:,}",
                "" if each.stride is None else f"{each.stride:,}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def to_json(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """As JSON has it; what is infinite or no number is ``None``."""
    return [
        {**each._asdict(), "value": each.value if math.isfinite(each.value) else None}
        for each in measurements
    ]


def plot_contexts(measurements: Sequence[Measurement], path: str | Path) -> None:
    """Perplexity over the context length, a line for each text, into an SVG file.

    Raises:
        ValueError: No perplexity of a text was measured.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for each in measurements:
        if each.metric == "perplexity" and each.stride is not None:
            lines.setdefault(each.task, []).append((each.context_length, each.value))
    if not lines:
        raise ValueError(
            "a plot must have the perplexity of at least one text, got none; add a text with "
            "--data NAME=PATH."
        )
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for name, points in lines.items():
        contexts, values = zip(*sorted(points), strict=True)
        axes.plot(contexts, values, marker="o", label=name)
    contexts = sorted({context for points in lines.values() for context, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("perplexity")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4f}"
