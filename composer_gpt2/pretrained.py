"""Weights that a run begins with, and whether its recipe keeps the function that they compute."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig

from composer_gpt2 import registry
from composer_gpt2.checkpoints.manifest import CheckpointError
from composer_gpt2.checkpoints.safe_loading import load_safely
from composer_gpt2.contract import architecture, plain_configuration
from composer_gpt2.importing import foreign_configuration
from composer_gpt2.model import GPT2Model, build_network, is_hub_id
from composer_gpt2.trained_model import find_checkpoint

__all__ = ["known_problems", "load_pretrained", "problems"]

_STRUCTURE = (
    "n_layer",
    "n_embd",
    "n_head",
    "n_inner",
    "n_positions",
    "vocab_size",
    "activation_function",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
)
"""Settings that weights are made for; dropout and the like are the recipe's to choose."""

Problem = tuple[tuple[str, ...], str]
"""A key of the recipe, and what is wrong with it."""


def known_problems(
    source: str, config: GPT2Config, algorithms: Iterable[str], *, allow_changes: bool
) -> list[Problem]:
    """What can be said before a run: everything for files here, little for what has to be fetched.

    Args:
        source: ``model.pretrained``.
        config: That of the recipe's model.
        algorithms: Names of the recipe's algorithms.
        allow_changes: Whether algorithms may destroy the function of the weights.
    """
    try:
        theirs = _peek(source, config.n_head)
    except (OSError, ValueError, CheckpointError) as error:
        return [(("model", "pretrained"), str(error).removesuffix("."))]
    if theirs is None:
        return _destroyed((), algorithms) if not (allow_changes or "://" in source) else []
    return problems(theirs, config, algorithms, allow_changes=allow_changes)


def problems(
    theirs: PretrainedConfig,
    config: GPT2Config,
    algorithms: Iterable[str],
    *,
    allow_changes: bool,
) -> list[Problem]:
    """Every way in which a recipe does not suit weights, or would destroy what they compute.

    Args:
        theirs: The configuration of the weights, with its record of architectural algorithms.
        config: That of the recipe's model, before algorithms.
        algorithms: Names of the recipe's algorithms.
        allow_changes: Whether algorithms may destroy the function of the weights.
    """
    plain, theirs_have = plain_configuration(theirs)
    found: list[Problem] = []
    for key in _STRUCTURE:
        wanted, got = _setting(plain, key), _setting(config, key)
        if wanted != got:
            found.append(
                (("model", key), f"must be that of model.pretrained, {wanted!r}, got {got!r}")
            )
    chosen = set(algorithms)
    for name in theirs_have.keys() - chosen:
        message = f"has {name} and computes nothing without; write algorithms.{name}: {{...}}"
        found.append((("model", "pretrained"), message))
    return found if allow_changes else found + _destroyed(theirs_have, chosen)


def load_pretrained(source: str, config: GPT2Config) -> GPT2LMHeadModel:
    """A network with the recipe's configuration, the weights, and the weights' own algorithms.

    Args:
        source: As for :func:`composer_gpt2.trained_model.load_trained_model`.
        config: Of the recipe's model; its dropout is kept.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It holds no GPT-2, or one of another shape.
        CheckpointError: The file is no checkpoint, or would run code.
    """
    loaded = GPT2Model.from_pretrained(
        find_checkpoint(source), tokenizer_name=None, n_head=config.n_head
    ).model
    wrong = problems(loaded.config, config, architecture(loaded), allow_changes=True)
    if wrong:
        raise ValueError("; ".join(f"{'.'.join(key)} {message}" for key, message in wrong) + ".")
    network = build_network(copy.deepcopy(config), architecture(loaded))
    network.load_state_dict(loaded.state_dict())
    return network


def _setting(config: PretrainedConfig, key: str) -> Any:
    """A setting, spelled in one way where there are several."""
    value = getattr(config, key)
    if key == "n_inner":
        return value or 4 * config.n_embd
    return "gelu_new" if value == "gelu_pytorch_tanh" else value


def _destroyed(theirs_have: Iterable[str], algorithms: Iterable[str]) -> list[Problem]:
    found: list[Problem] = []
    for name in sorted(set(algorithms) - set(theirs_have)):
        algorithm = registry.get("algorithms", name).load()
        if getattr(algorithm, "architectural", False) and not algorithm.keeps_function:  # type: ignore[attr-defined]
            found.append(
                (
                    ("algorithms", name),
                    "would destroy what the weights of model.pretrained compute: they were trained "
                    "without; leave it out, or write model.allow_destructive_algorithms: true",
                )
            )
    return found


def _peek(source: str, n_head: int) -> PretrainedConfig | None:
    """The configuration of weights that are here, without the weights; ``None`` for others."""
    if "://" in source:
        return None
    path = Path(find_checkpoint(source))
    if path.is_dir():
        return GPT2Config.from_pretrained(path, local_files_only=True)
    if not path.is_file():
        if is_hub_id(source):
            return None
        raise FileNotFoundError(
            "must be a run folder, a checkpoint, a Hugging Face folder or a hub id, got "
            f"{source!r}, which does not exist"
        )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return GPT2Config.from_dict(json.loads((file.metadata() or {})["config"]))
        except (KeyError, SafetensorError) as error:
            raise ValueError(
                f"must be the weights of a checkpoint of ours, got {source} without its "
                f"configuration ({error!r})"
            ) from error
    content: Mapping[str, Any] = load_safely(path)
    if "state" not in content:
        return foreign_configuration(content, source=source, n_head=n_head)
    try:
        saved = content["state"]["integrations"]["huggingface"]["model"]["config"]["content"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"must be a checkpoint that a Trainer saved of a GPT2Model, got {source} without its "
            f"configuration ({error!r})"
        ) from error
    return GPT2Config.from_dict(saved)
