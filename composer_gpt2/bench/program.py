"""Runs the benchmark: all contestants in turns, so that noise of the machine hits all of them.

Peers live in a process with glibc's memory, ours in one that reuses memory. Both stay alive; one of
them runs one step at a time while the other waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from composer_gpt2.bench.contestants import Contestant, contestants, network_config
from composer_gpt2.bench.settings import Settings
from composer_gpt2.bench.worker import Worker
from composer_gpt2.run_folder import versions
from composer_gpt2.scaling import parameter_count

__all__ = ["default_folder", "machine", "measure", "run_bench"]

OVERHEAD_MODEL, OVERHEAD_SHAPE = "gpt2-tiny", (1, 32)  # a step of milliseconds
OVERHEAD_STEPS = 25  # of a block


def run_bench(
    settings: Settings,
    *,
    memory: bool = True,
    overhead: bool = True,
    hardware: str | None = None,
    out: str | Path | None = None,
) -> Path:
    """Measures, and writes ``train_step_<model>_<hardware>_<yyyymm>`` as .md, .json and .svg.

    Args:
        settings: From :func:`composer_gpt2.bench.settings.read_settings`.
        memory: Whether each contestant also runs two steps in a fresh process, for its peak of
            memory and the time to its first step.
        overhead: Whether what Composer's loop costs is also measured on steps of milliseconds.
        hardware: In the file's name; default: the number of threads and ``cpu``.
        out: Folder; default: ``benchmarks`` if there is one here, else this folder.

    Returns:
        The Markdown file.
    """
    from composer_gpt2.bench.report import report
    from composer_gpt2.bench.waterfall import plot

    folder = default_folder() if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    results = measure(settings, memory=memory, overhead=overhead)
    name = f"train_step_{settings.model}_{hardware or f'{settings.threads}cpu'}"
    path = folder / f"{name}_{datetime.date.today():%Y%m}.md"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, path.with_suffix(".svg"))
    path.write_text(report(results, path.with_suffix(".svg").name), encoding="utf-8")
    return path


def default_folder() -> Path:
    """``benchmarks`` in a checkout, else the current folder."""
    return Path("benchmarks") if Path("benchmarks").is_dir() else Path()


def measure(settings: Settings, *, memory: bool, overhead: bool) -> dict[str, Any]:
    """Everything that was measured, as the JSON file has it; arguments as for `run_bench`."""
    present, missing = contestants(settings)
    n_steps = len(present) * (settings.rounds + 1)
    n_steps += settings.rounds  # the ceiling
    n_steps += 2 * len(present) * memory + 2 * settings.rounds * overhead
    config = network_config(settings)
    n_parameters = parameter_count(config)
    attention = 12 * config.n_layer * config.n_embd * settings.sequence_length
    results: dict[str, Any] = {
        "date": f"{datetime.date.today()}",
        "versions": versions(),
        "machine": machine(),
        "settings": dataclasses.asdict(settings),
        "architecture": {
            "n_layer": config.n_layer,
            "n_embd": config.n_embd,
            "vocab_size": config.vocab_size,
        },
        "n_parameters": n_parameters,
        "flops_per_token": 6 * n_parameters + attention,
        "missing": missing,
    }
    with tqdm(total=n_steps, desc="bench", unit=" steps", disable=None) as bar:
        results |= _rounds(settings, present, bar)
        if memory:
            results["fresh"] = {c.key: _fresh(settings, c, bar) for c in present}
        if overhead:
            results["overhead"] = _overhead(settings, present, bar)
    return results


def _rounds(settings: Settings, present: Sequence[Contestant], bar: tqdm) -> dict[str, Any]:
    """The steps and the ceiling, in turns."""

    def keys(process: str) -> list[str]:
        return [c.key for c in present if c.process == process]

    seconds: dict[str, list[float]] = {c.key: [] for c in present}
    ceiling: dict[str, list[dict[str, float]]] = {"bfloat16": [], "float32": []}
    with contextlib.ExitStack() as stack:
        workers = {
            process: stack.enter_context(Worker(settings, process, keys(process)))
            for process in ("ours", "peers")
            if keys(process)
        }

        def run(contestant: Contestant) -> float:
            bar.set_postfix_str(contestant.label)
            (value,) = workers[contestant.process].ask(run=contestant.key, n=1)["seconds"]
            bar.update()
            return value

        for contestant in present:  # a step that does not count
            run(contestant)
        for number in range(settings.rounds):
            for contestant in in_turn(present, number):
                seconds[contestant.key].append(run(contestant))
            bar.set_postfix_str("matrix products")
            ours = workers["ours"]
            ceiling["bfloat16"].append(ours.ask(ceiling="bfloat16")["seconds"])
            if number == settings.rounds // 2:
                ceiling["float32"].append(ours.ask(ceiling="float32", forget=True)["seconds"])
            bar.update()
    return {
        "contestants": [{**dataclasses.asdict(c), "seconds": seconds[c.key]} for c in present],
        "ceiling": ceiling,
    }


def in_turn(present: Sequence[Contestant], number: int) -> list[Contestant]:
    """The order of a round: begins elsewhere each time, and every other time runs backwards."""
    start = (number // 2) % len(present)
    order = [*present[start:], *present[:start]]
    return order[::-1] if number % 2 else order


def _fresh(settings: Settings, contestant: Contestant, bar: tqdm) -> dict[str, Any]:
    """Two steps in a process of its own."""
    bar.set_postfix_str(f"{contestant.label}, fresh process")
    start = time.monotonic()
    with Worker(settings, contestant.process, [contestant.key]) as worker:
        answer = worker.ask(run=contestant.key, n=2, in_all=True)
    bar.update(2)
    return {
        "peak_bytes": answer["peak_bytes"],
        "seconds_to_first_step": answer["first_batch_end"] - start,
        "first_loss": answer["first_loss"],
    }


def _overhead(settings: Settings, present: Sequence[Contestant], bar: tqdm) -> dict[str, Any]:
    """Seconds of a step in our Trainer and in a bare loop, where the model costs next to nothing.

    Blocks of steps take turns; the value of a block is its median.
    """
    small = dataclasses.replace(
        settings,
        model=OVERHEAD_MODEL,
        batch_size=OVERHEAD_SHAPE[0],
        sequence_length=OVERHEAD_SHAPE[1],
        data=None,
    )
    bare = [c.key for c in present if c.kind == "loop" and c.process == "ours"][-1]
    blocks: dict[str, list[float]] = {bare: [], "trainer": []}
    bar.set_postfix_str("overhead of the Trainer")
    with Worker(small, "ours", list(blocks)) as worker:
        for key in blocks:
            worker.ask(run=key, n=OVERHEAD_STEPS)
        for number in range(2 * settings.rounds):
            for key in list(blocks)[:: -1 if number % 2 else 1]:
                values = worker.ask(run=key, n=OVERHEAD_STEPS)["seconds"]
                blocks[key].append(statistics.median(values))
            bar.update()
    return {
        "model": OVERHEAD_MODEL,
        "shape": list(OVERHEAD_SHAPE),
        "steps_a_block": OVERHEAD_STEPS,
        "bare": blocks[bare],
        "trainer": blocks["trainer"],
    }


def machine() -> dict[str, Any]:
    """What of the hardware decides the speed of matrix products."""
    from composer_gpt2.bench.settings import n_cores

    found: dict[str, Any] = {"architecture": platform.machine(), "n_cores": n_cores()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        entries = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        values = {key.strip(): value.strip() for key, _, value in reversed(entries)}
        found["cpu"] = values.get("model name", "unknown")
        flags = values.get("flags", values.get("Features", "")).split()
        found["flags"] = [flag for flag in _FLAGS if flag in flags]
    return found


_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "bf16", "sve")
