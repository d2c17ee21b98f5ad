"""Weights that other programs saved: nanoGPT's and minGPT's checkpoints as Hugging Face's GPT-2.

Both name their parameters as OpenAI did, and keep matrices as ``nn.Linear`` does, (out, in), where
Hugging Face has (in, out). What they do not say is inferred where it is certain, and asked for
where it is not.

Source: Karpathy, nanoGPT (``train.py``, ``model.py``) and minGPT (``mingpt/model.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from composer_gpt2.configs import family, get_config
from composer_gpt2.tokenizer import VOCAB_SIZE

__all__ = ["foreign_configuration", "import_weights"]

_PADDED_VOCABULARY = 64 * math.ceil(VOCAB_SIZE / 64)  # 50,304: nanoGPT's default
_MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")  # causal masks


def import_weights(
    content: Mapping[str, Any], *, source: str, n_head: int | None = None
) -> GPT2LMHeadModel:
    """A network with the weights of a foreign checkpoint; its logits are those of the original.

    nanoGPT's ``ckpt.pt`` says everything but its activation, which is the exact GELU. Biases that
    it was trained without are zeros. A vocabulary of 50,304 is GPT-2's with 47 rows of padding,
    which are cut: no token stands for them.

    minGPT saves a state dict alone, with an untied head; sizes follow from shapes. The number of
    heads does not: it is that of the model of the family with these layers and this width, or has
    to be given.

    Args:
        content: What the file holds.
        source: Its name, for messages.
        n_head: Attention heads, where the file does not say.

    Raises:
        ValueError: It is neither of the two, it lacks a weight, or its heads are not known.
    """
    weights = _weights(content, source)
    config = _configuration(weights, content.get("model_args"), source, n_head)
    network = GPT2LMHeadModel(config)
    _copy(network, _in_our_layout(weights, config), source)
    return network


def foreign_configuration(
    content: Mapping[str, Any], *, source: str, n_head: int | None = None
) -> GPT2Config:
    """The configuration of that network; arguments and errors as of :func:`import_weights`."""
    return _configuration(_weights(content, source), content.get("model_args"), source, n_head)


def _weights(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Tensors by their names in GPT-2, ``transformer.`` before them; causal masks left out."""
    state = content["model"] if isinstance(content.get("model_args"), Mapping) else content
    weights = {
        str(name).removeprefix("_orig_mod.").removeprefix("module."): tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }
    if "wte.weight" in weights:  # a body without head
        weights = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    if "transformer.wte.weight" not in weights or "transformer.wpe.weight" not in weights:
        raise ValueError(
            f"{source} must be a checkpoint of Composer's, nanoGPT's (model, model_args) or "
            f"minGPT's (a state dict with transformer.wte.weight), got {_some(content)}; check the "
            "path."
        )
    return {name: tensor for name, tensor in weights.items() if not _BUFFERS.fullmatch(name)}


def _configuration(
    weights: Mapping[str, Tensor], arguments: Any, source: str, n_head: int | None
) -> GPT2Config:
    vocabulary, width = weights["transformer.wte.weight"].shape
    layers = {int(name.split(".")[2]) for name in weights if name.startswith("transformer.h.")}
    head = weights.get("lm_head.weight", weights["transformer.wte.weight"])
    settings: dict[str, Any] = {
        "n_layer": len(layers),
        "n_embd": width,
        "n_positions": len(weights["transformer.wpe.weight"]),
        "vocab_size": VOCAB_SIZE if vocabulary == _PADDED_VOCABULARY else vocabulary,
        "tie_word_embeddings": bool((head == weights["transformer.wte.weight"]).all()),
    }
    n_inner = weights.get("transformer.h.0.mlp.c_fc.weight")
    if n_inner is not None and max(n_inner.shape) != 4 * width:
        settings["n_inner"] = max(n_inner.shape)
    if isinstance(arguments, Mapping):
        said, dropout = int(arguments["n_head"]), float(arguments.get("dropout") or 0.0)
        if n_head not in (None, said):
            raise ValueError(f"n_head of {source} must be {said}, as it says, got {n_head}.")
        settings |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
        settings |= {"n_head": said, "activation_function": "gelu"}
    else:
        settings["n_head"] = n_head or _usual_heads(len(layers), width, source)
    if width % settings["n_head"]:
        raise ValueError(
            f"n_head must divide the width of {source}, {width}, got {settings['n_head']}."
        )
    if settings["vocab_size"] < VOCAB_SIZE:  # not GPT-2's tokens
        settings |= {"bos_token_id": None, "eos_token_id": None}
    return GPT2Config(**settings)


def _usual_heads(n_layers: int, width: int, source: str) -> int:
    known = map(get_config, family())
    heads = {c.n_head for c in known if (c.n_layer, c.n_embd) == (n_layers, width)}
    if len(heads) != 1:
        raise ValueError(
            f"the number of attention heads of {source} must be given: a state dict does not say "
            f"it, and no model of the family has {n_layers} layers of width {width}; write "
            "GPT2Model.from_pretrained(..., n_head=...), or convert it once with composer-gpt2 "
            "export --heads."
        )
    return heads.pop()


def _in_our_layout(weights: Mapping[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    attention = weights.get("transformer.h.0.attn.c_attn.weight")
    # (3 * width, width) is a Linear's; Hugging Face's own state dicts pass through here as well.
    is_linear = attention is not None and attention.shape[0] == 3 * config.n_embd
    ours = {}
    for name, tensor in weights.items():
        if is_linear and name.endswith(_MATRICES):
            tensor = tensor.t()
        if name in ("transformer.wte.weight", "lm_head.weight"):
            tensor = tensor[: config.vocab_size]
        ours[name] = tensor.float()
    return ours


def _copy(network: GPT2LMHeadModel, weights: Mapping[str, Tensor], source: str) -> None:
    """Fills the network; biases that are not there are zeros, anything else is a mistake."""
    own = network.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith(".bias")]
    if network.config.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    unknown = sorted(weights.keys() - own.keys())
    wrong = [
        f"{name} of shape {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    for problem, names in (("lacks", missing), ("has the unknown", unknown), ("has", wrong)):
        if names:
            raise ValueError(
                f"{source} must have the weights of a GPT-2, but it {problem} "
                f"{', '.join(sorted(names)[:3])}{' and more' if len(names) > 3 else ''}."
            )
    zeros = {name: tensor.new_zeros(tensor.shape) for name, tensor in own.items()}
    tied = {"lm_head.weight": weights.get("lm_head.weight", weights["transformer.wte.weight"])}
    network.load_state_dict({**zeros, **weights, **tied})


def _some(content: Mapping[str, Any]) -> str:
    names = sorted(map(str, content))
    return f"{', '.join(names[:5]) or 'nothing'}{', ...' if len(names) > 5 else ''}"
