"""Everything that trains the same GPT-2 on the same batch, one step at a time.

All contestants of a process share one copy of the weights and of AdamW's moments: gpt2-125m under
ten of them fits where ten copies would not. Each has its own modules, its own optimizer and its own
gradients, which it drops after each step. Steps cost the same whatever the weights are.

Modules of Composer and Hugging Face's Trainer are imported by those who use them: the time to the
first step is measured with the imports in it.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import GPT2Config, GPT2LMHeadModel

from composer_gpt2.bench.settings import Settings
from composer_gpt2.configs import get_config

__all__ = [
    "LEARNING_RATE",
    "Contestant",
    "Loop",
    "PlainLoop",
    "SharedNetwork",
    "build_loop",
    "contestants",
    "hugging_face_loop",
    "network_config",
    "our_loop",
]

LEARNING_RATE = 1e-6  # so that hundreds of steps on one batch leave numbers as they are

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to train."""

    key: str
    label: str
    process: Literal["peers", "ours"]
    """Ours runs with reused memory, which is a setting of the whole process."""
    kind: Literal["hugging_face", "composer", "hugging_face_trainer", "loop", "trainer"]
    autocast: bool = True
    line: int = -1
    """Of the waterfall; -1: no algorithms."""


def contestants(settings: Settings) -> tuple[list[Contestant], dict[str, str]]:
    """Who takes part, in the order of the report, and who cannot, with the reason."""
    peers = [
        Contestant("hf_fp32", "Hugging Face, plain loop, fp32", "peers", "hugging_face", False),
        Contestant("hf_bf16", "Hugging Face, plain loop, bf16 autocast", "peers", "hugging_face"),
        Contestant(
            "composer",
            "Hugging Face in stock Composer's Trainer, bf16 autocast",
            "peers",
            "composer",
        ),
        Contestant(
            "hf_trainer", "Hugging Face in its own Trainer, bf16", "peers", "hugging_face_trainer"
        ),
        Contestant("default_memory", "GPT2Model, plain loop, glibc's memory", "peers", "loop"),
    ]
    missing = {}
    if find_spec("accelerate") is None:
        label = peers.pop(3).label
        missing[label] = "it needs the package accelerate, which is not installed"
    ours = [Contestant("start", "GPT2Model, plain loop, memory reused", "ours", "loop")]
    ours += [
        Contestant(f"line_{number}", f"+ {line.label}", "ours", "loop", line=number)
        for number, line in enumerate(settings.lines)
    ]
    last = len(settings.lines) - 1
    ours.append(Contestant("trainer", "all, in our Trainer", "ours", "trainer", line=last))
    return ([*peers, *ours], missing) if settings.peers else (ours, {})


class Loop(Protocol):
    """A contestant that is ready to run."""

    extra_batches: int
    """Batches beyond the measured ones that a call of :meth:`steps` trains."""
    first_batch_end: float | None
    """When its first batch was done, by ``time.monotonic()``."""

    def steps(self, n: int) -> list[float]:
        """Trains; the seconds of each of ``n`` steps, all that a loop does for a batch included."""
        ...


class SharedNetwork:
    """A freshly initialised GPT-2, and further modules with the very same weights."""

    def __init__(self, config: GPT2Config, seed: int = 17) -> None:
        torch.manual_seed(seed)
        self._module = GPT2LMHeadModel(config)
        self._module.loss_type = "ForCausalLM"  # the class name does not tell transformers
        self._moments: dict[int, dict[str, Tensor]] = {}

    def module(self) -> GPT2LMHeadModel:
        """Another network whose parameters lie where those of all others lie."""
        shared = {id(p): nn.Parameter(p.data) for p in self._module.parameters()}
        return copy.deepcopy(self._module, shared).train()

    def separate_module(self) -> GPT2LMHeadModel:
        """A network with weights of its own, equal to the first ones."""
        return copy.deepcopy(self._module).train()

    def share_moments(self, optimizer: Optimizer) -> None:
        """Lets AdamW keep what it remembers of shared parameters where the others keep it."""
        if type(optimizer) is not AdamW:
            return
        addresses = {p.data_ptr() for p in self._module.parameters()}
        for parameter in itertools.chain(*(g["params"] for g in optimizer.param_groups)):
            address = parameter.data_ptr()
            if address in addresses and not optimizer.state[parameter]:
                moments = self._moments.setdefault(
                    address,
                    {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    },
                )
                optimizer.state[parameter].update(moments)


