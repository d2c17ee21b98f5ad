"""Blocks computed again in the backward pass instead of kept.

To compute gradients, autograd keeps what each operation of the forward pass read or wrote: in a
block of GPT-2, dozens of numbers for each one of its input. A checkpointed block keeps its input
alone. When its gradients are due it runs forward once more, with the dropout of the first time, so
loss and gradients are the same; the price is up to one more forward pass.

It acts when a block is called, on whatever class the block has then.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel
from typing_extensions import override

from composer_gpt2.contract import (
    NoEffectError,
    Plan,
    Receipt,
    SpeedupAlgorithm,
    Stage,
    language_model,
)

__all__ = ["ActivationCheckpointing", "apply_activation_checkpointing"]


def apply_activation_checkpointing(
    model: nn.Module, every: int = 1, optimizers: Iterable[Optimizer] = ()
) -> Receipt:
    """Keeps only the input of every n-th block for the backward pass, and computes the rest again.

    It acts where a model trains and gradients are recorded; evaluation and generation are as
    before. Applied again, the last ``every`` holds. A block that trains makes no key-value cache.

    Example:
        >>> model = GPT2LMHeadModel(GPT2Config())
        >>> print(apply_activation_checkpointing(model))
        activation_checkpointing: computes 12 of 12 blocks again in the backward pass ...

    Args:
        model: A ``GPT2LMHeadModel``, or a ``GPT2Model`` that holds one; changed in place.
        every: 1 for all blocks, 2 for every second one, and so on; at most the number of layers.
        optimizers: Ignored; parameters and their names stay.

    Returns:
        The probe is what autograd keeps of one short sequence, parameters not counted, in KiB a
        token: with checkpointing, and without.

    Raises:
        NoEffectError: The model is no GPT-2, has checkpointing of another kind, or keeps no less.
        ValueError: ``every`` is below 1 or above the number of layers.

    Source: Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost",
    https://arxiv.org/abs/1604.06174, section 4.
    """
    name = ActivationCheckpointing.name
    network = language_model(model, name)
    blocks = list(network.transformer.h)
    _check(every, len(blocks))
    foreign = [b for b in blocks if "forward" in vars(b) and not _is_checkpointed(b)]
    if foreign or network.is_gradient_checkpointing:
        found = "a forward of their own" if foreign else "transformers' gradient checkpointing"
        raise NoEffectError(
            f"{name} needs blocks that run as their class says, got blocks with {found}; undo it "
            "(gradient_checkpointing_disable() for that of transformers) or leave this one out."
        )
    for block in blocks:
        vars(block).pop("forward", None)
    without = _kib_kept_per_token(network)
    chosen = blocks[every - 1 :: every]
    for block in chosen:
        block.forward = functools.partial(_forward, block)
    kept = _kib_kept_per_token(network)
    if not kept < without:
        for block in chosen:
            del block.forward
        raise NoEffectError(
            f"{name} must keep less for the backward pass, got {kept:.3g} KiB a token instead of "
            f"{without:.3g}; it leaves the model as it was."
        )
    return Receipt(
        algorithm=name,
        settings={"every": every},
        changed=f"computes {len(chosen)} of {len(blocks)} blocks again in the backward pass",
        count=len(chosen),
        probe={"KiB kept a token": kept, "without": without},
    )


@dataclass(eq=False)
class ActivationCheckpointing(SpeedupAlgorithm):
    """Applies :func:`apply_activation_checkpointing` when the Trainer is built.

    Changes: how every n-th block is called in training. No parameter, no number of the loss.

    Example:
        >>> Trainer(model=GPT2Model.from_name("gpt2-125m"), algorithms=[ActivationCheckpointing()])

    Args:
        every: 1 for all blocks, 2 for every second one, and so on; at most the number of layers.

    Source: Chen et al., 2016, https://arxiv.org/abs/1604.06174.
    """

    every: int = 1

    name = "activation_checkpointing"
    stage = Stage.MEMORY

    def __post_init__(self) -> None:
        _check(self.every)

    @override
    def check_plan(self, plan: Plan) -> None:
        _check(self.every, plan.model["n_layer"])

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        return apply_activation_checkpointing(module, self.every, optimizers)


def _check(every: int, n_layers: int | None = None) -> None:
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}; 1 recomputes all blocks.")
    if n_layers is not None and every > n_layers:
        raise ValueError(
            f"activation_checkpointing needs an every of at most the {n_layers} layers, got "
            f"{every}: no block would be recomputed; lower it or leave the algorithm out."
        )


def _is_checkpointed(block: nn.Module) -> bool:
    return getattr(vars(block).get("forward"), "func", None) is _forward


def _forward(
    block: Any, hidden_states: Tensor, past_key_value: Any = None, *rest: Any, **options: Any
) -> Any:
    """The forward of a block's class, as it is at this call; in training, under a checkpoint."""
    forward = functools.partial(type(block).forward, block)
    trains = block.training and torch.is_grad_enabled()
    reads_cache = past_key_value is not None and past_key_value.get_seq_length(block.attn.layer_idx)
    if not trains or reads_cache:
        return forward(hidden_states, past_key_value, *rest, **options)
    # Without the cache that transformers makes unasked: the second time, keys would come twice.
    return checkpoint(forward, hidden_states, None, *rest, use_reentrant=False, **options)


_PROBE_TOKENS = 64


def _kib_kept_per_token(network: GPT2LMHeadModel) -> float:
    """What autograd keeps of one sequence in training, without the parameters themselves."""
    device = network.transformer.wte.weight.device
    n_tokens = min(_PROBE_TOKENS, network.config.n_positions)
    own = {p.untyped_storage().data_ptr() for p in [*network.parameters(), *network.buffers()]}
    kept: dict[int, int] = {}  # address to bytes: several operations keep one tensor

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    modes = {module: module.training for module in network.modules()}
    network.train()
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),  # dropout
            torch.enable_grad(),
            # On GPUs some attention kernels run in half precision alone.
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            tokens = torch.zeros(1, n_tokens, dtype=torch.long, device=device)
            graph = network.transformer(tokens, use_cache=False)  # holds what it keeps
            del graph
    finally:
        for module, mode in modes.items():
            module.training = mode
    return sum(kept.values()) / 1024 / n_tokens
