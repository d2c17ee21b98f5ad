"""Peak memory of training on a CPU, with what saves memory at the price of time.

Each setting trains two batches in our Trainer, in a process of its own, once.

    python benchmarks/memory.py --hardware 2cpu
"""

from __future__ import annotations

import argparse
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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="yamls/gpt2-125m-fast.yaml")
    parser.add_argument("--hardware", required=True)
    arguments = parser.parse_args()
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
    path = Path(__file__).with_name(f"memory_{arguments.hardware}_{date.today():%Y%m}.md")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