class PlainLoop:
    """Forward, backward, clipping, optimizer, and nothing else."""

    extra_batches = 0

    def __init__(
        self,
        loss: Callable[[Batch], Tensor],
        parameters: list[nn.Parameter],
        optimizer: Optimizer,
        clip_norm: float | None,
        batch: Batch | None = None,
    ) -> None:
        self._loss, self._parameters, self.optimizer = loss, parameters, optimizer
        self._clip_norm, self._batch = clip_norm, batch
        self.first_batch_end: float | None = None
        self.first_loss: float | None = None

    def step(self, batch: Batch) -> float:
        """Trains on a batch; its loss before."""
        loss = self._loss(batch)
        loss.backward()
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def steps(self, n: int) -> list[float]:
        """As in :class:`Loop`."""
        assert self._batch is not None
        seconds = []
        for _ in range(n):
            start = time.perf_counter()
            loss = self.step(self._batch)
            seconds.append(time.perf_counter() - start)
            if self.first_batch_end is None:
                self.first_batch_end, self.first_loss = time.monotonic(), loss
        return seconds


def build_loop(
    contestant: Contestant, settings: Settings, network: SharedNetwork, tokens: Tensor
) -> Loop:
    """A contestant, ready to run.

    Args:
        contestant: One of :func:`contestants`.
        settings: Of the benchmark.
        network: Whose weights it trains.
        tokens: The batch, shape ``(B, T)``.
    """
    batch = {"input_ids": tokens, "labels": tokens}
    if contestant.kind == "hugging_face":
        loop = hugging_face_loop(settings, network.module(), autocast=contestant.autocast)
    elif contestant.kind == "composer":
        return _stock_composer_loop(settings, network, batch)
    elif contestant.kind == "hugging_face_trainer":
        return _HuggingFaceTrainerLoop(settings, network, batch)
    elif contestant.kind == "trainer":
        return _our_trainer_loop(settings, network, batch, _algorithms(settings, contestant.line))
    else:
        algorithms = _algorithms(settings, contestant.line)
        loop = our_loop(settings, network.module(), algorithms)
    network.share_moments(loop.optimizer)
    loop._batch = batch
    return loop


