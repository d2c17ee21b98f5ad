"""Evaluation in the course of training, as a callback of a recipe."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from composer import Callback, Logger, State
from composer.callbacks import SpeedMonitor
from composer.core import Event, Precision, Time
from composer.utils import create_interval_scheduler, dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from composer_gpt2.evaluation.evaluations import (
    check_evaluations,
    evaluate,
    find_evaluations,
)
from composer_gpt2.evaluation.harness import HarnessSettings
from composer_gpt2.evaluation.likelihood import Scorer
from composer_gpt2.model import GPT2Model
from composer_gpt2.progress import ProgressLines

__all__ = ["EvaluateTasks"]

_AUTOCAST = {
    Precision.FP32: None,
    Precision.AMP_BF16: torch.bfloat16,
    Precision.AMP_FP16: torch.float16,
}


class EvaluateTasks(Callback):
    """Measures tasks and texts every so often, and logs ``metrics/TASK/METRIC``.

    Every rank computes a share. Weights, random numbers and the data's order are as without it.
    The time that it takes is not counted as training by the progress lines and the speed monitor.

    Example::

        callbacks:
          evaluate_tasks:
            tasks: [hellaswag]
            data: {hellaswag: hellaswag_val.jsonl}
            interval: 250ba

    Args:
        tasks: As ``composer-gpt2 evaluate --tasks`` takes them. Default: all that is in ``data``.
        data: Files and folders by name; our tasks that have none are read from the hub.
        interval: Time between evaluations; there is always one at the end of training.
        limit: Examples of each task.
        max_tokens: Tokens of each text.
        context_length: Tokens that the model reads at once. Default: what it was made for.
        stride: Tokens by which windows over texts move. Default: the context length.
        batch_tokens: Tokens of a forward pass. Default: 512 on a CPU, 32,768 on a GPU.
        num_fewshot: Of tasks of the lm-evaluation-harness.
        include_path: A folder with YAML files of further tasks of the harness.

    Raises:
        ValueError: A name that is no task, or data of another shape.
        FileNotFoundError: Data that is not there.

    Source: Karpathy, build-nanogpt, evaluates HellaSwag every 250 batches in this way.
    """

    def __init__(
        self,
        tasks: Sequence[str] = (),
        data: Mapping[str, str] | None = None,
        interval: str | Time = "250ba",
        limit: int | None = None,
        max_tokens: int | None = None,
        context_length: int | None = None,
        stride: int | None = None,
        batch_tokens: int | None = None,
        num_fewshot: int | None = None,
        include_path: str | None = None,
    ) -> None:
        self.evaluations = find_evaluations(
            tasks,
            data,
            limit=limit,
            max_tokens=max_tokens,
            harness=HarnessSettings(include_path, num_fewshot),
        )
        self.context_length = context_length
        self.stride = stride
        self.batch_tokens = batch_tokens
        self._is_due = create_interval_scheduler(
            interval, checkpoint_events=False, final_events={Event.BATCH_END, Event.EPOCH_END}
        )
        self._measured_at = -1  # batch

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuses what could not be measured when the time comes.

        Raises:
            ValueError: The model is no ``GPT2Model`` or is sharded, the precision has no autocast
                type, a length does not suit, or a task or text does not suit the tokenizer.
            RuntimeError: A task of the harness needs a package that is not installed.
            OSError: The data of such a task cannot be had.
        """
        with _random_numbers_kept():
            check_evaluations(self._scorer(state), self.evaluations, stride=self.stride)

    def batch_end(self, state: State, logger: Logger) -> None:  # noqa: D102 (Composer's event)
        self._measure_if_due(state, logger, Event.BATCH_END)

    def epoch_end(self, state: State, logger: Logger) -> None:  # noqa: D102
        self._measure_if_due(state, logger, Event.EPOCH_END)

    def _measure_if_due(self, state: State, logger: Logger, event: Event) -> None:
        batch = state.timestamp.batch.value
        if batch == self._measured_at or not self._is_due(state, event):
            return
        self._measured_at = batch
        began = time.monotonic()
        with _random_numbers_kept():
            found = evaluate(self._scorer(state), self.evaluations, stride=self.stride)
        logger.log_metrics({each.log_name: each.value for each in found})
        seconds = time.monotonic() - began
        for callback in state.callbacks:
            if isinstance(callback, ProgressLines):
                callback.leave_out(seconds)
            elif isinstance(callback, SpeedMonitor):
                callback.total_eval_wct += seconds
        if dist.get_global_rank() == 0:
            values = [f"{each.task} {each.metric} {each.value:.4f}" for each in found]
            at = f"tasks at batch {batch}"
            tqdm.write(" | ".join([at, *values, f"{seconds:.1f} s"]), file=sys.stderr)

    def _scorer(self, state: State) -> Scorer:
        model = state.model
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if not isinstance(model, GPT2Model) or state.fsdp_enabled:
            raise ValueError(
                "evaluate_tasks measures a GPT2Model whose weights are whole on each rank, got "
                f"{type(model).__name__}{' sharded by FSDP' if state.fsdp_enabled else ''}; leave "
                "it out and evaluate checkpoints."
            )
        on_cpu = next(model.parameters()).device.type == "cpu"
        if not on_cpu and state.precision not in _AUTOCAST:
            raise ValueError(
                f"evaluate_tasks must run in one of {', '.join(p.value for p in _AUTOCAST)}, got "
                f"{state.precision.value}."
            )
        return Scorer(
            model,
            context_length=self.context_length or 0,
            batch_tokens=self.batch_tokens or 0,
            autocast_dtype=None if on_cpu else _AUTOCAST[state.precision],
            shared_by_ranks=True,
        )


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """The harness seeds every generator there is."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
