"""Loads an exported folder as a stranger would, and compares its logits; imports nothing of ours.

``python -I isolated.py FOLDER PROBES [PATH ...]`` prints the largest difference as JSON; modules
are also looked for in the PATHs. The packages that trained the model are not to be found in that
process, even where they are installed.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["Blocked", "largest_difference"]

BLOCKED = ("composer_gpt2", "algorithms", "composer", "streaming")
N_CACHED = 8  # last tokens of a probe that are read one by one, with a cache


class Blocked(importlib.abc.MetaPathFinder):
    """As if the packages were not installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Raises for the blocked ones."""
        if fullname.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)", name=fullname)


def largest_difference(folder: str | Path, probes: str | Path) -> float:
    """How far the logits of the model in a folder are from the expected ones, at most.

    Each probe is read twice: at once, and its last tokens one by one with a cache.

    Args:
        folder: What was exported; computed in float32, whatever its type.
        probes: A safetensors file with ``tokens.N``, int64, (B, T), and ``logits.N``, float32,
            (B, at most T, V): those of the last positions.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, DynamicCache

    # Without the option, a plain folder that asked for code would be refused.
    runs_code = (Path(folder) / "modeling_composer_gpt2.py").exists()
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=runs_code, local_files_only=True, torch_dtype=torch.float32
    ).eval()
    tensors, largest = load_file(probes), 0.0
    with torch.no_grad():
        for n in range(len(tensors) // 2):
            tokens, expected = tensors[f"tokens.{n}"], tensors[f"logits.{n}"]
            got = model(tokens).logits[:, -expected.shape[1] :]
            n_cached = min(N_CACHED, tokens.shape[1] // 2)
            cache, steps = DynamicCache(), []
            for part in (tokens[:, :-n_cached], *tokens[:, -n_cached:].split(1, dim=1)):
                logits = model(part, past_key_values=cache, use_cache=True).logits
                steps.append(logits[:, -1:])
            one_by_one = torch.cat(steps, dim=1)
            if got.shape != expected.shape:
                return float("inf")
            for difference in (got - expected, one_by_one - expected[:, -n_cached - 1 :]):
                # A NaN counts as the largest: max() of torch keeps it.
                value = float(difference.abs().max())
                largest = value if not value <= largest else largest
    return largest


if __name__ == "__main__":
    sys.path.extend(sys.argv[3:])
    sys.meta_path.insert(0, Blocked())
    print(json.dumps({"difference": largest_difference(sys.argv[1], sys.argv[2])}))
