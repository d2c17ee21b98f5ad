"""A small model, fixed batches and a Trainer, for the tests of algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer import Algorithm, Callback, Logger, State, Trainer
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader

from composer_gpt2 import GPT2Model
from composer_gpt2.build import parameter_groups
from composer_gpt2.model import CPUPrecision

__all__ = ["N_TOKENS", "VOCAB_SIZE", "Losses", "build_network", "train", "trainer", "weights"]

VOCAB_SIZE = 101  # a prime: no multiple of anything
N_TOKENS = 32
BATCH_SIZE = 4
TOKENS = torch.randint(
    VOCAB_SIZE, (8 * BATCH_SIZE, N_TOKENS), generator=torch.Generator().manual_seed(0)
)


def build_network(cpu_precision: CPUPrecision = "fp32", **overrides: Any) -> GPT2Model:
    """The same fresh model each time: 2 layers, d_model 32, 2 heads, 32 positions."""
    torch.manual_seed(1)
    settings = {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,  # of width 16, what fused_block needs
        "n_positions": N_TOKENS,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dropout": 0.0,
        **overrides,
    }
    return GPT2Model.from_name(
        "gpt2-tiny", tokenizer_name=None, cpu_precision=cpu_precision, **settings
    )


def trainer(
    model: GPT2Model,
    algorithms: Sequence[Algorithm] = (),
    *,
    tokens: torch.Tensor = TOKENS,
    lr: float = 1e-2,
    max_duration: str = "3ba",
    microbatch_size: int = 2,
    **arguments: Any,
) -> Trainer:
    """A Trainer on fixed batches of 4 x 32 tokens, of which each rank has its share.

    AdamW has one group that decays and one that does not.
    """
    dist.initialize_dist("cpu")
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens]
    loader = DataLoader(
        rows,
        batch_size=BATCH_SIZE // dist.get_world_size(),
        sampler=dist.get_sampler(rows, shuffle=False),
    )
    groups = parameter_groups(model, 0.1, exclude=("bias", "norm"))
    return Trainer(
        model=model,
        optimizers=torch.optim.AdamW(groups, lr=lr),
        algorithms=list(algorithms),
        train_dataloader=DataSpec(loader),
        max_duration=max_duration,
        device="cpu",
        precision="fp32",
        device_train_microbatch_size=microbatch_size,
        progress_bar=False,
        log_to_console=False,
        **arguments,
    )


class Losses(Callback):
    """Keeps the loss of each batch and the shapes of its micro-batches."""

    def __init__(self) -> None:
        self.of_batches: list[float] = []
        self.shapes: list[tuple[int, ...]] = []

    def before_forward(self, state: State, logger: Logger) -> None:
        self.shapes.append(tuple(state.batch["input_ids"].shape))

    def batch_end(self, state: State, logger: Logger) -> None:
        (loss,) = (v for k, v in state.total_loss_dict.items() if k == "loss/train/total")
        self.of_batches.append(loss)


def train(
    model: GPT2Model, algorithms: Sequence[Algorithm] = (), **arguments: Any
) -> tuple[Trainer, Losses]:
    """Trains to the end; the Trainer and what it saw."""
    losses = Losses()
    run = trainer(model, algorithms, callbacks=[losses], **arguments)
    run.fit()
    run.close()
    return run, losses


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters by name, without the names of wrappers."""
    model = getattr(model, "module", model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}
