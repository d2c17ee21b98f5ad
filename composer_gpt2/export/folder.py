"""Writes the files of an exported model, but for its card."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig, PretrainedConfig

from composer_gpt2.contract import language_model, plain_configuration
from composer_gpt2.export.remote.modeling_composer_gpt2 import ComposerGPT2Config
from composer_gpt2.export.remote_code import MODELING_FILE, remote_code
from composer_gpt2.model import GPT2Model

__all__ = ["write_folder"]

_OF_TRAINING_CODE = ("reorder_and_upcast_attn", "add_cross_attention", "n_ctx", "loss_type")


def write_folder(
    model: GPT2Model, folder: Path, *, changes: Mapping[str, Mapping[str, Any]], dtype: torch.dtype
) -> None:
    """Writes weights, configuration, tokenizer and, for a changed network, its code.

    Args:
        model: What :func:`~composer_gpt2.export.architecture.changes_to_write` has left of it.
        folder: An empty one.
        changes: As that function returned them.
        dtype: Of the weights.
    """
    module = language_model(model, "export")
    weights = {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
    if module.lm_head.weight is module.transformer.wte.weight:
        del weights["lm_head.weight"]  # is the embedding
    save_torch_state_dict(weights, folder)
    for path in folder.iterdir():
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors writes for the owner's eyes alone

    plain, _ = plain_configuration(module.config)
    config = _remote_configuration(plain, changes) if changes else plain
    if not changes:
        config.architectures = ["GPT2LMHeadModel"]
    config.torch_dtype = dtype
    _name_special_tokens(config, model)
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    generation.pad_token_id = generation.eos_token_id  # or generate() says that it assumes so
    generation.save_pretrained(folder)
    if model.tokenizer is not None:
        tokenizer = copy.deepcopy(model.tokenizer)
        tokenizer.save_pretrained(str(folder))
    if changes:
        (folder / MODELING_FILE).write_text(remote_code(changes), encoding="utf-8")


def _remote_configuration(
    plain: PretrainedConfig, changes: Mapping[str, Mapping[str, Any]]
) -> ComposerGPT2Config:
    settings = plain.to_diff_dict()
    for key in ("model_type", "architectures", "transformers_version", *_OF_TRAINING_CODE):
        settings.pop(key, None)
    config = ComposerGPT2Config(
        **settings, changes={name: dict(given) for name, given in changes.items()}
    )
    config.architectures = ["ComposerGPT2LMHeadModel"]
    config.auto_map = {
        "AutoConfig": "modeling_composer_gpt2.ComposerGPT2Config",
        "AutoModelForCausalLM": "modeling_composer_gpt2.ComposerGPT2LMHeadModel",
    }
    return config


def _name_special_tokens(config: PretrainedConfig, model: GPT2Model) -> None:
    """GPT-2's configuration says 50256 for any vocabulary; the tokenizer knows better."""
    tokenizer = model.tokenizer
    for name in ("bos_token_id", "eos_token_id"):
        if tokenizer is not None:
            setattr(config, name, getattr(tokenizer, name))
        elif (getattr(config, name) or 0) >= config.vocab_size:
            setattr(config, name, None)
