"""Peak memory of training on a CPU, with what saves memory at the price of time.

Each setting trains two batches in our Trainer, in a process of its own, once. A second table says
where the memory goes, phase by phase, in a plain loop.

    python benchmarks/memory.py --hardware 2cpu
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from composer_gpt2.bench.contestants import contestants
from composer_gpt2.bench.program import _fresh
from composer_gpt2.bench.settings import read_settings
from composer_gpt2.run_folder import versions

SETTINGS = {
    "as it is": (),
    "recompute_mlp": ("algorithms.fused_block={recompute_mlp: true}",),
    "recompute_mlp, activation_checkpointing every 4th block": (
        "algorithms.fused_block={recompute_mlp: true}",
        "algorithms.activation_checkpointing={every: 4}",
    ),
    "activation_checkpointing, all blocks": ("algorithms.activation_checkpointing={every: 1}",),
    "the same, fused_cross_entropy with 128 rows": (
        "algorithms.activation_checkpointing={every: 1}",
        "algorithms.fused_cross_entropy={rows: 128}",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="yamls/gpt2-125m-fast.yaml")
    parser.add_argument("--hardware", default="")
    parser.add_argument("--phases", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phases:
        measure_phases(arguments.recipe)
        return
    if not arguments.hardware:
        parser.error("--hardware must name the machine, such as 2cpu")
    found = versions()
    lines = [
        f"# Peak memory of {Path(arguments.recipe).name}: {arguments.hardware}",
        "",
        f"- Command: `python benchmarks/memory.py --recipe {arguments.recipe} "
        f"--hardware {arguments.hardware}`",
        f"- {date.today()}, commit {found['commit']}, torch {found['torch']}, "
        f"Python {found['python']}, {torch.get_num_threads()} threads",
        "- 4 x 1024 tokens, two batches in our Trainer in a fresh process: the largest resident "
        "size (VmHWM), code of libraries included; one observation",
        "",
        "| setting | peak, GB | GiB |",
        "|---|---|---|",
    ]
    for label, overrides in SETTINGS.items():
        settings = read_settings([arguments.recipe], overrides, peers=False)
        ours = contestants(settings)[0][-1]
        with tqdm(total=2, desc=label, unit=" steps", disable=None) as bar:
            peak = _fresh(settings, ours, bar)["peak_bytes"]
        lines.append(f"| {label} | {peak / 1e9:.2f} | {peak / 2**30:.2f} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "As it is, without a Trainer: resident after each phase, and the peak so far. Freed memory",
        "is returned after each of the first two steps, as in a run.",
        "",
        "| phase | resident, GB | peak, GB |",
        "|---|---|---|",
        *phase_rows(arguments.recipe),
    ]
    path = Path(__file__).with_name(f"memory_{arguments.hardware}_{date.today():%Y%m}.md")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path)


def phase_rows(recipe: str) -> list[str]:
    """The second table, measured in a fresh process."""
    command = [sys.executable, __file__, "--recipe", recipe, "--phases"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = json.loads(output.splitlines()[-1])
    return [f"| {phase} | {resident:.2f} | {peak:.2f} |" for phase, resident, peak in rows]


def measure_phases(recipe_file: str) -> None:
    """Prints phase, resident size and peak in GB, as one line of JSON."""
    from composer_gpt2.memory import _return_freed_memory, keep_freed_memory

    keep_freed_memory()
    import composer_gpt2.train  # noqa: F401 (what a run imports)
    from composer_gpt2 import registry
    from composer_gpt2.build import build_model, build_optimizer
    from composer_gpt2.contract import SpeedupAlgorithm, installation_order, language_model
    from composer_gpt2.recipe import load_recipe

    rows: list[tuple[str, float, float]] = []

    def note(phase: str) -> None:
        status = Path("/proc/self/status").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in status if line.startswith("Vm"))
        resident, peak = (int(sizes[key].split()[0]) * 1024 / 1e9 for key in ("VmRSS", "VmHWM"))
        rows.append((phase, resident, peak))

    note("imports")
    recipe = load_recipe([recipe_file], ["data.remote=/none", "algorithms.skip_nonfinite=null"])
    model = build_model(recipe, on_cpu=True)
    built = [registry.get("algorithms", n).load()(**a) for n, a in recipe.algorithms.items()]
    for algorithm in installation_order(built):
        assert isinstance(algorithm, SpeedupAlgorithm)
        algorithm.apply_to_model(language_model(model, algorithm.name), ())
    optimizer = build_optimizer(recipe, model)
    note("model, in float32")
    ids = torch.randint(50257, (4, 1024))
    for step in (1, 2, 3):
        loss = model({"input_ids": ids, "labels": ids}).loss
        assert loss is not None
        note(f"forward {step}")
        loss.backward()
        note(f"backward {step}")
        optimizer.step()
        optimizer.zero_grad()
        note(f"optimizer step {step}")
        if step < 3:
            _return_freed_memory()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
