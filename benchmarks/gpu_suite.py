"""Everything that we can measure of training on one GPU, in eight minutes and one table.

    python benchmarks/gpu_suite.py --out results

The ceiling is the speed of bfloat16 matrix products at the model's own shapes, forward and
backward. Contestants train on random tokens in a plain loop, under bfloat16 autocast, without
dropout and clipping: Hugging Face's network as it is, compiled, and tuned by configuration alone;
then ours, one algorithm after the other. Each stands beside a reference that stays in memory, and
rounds of the two alternate. FLOPs are 6 N + 12 L d T a token, N the parameters of all matrices
(12 L d^2 + V d, V without padding), attention counted in full.

What fails (no Liger, no Composer, no memory, no time) is a line of the table with the reason, and
the rest goes on. With ``--device cpu --model gpt-nano --seconds 20`` the same program runs without
a GPU; the speeds mean nothing then.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gpu_contestants import PADDED, Build, chunked_loss, contestants

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a bare machine has not installed us

VOCABULARY = 50257
WARMUP_STEPS, STEPS = 3, 5
GPU_TESTS = "python -m pytest -m gpu tests"

# Micro-batches in sequences of 1,024 tokens, for at least this many GiB of memory.
MICROBATCHES = {"gpt2-125m": {120: 32, 70: 32, 35: 16, 0: 4}, "gpt2-350m": {120: 16, 70: 16, 0: 4}}


Step = Callable[[], torch.Tensor]


class OutOfTime(BaseException):
    """No ``Exception``, so that compilers do not take it for one of theirs."""


@dataclass
class Row:
    """A line of the table."""

    model: str
    contestant: str
    tokens_per_second: float | None = None
    against_reference: float | None = None
    share_of_ceiling: float | None = None
    peak_gib: float | None = None
    seconds_to_first_step: float | None = None
    loss: float | None = None
    error: str = ""
    rounds: list[float] = field(default_factory=list)


@dataclass
class Suite:
    """What all parts share."""

    device: torch.device
    backend: str
    sequence_length: int
    rounds: int
    out: Path
    microbatch: int | None = None
    chosen: list[str] | None = None
    deadline: float = 0.0  # set after imports
    ceilings: dict[str, float] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", action="append", help="default: gpt2-125m and gpt2-350m")
    parser.add_argument("--contestant", action="append", help="by its name; default: all")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--microbatch", type=int, help="sequences; default: by model and memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=430, help="after imports")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU, found none; try --device cpu")
    models = arguments.model or ["gpt2-125m", "gpt2-350m"]
    suite = Suite(
        torch.device(arguments.device),
        arguments.backend,
        arguments.sequence_length,
        arguments.rounds,
        arguments.out,
        arguments.microbatch,
        arguments.contestant,
    )
    known = contestants(suite.device, suite.backend)
    unknown = sorted(set(suite.chosen or ()) - known.keys())
    if unknown:
        got = "; ".join(unknown)
        parser.error(f"--contestant must be one of: {'; '.join(known)}; got {got}")
    # In nobody's time, and an import that is interrupted cannot be repeated. What is missing is the
    # error of those that need it.
    for package in ("torch._dynamo", "transformers.models.gpt2.modeling_gpt2", "composer"):
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    suite.deadline = time.monotonic() + arguments.seconds
    signal.signal(signal.SIGALRM, _raise_out_of_time)
    for number, model in enumerate(models):
        # The models that are still to come get equal parts of the time that is left.
        end = time.monotonic() + suite.left() / (len(models) - number)
        run_model(suite, model, end)
    write(suite)
    print(markdown(suite))
    print(f"\nThe tests that need a GPU: {GPU_TESTS}")


def run_model(suite: Suite, model: str, end: float) -> None:
    """The ceiling, the reference, and all contestants of a model, as far as time allows."""

    def find_ceiling() -> None:
        suite.ceilings[model] = measure_ceiling(suite, model)

    ceiling = Row(model, "ceiling")
    attempt(suite, ceiling, min(30.0, end - time.monotonic()), find_ceiling)
    if ceiling.error:
        suite.rows.append(ceiling)
    reference: list[Step] = []  # the first contestant that runs
    for name, build in contestants(suite.device, suite.backend).items():
        if suite.chosen is not None and name not in suite.chosen:
            continue
        row = Row(model, name)

        def run(row: Row = row, build: Build = build) -> None:
            step = measure(suite, row, build, *reference)
            if not reference:
                reference.append(step)
                suite.references[model] = row.contestant

        # A compilation may take long, but not so long that all after it are left out.
        attempt(suite, row, min(90.0, end - time.monotonic()), run)
        suite.rows.append(row)
        print(line(row), flush=True)
        write(suite)


def attempt(suite: Suite, row: Row, seconds: float, part: Callable[[], None]) -> None:
    """Runs a part within its time; whatever ends it early is written into its row."""
    try:
        if seconds < 1:
            raise OutOfTime("no time was left")
        signal.setitimer(signal.ITIMER_REAL, seconds)
        part()
    except (Exception, OutOfTime) as error:
        row.error = f"{type(error).__name__}: {(str(error).strip() or 'stopped').splitlines()[0]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    gc.collect()
    if row.error:
        torch._dynamo.reset()  # a compilation that was interrupted must not spoil the next
    if suite.device.type == "cuda":
        torch.cuda.empty_cache()


def _raise_out_of_time(*_: Any) -> None:
    raise OutOfTime("its part of the time was used up")


# --- The ceiling ---------------------------------------------------------------------------------


def measure_ceiling(suite: Suite, model: str) -> float:
    """FLOP/s of the products of a step, each as often as it occurs, in bfloat16."""
    config = configuration(model, suite.sequence_length)
    d, n_tokens = config.n_embd, microbatch(suite, model) * suite.sequence_length
    weights = {  # (inputs, outputs): how often
        (d, 3 * d): config.n_layer,
        (d, d): config.n_layer,
        (d, 4 * d): config.n_layer,
        (4 * d, d): config.n_layer,
        (d, PADDED): 1,
    }
    flops = seconds = 0.0
    for (n_in, n_out), count in weights.items():
        x, w, y = (
            torch.randn(*shape, device=suite.device, dtype=torch.bfloat16)
            for shape in ((n_tokens, n_in), (n_in, n_out), (n_tokens, n_out))
        )

        def products(x: torch.Tensor = x, w: torch.Tensor = w, y: torch.Tensor = y) -> None:
            torch.mm(x, w)  # forward
            torch.mm(y, w.T)  # the gradient of the inputs
            torch.mm(x.T, y)  # the gradient of the weight

        n_flops = 6 * n_tokens * n_in * n_out
        once = min(timed(suite, products, 10 if suite.device.type == "cuda" else 1))
        shape = {"model": model, "tokens": n_tokens, "inputs": n_in, "outputs": n_out}
        suite.shapes.append({**shape, "flop_per_second": n_flops / once})
        flops, seconds = flops + count * n_flops, seconds + count * once
    return flops / seconds


def timed(suite: Suite, function: Callable[[], Any], n: int, rounds: int = 3) -> list[float]:
    """Seconds of a call, in rounds of ``n``, after one round that does not count."""
    results = []
    for _ in range(rounds + 1):
        synchronize(suite)
        start = time.perf_counter()
        for _ in range(n):
            function()
        synchronize(suite)
        results.append((time.perf_counter() - start) / n)
    return results[1:]


def synchronize(suite: Suite) -> None:
    if suite.device.type == "cuda":
        torch.cuda.synchronize()


# --- Measuring -----------------------------------------------------------------------------------


def step_of(suite: Suite, model: str, build: Build) -> Step:
    """A training step of a contestant on tokens of its own; returns the loss."""
    torch.manual_seed(17)
    network, optimizer = build(configuration(model, suite.sequence_length))
    network.train()
    shape = (microbatch(suite, model), suite.sequence_length)
    tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(17))
    tokens = tokens.to(suite.device)
    without_liger = getattr(network, "without_liger", False)

    def step() -> torch.Tensor:
        with torch.autocast(suite.device.type, torch.bfloat16), chunked_loss(without_liger):
            loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(suite: Suite, row: Row, build: Build, reference: Step | None = None) -> Step:
    """Fills a row: rounds of the contestant, each beside one of the reference."""
    n_tokens = microbatch(suite, row.model) * suite.sequence_length
    on_gpu = suite.device.type == "cuda"
    held = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step = step_of(suite, row.model, build)
    start = time.perf_counter()
    row.loss = float(step())
    synchronize(suite)
    row.seconds_to_first_step = time.perf_counter() - start
    n_warmup, n_steps = (WARMUP_STEPS, STEPS) if on_gpu else (1, 1)
    for _ in range(n_warmup):
        step()
    if on_gpu:
        row.peak_gib = (torch.cuda.max_memory_allocated() - held) / 2**30
    ratios = []
    for number in range(suite.rounds):
        pair = [step] if reference is None else [step, reference]
        seconds = {}
        for one in pair if number % 2 == 0 else reversed(pair):
            synchronize(suite)
            start = time.perf_counter()
            for _ in range(n_steps):
                one()
            synchronize(suite)
            seconds[one] = (time.perf_counter() - start) / n_steps
        row.rounds.append(n_tokens / seconds[step])
        ratios.append(seconds[reference or step] / seconds[step])
    row.tokens_per_second = statistics.median(row.rounds)
    row.against_reference = statistics.median(ratios)
    if row.model in suite.ceilings:
        flops = flops_per_token(row.model, suite.sequence_length) * row.tokens_per_second
        row.share_of_ceiling = flops / suite.ceilings[row.model]
    return step


def configuration(model: str, sequence_length: int) -> Any:
    from composer_gpt2.configs import get_config

    return get_config(model, dropout=0.0, n_positions=sequence_length, use_cache=False)


def flops_per_token(model: str, sequence_length: int) -> int:
    config = configuration(model, sequence_length)
    matrices = 12 * config.n_layer * config.n_embd**2 + VOCABULARY * config.n_embd
    return 6 * matrices + 12 * config.n_layer * config.n_embd * sequence_length


def microbatch(suite: Suite, model: str) -> int:
    if suite.microbatch is not None:
        return suite.microbatch
    if suite.device.type == "cpu":
        return 2
    gib = torch.cuda.get_device_properties(suite.device).total_memory / 2**30
    sizes = MICROBATCHES.get(model, {0: 4})
    return next(size for least, size in sizes.items() if gib >= least)


# --- Report --------------------------------------------------------------------------------------


def write(suite: Suite) -> None:
    """Both files, after each part: what ends the program early loses one part."""
    suite.out.mkdir(parents=True, exist_ok=True)
    (suite.out / "gpu_suite.md").write_text(markdown(suite), encoding="utf-8")
    facts = {
        **environment(suite),
        "ceilings": suite.ceilings,
        "references": suite.references,
        "products": suite.shapes,
        "rows": [asdict(row) for row in suite.rows],
    }
    (suite.out / "gpu_suite.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def environment(suite: Suite) -> dict[str, Any]:
    on_gpu = suite.device.type == "cuda"
    packages = ("transformers", "mosaicml", "liger-kernel", "triton")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,  # type: ignore[reportAttributeAccessIssue]
        **{package: version(package) for package in packages},
        "sequence_length": suite.sequence_length,
        "compile_backend": suite.backend,
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def markdown(suite: Suite) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in environment(suite).items())
    ceilings = ", ".join(f"{m} {c / 1e12:.4g} TFLOP/s" for m, c in suite.ceilings.items())
    lines = [
        "# Training on one device",
        "",
        f"- {facts}",
        f"- Ceiling, bfloat16 products at the model's shapes: {ceilings or 'not measured'}",
        "- `+` adds to the line of ours before it; ratios are to what ran beside it: "
        + (", ".join(f"{m} {name}" for m, name in suite.references.items()) or "nothing"),
        "",
        "| model | contestant | tokens/s | ratio | of the ceiling | peak, GiB | first step, s "
        "| loss | left out because |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(line, suite.rows),
    ]
    return "\n".join(lines) + "\n"


def line(row: Row) -> str:
    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    cells = [
        row.model,
        row.contestant,
        show(row.tokens_per_second, ",.0f"),
        show(row.against_reference, ".2f"),
        show(row.share_of_ceiling, ".1%"),
        show(row.peak_gib, ".2f"),
        show(row.seconds_to_first_step, ".1f"),
        show(row.loss, ".4f"),
        row.error.replace("|", "/")[:160],
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
