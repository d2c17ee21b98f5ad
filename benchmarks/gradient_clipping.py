"""What clipping inside the fused optimizer would save, against Composer's gradient clipping.

Composer computes the norm of all gradients and multiplies them, by one if nothing is clipped.
torch's fused AdamW can divide each gradient by ``optimizer.grad_scale`` as it reads it, but then it
also writes it back. So the divisor is handed over only where clipping bites, which a CPU knows
without waiting. Multiplying only where clipping bites needs no such kernel; a step without clipping
shows what there is to save at all.

All contestants take turns in one process, on the same parameters, gradients and optimizer; the
gradients are put back before each measurement.

    python benchmarks/gradient_clipping.py --hardware 2cpu
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from composer.algorithms.gradient_clipping import apply_gradient_clipping
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from composer_gpt2.memory import keep_freed_memory
from composer_gpt2.model import GPT2Model
from composer_gpt2.run_folder import versions

DISCARDED = 2  # rounds
THRESHOLDS = {"bites": 0.5, "does not bite": 2.0}  # in norms of the gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2-125m")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--hardware", required=True)
    arguments = parser.parse_args()

    keep_freed_memory()  # as in our trainer
    torch.manual_seed(17)
    model = GPT2Model.from_name(arguments.model, tokenizer_name=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]
    norm = get_total_norm(gradients).item()

    results: dict[tuple[str, str], list[float]] = {}
    names = list(CONTESTANTS)
    for number in range(-DISCARDED, arguments.rounds):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for case, factor in THRESHOLDS.items():
            for name in order:
                clip = CONTESTANTS[name]
                seconds = measure(model, optimizer, gradients, clip, factor * norm)
                if number >= 0:
                    results.setdefault((case, name), []).append(1000 * seconds)
        print(f"round {number + 1} of {arguments.rounds}", flush=True)
    path = Path(__file__).with_name(
        f"gradient_clipping_{arguments.hardware}_{date.today():%Y%m}.md"
    )
    path.write_text(report(arguments, model, results), encoding="utf-8")
    print(path)


Clip = Callable[[GPT2Model, torch.optim.Optimizer, float], None]


def measure(
    model: GPT2Model,
    optimizer: torch.optim.Optimizer,
    gradients: list[torch.Tensor],
    clip: Clip,
    threshold: float,
) -> float:
    """Seconds of clipping and one step."""
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient.clone()
        else:
            parameter.grad.copy_(gradient)
    start = time.perf_counter()
    clip(model, optimizer, threshold)
    optimizer.step()
    optimizer.grad_scale = None  # type: ignore[reportAttributeAccessIssue]
    return time.perf_counter() - start


def composers(model: GPT2Model, optimizer: torch.optim.Optimizer, threshold: float) -> None:
    apply_gradient_clipping(model, "norm", threshold, fsdp_enabled=False)


def by_divisor(model: GPT2Model, optimizer: torch.optim.Optimizer, threshold: float) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    divisor = ((get_total_norm(gradients) + 1e-6) / threshold).clamp(min=1.0)
    if divisor != 1:
        optimizer.grad_scale = divisor  # type: ignore[reportAttributeAccessIssue]


def where_it_bites(model: GPT2Model, optimizer: torch.optim.Optimizer, threshold: float) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = get_total_norm(gradients)
    if not norm + 1e-6 <= threshold:
        clip_grads_with_norm_(model.parameters(), threshold, norm)


def not_at_all(model: GPT2Model, optimizer: torch.optim.Optimizer, threshold: float) -> None:
    pass


CONTESTANTS: dict[str, Clip] = {
    "Composer's": composers,
    "divisor": by_divisor,
    "multiplied where it bites": where_it_bites,
    "no clipping": not_at_all,
}


def report(
    arguments: argparse.Namespace, model: GPT2Model, results: dict[tuple[str, str], list[float]]
) -> str:
    ratios = {
        key: [a / b for a, b in zip(times, results[key[0], "Composer's"], strict=True)]
        for key, times in results.items()
    }
    found = versions()
    count = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"# Gradient clipping inside the optimizer: {arguments.hardware}",
        "",
        f"Clipping and step of {arguments.model}, {count:,} parameters in float32, by a divisor in "
        "the fused kernel, take",
        *(
            f"**{statistics.median(ratios[case, 'divisor']):.2f}** of the time of Composer's "
            f"gradient clipping and step where clipping {case}{end}"
            for case, end in zip(THRESHOLDS, (", and", "."), strict=True)
        ),
        "",
        f"- Command: `python benchmarks/gradient_clipping.py --model {arguments.model} "
        f"--rounds {arguments.rounds} --hardware {arguments.hardware}`",
        f"- {date.today()}, commit {found['commit']}, torch {found['torch']}, "
        f"Python {found['python']}, {torch.get_num_threads()} threads",
        f"- AdamW (fused); {arguments.rounds} rounds in one process after {DISCARDED} that are "
        "discarded; in each, one step of each contestant, in turning order",
        "- Medians of the rounds, with the quartiles; ratios are those of a round",
        "",
        "| clipping | how | clip and step, ms | against Composer's |",
        "|---|---|---|---|",
    ]
    for (case, name), times in results.items():
        lines.append(
            f"| {case} | {name} | {spread(times, '.0f')} | {spread(ratios[case, name], '.2f')} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: list[float], form: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