def hugging_face_loop(
    settings: Settings,
    module: GPT2LMHeadModel,
    *,
    autocast: bool,
    learning_rate: float = LEARNING_RATE,
) -> PlainLoop:
    """Hugging Face's network as one trains it by hand."""

    def loss(batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module(**batch, use_cache=False).loss  # no cache: the faster choice

    optimizer = _peer_optimizer(settings, module, learning_rate)
    return PlainLoop(loss, list(module.parameters()), optimizer, settings.clip_norm)


def our_loop(
    settings: Settings,
    module: GPT2LMHeadModel,
    algorithms: Mapping[str, Mapping[str, Any]],
    learning_rate: float = LEARNING_RATE,
) -> PlainLoop:
    """Our model with some algorithms and the recipe's optimizer, without a Trainer."""
    from composer import Event, Logger, State
    from composer.devices import DeviceCPU

    from composer_gpt2.model import GPT2Model

    model = GPT2Model(module, tokenizer_name=None, cpu_precision="amp_bf16").train()
    optimizer = _our_optimizer(settings, model, learning_rate)
    chosen = _build_all("algorithms", algorithms)
    state = State(
        model,
        rank_zero_seed=0,
        run_name="bench",
        device=DeviceCPU(),
        optimizers=optimizer,
        algorithms=chosen,
    )
    for algorithm in chosen[:1]:  # which installs them all, as in a Trainer
        algorithm.apply(Event.INIT, state, Logger(state))
    return PlainLoop(
        lambda batch: model.loss(model(batch), batch),
        list(model.parameters()),
        optimizer,
        settings.clip_norm,
    )


def network_config(settings: Settings) -> GPT2Config:
    """The network's configuration, the same for all."""
    return get_config(settings.model, **settings.config_overrides)


# --- Trainers ----------------------------------------------------------------------------------


class _ComposerLoop:
    """A ``composer.Trainer``; a step is the time from one ``BATCH_START`` to the next."""

    extra_batches = 1

    def __init__(self, network: SharedNetwork, batch: Batch, **arguments: Any) -> None:
        from composer import Callback, Trainer

        times: list[float] = []

        class Clock(Callback):
            def batch_start(self, state: Any, logger: Any) -> None:
                times.append(time.perf_counter())

        class Repeat:
            def __iter__(self) -> Iterator[dict[str, Tensor]]:
                return itertools.repeat(dict(batch))

        self._times = times
        self.first_batch_end: float | None = None
        self._trainer = Trainer(
            train_dataloader=Repeat(),
            max_duration="0ba",
            device="cpu",
            precision="fp32",
            progress_bar=False,
            log_to_console=False,
            spin_dataloaders=False,
            device_train_microbatch_size=len(batch["input_ids"]),
            **{**arguments, "callbacks": [Clock(), *arguments.get("callbacks", [])]},
        )
        network.share_moments(self._trainer.state.optimizers[0])

    def steps(self, n: int) -> list[float]:
        self._times.clear()
        self._trainer.fit(duration=f"{n + self.extra_batches}ba")
        self._trainer.state.optimizers[0].zero_grad(set_to_none=True)
        if self.first_batch_end is None:
            self.first_batch_end = self._times[1] - time.perf_counter() + time.monotonic()
        return [after - before for before, after in itertools.pairwise(self._times)]


def _stock_composer_loop(settings: Settings, network: SharedNetwork, batch: Batch) -> _ComposerLoop:
    from composer.algorithms import GradientClipping
    from composer.models import HuggingFaceModel
    from composer.optim import ConstantScheduler

    class UnderAutocast(HuggingFaceModel):
        """Composer refuses ``amp_bf16`` on CPUs."""

        def forward(self, batch: Batch) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(batch)

    module = network.module()
    module.config.use_cache = False
    clip = settings.clip_norm
    return _ComposerLoop(
        network,
        batch,
        model=UnderAutocast(module, shift_labels=True),
        optimizers=_peer_optimizer(settings, module, LEARNING_RATE),
        schedulers=ConstantScheduler(),
        algorithms=[] if clip is None else [GradientClipping("norm", clip)],
    )


def _our_trainer_loop(
    settings: Settings,
    network: SharedNetwork,
    batch: Batch,
    algorithms: Mapping[str, Mapping[str, Any]],
) -> _ComposerLoop:
    from composer.algorithms import GradientClipping
    from composer.optim import ConstantScheduler

    from composer_gpt2.memory import ReturnUnusedMemory
    from composer_gpt2.model import GPT2Model
    from composer_gpt2.progress import ProgressLines

    model = GPT2Model(network.module(), cpu_precision="amp_bf16")
    chosen = _build_all("algorithms", algorithms)
    if settings.clip_norm is not None:
        chosen.append(GradientClipping("norm", settings.clip_norm))
    callbacks = _build_all("callbacks", settings.recipe["callbacks"])
    return _ComposerLoop(
        network,
        batch,
        model=model,
        optimizers=_our_optimizer(settings, model, LEARNING_RATE),
        schedulers=ConstantScheduler(),  # a recipe's may refuse so short a run, and cost the same
        algorithms=chosen,
        callbacks=[
            ProgressLines(settings.recipe["log_interval"]),
            ReturnUnusedMemory(),
            *callbacks,
        ],
    )


class _HuggingFaceTrainerLoop:
    """A ``transformers.Trainer``; a step is the time from one ``on_step_begin`` to the next."""

    extra_batches = 1

    def __init__(self, settings: Settings, network: SharedNetwork, batch: Batch) -> None:
        self._settings, self._network, self._batch = settings, network, batch
        self.first_batch_end: float | None = None

    def steps(self, n: int) -> list[float]:
        """Each call builds a new Trainer: it wraps the forward pass once more at each ``train``."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        times: list[float] = []

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                times.append(time.perf_counter())

        module = self._network.module()
        module.config.use_cache = False
        optimizer = _peer_optimizer(self._settings, module, LEARNING_RATE)
        self._network.share_moments(optimizer)
        n_batches, tokens = n + self.extra_batches, self._batch["input_ids"]
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=module,
                args=TrainingArguments(
                    output_dir=folder,
                    per_device_train_batch_size=len(tokens),
                    max_steps=n_batches,
                    bf16=True,
                    use_cpu=True,
                    max_grad_norm=self._settings.clip_norm or 0.0,
                    dataloader_pin_memory=False,
                    disable_tqdm=True,
                    logging_strategy="no",
                    save_strategy="no",
                    report_to="none",
                ),
                train_dataset=[  # type: ignore[reportArgumentType]  # a list is a dataset
                    {"input_ids": row, "labels": row} for row in tokens.repeat(n_batches, 1)
                ],
                optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
                callbacks=[Clock()],
            )
            trainer.train()
        optimizer.zero_grad(set_to_none=True)
        if self.first_batch_end is None:
            self.first_batch_end = times[1] - time.perf_counter() + time.monotonic()
        return [after - before for before, after in itertools.pairwise(times)]


# --- Parts -------------------------------------------------------------------------------------


def _peer_optimizer(settings: Settings, module: nn.Module, learning_rate: float) -> Optimizer:
    """AdamW of torch with the recipe's numbers, over one group."""
    ((_, arguments),) = settings.recipe["optimizer"].items()
    shared = {k: arguments[k] for k in ("betas", "eps", "weight_decay") if k in arguments}
    fused = True if settings.peer_adamw == "fused" else None
    return AdamW(module.parameters(), lr=learning_rate, fused=fused, **shared)


def _our_optimizer(settings: Settings, model: nn.Module, learning_rate: float) -> Optimizer:
    """The recipe's optimizer, as in a run."""
    from composer_gpt2.build import build_optimizer
    from composer_gpt2.recipe import Recipe

    optimizer = build_optimizer(Recipe.model_validate(dict(settings.recipe)), model)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return optimizer


def _algorithms(settings: Settings, line: int) -> Mapping[str, Mapping[str, Any]]:
    return settings.lines[line].algorithms if line >= 0 else {}


def _build_all(kind: Any, chosen: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    from composer_gpt2 import registry

    return [registry.get(kind, name).load()(**arguments) for name, arguments in chosen.items()]
