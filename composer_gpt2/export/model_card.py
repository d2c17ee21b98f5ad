"""The ``README.md`` of an exported model: what it is, how it was trained, and what was checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from composer_gpt2._version import __version__
from composer_gpt2.contract import Receipt
from composer_gpt2.export.source import Origin

__all__ = ["model_card"]

_NOT_FOR_OTHERS = ("run_folder", "save_folder", "load_path")  # paths of one machine


def model_card(
    origin: Origin, *, config: Mapping[str, Any], n_parameters: int, dtype: str, difference: float
) -> str:
    """The card, as Markdown with the hub's YAML on top.

    Args:
        origin: What is known of the run.
        config: Of the exported model.
        n_parameters: A tied head counts once.
        dtype: Of the weights.
        difference: The largest difference of logits that was measured.
    """
    changes = list(config.get("changes", {}))
    about = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "composer-gpt2", *(name.replace("_", "-") for name in changes)],
    }
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n# {origin.name}\n",
        _what_it_is(config, changes, n_parameters, dtype),
        _how_to_load(changes),
        *_how_it_was_trained(origin),
        _what_was_checked(origin, difference),
    ]
    return "\n".join(parts)


def _what_it_is(
    config: Mapping[str, Any], changes: list[str], n_parameters: int, dtype: str
) -> str:
    network = "GPT-2" if not changes else f"GPT-2 changed by {', '.join(changes)}"
    positions = "any length" if "alibi" in changes else f"{config['n_positions']:,} tokens"
    return (
        f"{network}: {config['n_layer']} layers, width {config['n_embd']}, {config['n_head']} "
        f"heads, {positions}, vocabulary {config['vocab_size']:,}, {n_parameters:,} parameters in "
        f"{dtype}.\n"
    )


def _how_to_load(changes: list[str]) -> str:
    trust, note = "", ""
    if changes:
        trust = ", trust_remote_code=True"
        note = (
            "\nThe network is not GPT-2's, so its code is in this folder; it needs torch and "
            "transformers only. Read it before you trust it.\n"
        )
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(path{trust})
tokenizer = AutoTokenizer.from_pretrained(path{trust})
tokens = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50, do_sample=True)[0]))
```
{note}"""


def _how_it_was_trained(origin: Origin) -> list[str]:
    parts = []
    if origin.trained:
        counted = ", ".join(f"{count:,} {unit}" for unit, count in origin.trained.items())
        parts.append(f"## Training\n\n{counted}; the weights are {origin.weights}.\n")
    else:
        parts.append("## Training\n\nNot known: the weights came without their run.\n")
    if origin.recipe:
        data = origin.recipe.get("data", {})
        sources = data.get("remote") or ", ".join(
            str(stream.get("remote")) for stream in data.get("streams", {}).values()
        )
        parts.append(
            f"Data: `{sources}`, split `{data.get('train_split')}`, sequences of "
            f"{data.get('sequence_length')} tokens; evaluation on "
            f"`{data.get('validation_split')}`.\n"
        )
    if origin.metrics:
        rows = [
            f"| {split} | {name} | {value:.4f} |"
            for split in ("train", "eval")
            for name, value in origin.metrics.get(split, {}).items()
        ]
        parts.append("\n".join(["| | metric | value |", "|---|---|---|", *rows, ""]))
    if origin.receipts:
        effects = [f"- {Receipt(**receipt)}" for receipt in origin.receipts]
        parts.append(
            "\n".join(["What the algorithms of training changed, as measured:\n", *effects, ""])
        )
    if origin.recipe:
        shared = {k: v for k, v in origin.recipe.items() if k not in _NOT_FOR_OTHERS}
        parts.append(f"### Recipe\n\n```yaml\n{yaml.safe_dump(shared, sort_keys=False)}```\n")
    if origin.versions:
        rows = [f"| {package} | {version} |" for package, version in origin.versions.items()]
        parts.append("\n".join(["| package | version |", "|---|---|", *rows, ""]))
    return parts


def _what_was_checked(origin: Origin, difference: float) -> str:
    return (
        "## Export\n\n"
        f"Written by composer-gpt2 {__version__} from {origin.name}. Loaded again and computed in "
        "float32, also token by token with a cache, its logits are those of the trained model, "
        f"with its weights in this type, up to {difference:.2g}.\n"
    )
