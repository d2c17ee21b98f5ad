"""Texts of a model while it trains, into the log."""

from __future__ import annotations

import sys

import torch
from composer import Callback, Logger, State
from composer.core import Event
from composer.loggers import TensorboardLogger
from composer.utils import create_interval_scheduler, dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from composer_gpt2.generation.sampling import Sampling
from composer_gpt2.generation.text_generator import DivergedModelError, TextGenerator
from composer_gpt2.model import GPT2Model

__all__ = ["GenerateSamples"]


class GenerateSamples(Callback):
    """Writes texts every so often, on rank 0: to stderr, and a table to all loggers.

    The same random numbers are used each time, so that texts change with the model alone. Training
    is not touched: a run ends with the same weights to the bit. Other ranks wait at their next
    batch; keep it shorter than ``dist_timeout``.

    Args:
        prompts: What texts begin with; an empty one begins a document.
        interval: Time between texts, such as ``500ba``; the end of the run always has some.
        max_new_tokens: Of each text.
        n_samples: Texts for each prompt.
        temperature: As in :class:`~composer_gpt2.generation.sampling.Sampling`.
        top_k: As ``temperature``.
        top_p: As ``temperature``.
        typical_p: As ``temperature``.
        seed: Of the random numbers.

    Raises:
        ValueError: A number is out of range, or there is no prompt.
    """

    def __init__(
        self,
        prompts: list[str],
        interval: str = "500ba",
        max_new_tokens: int = 64,
        n_samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        typical_p: float | None = None,
        seed: int = 17,
    ) -> None:
        if not prompts or isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}.")
        self.prompts = list(prompts)
        self.settings = {
            "n_samples": n_samples,
            "max_new_tokens": max_new_tokens,
            "sampling": Sampling(temperature, top_k, top_p, typical_p),
            "seed": seed,
        }
        self._is_due = create_interval_scheduler(
            interval, checkpoint_events=False, final_events={Event.BATCH_END, Event.EPOCH_END}
        )
        self._written_at = -1  # batch

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuses prompts that do not fit, before a batch is trained."""
        TextGenerator(_unwrapped(state)).stream(self.prompts, **self.settings)

    def batch_end(self, state: State, logger: Logger) -> None:  # noqa: D102 (Composer's event)
        self._write_if_due(state, logger, Event.BATCH_END)

    def epoch_end(self, state: State, logger: Logger) -> None:  # noqa: D102
        self._write_if_due(state, logger, Event.EPOCH_END)

    def _write_if_due(self, state: State, logger: Logger, event: Event) -> None:
        batch = state.timestamp.batch.value
        if batch == self._written_at or not self._is_due(state, event):
            return
        self._written_at = batch
        if dist.get_global_rank() == 0:
            self._write(state, logger, batch)

    def _write(self, state: State, logger: Logger, batch: int) -> None:
        try:
            # The network inside: DDP's own forward pass would wait for the other ranks.
            samples = TextGenerator(_unwrapped(state)).generate(self.prompts, **self.settings)
        except DivergedModelError as error:  # whether that ends a run is not decided here
            tqdm.write(f"no samples at batch {batch}: {error}", file=sys.stderr)
            return
        rows = [[sample.prompt, sample.text] for sample in samples]
        for prompt, text in rows:
            tqdm.write(f"sample at batch {batch} | {prompt}{text}", file=sys.stderr)
        logger.log_table(["prompt", "text"], rows, name="samples", step=batch)
        for destination in logger.destinations:
            # TensorBoard has no tables in Composer; text is Markdown there.
            if isinstance(destination, TensorboardLogger) and destination.writer is not None:
                blocks = [_markdown(prompt + text) for prompt, text in rows]
                destination.writer.add_text("samples", "\n\n---\n\n".join(blocks), batch)


def _unwrapped(state: State) -> GPT2Model:
    model: torch.nn.Module = state.model
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if not isinstance(model, GPT2Model):
        raise ValueError(
            f"generate_samples must have a GPT2Model to write with, got {type(model).__name__}."
        )
    return model


def _markdown(text: str) -> str:
    """Text as it is, indented as Markdown wants code to be."""
    return "\n".join(f"    {line}" for line in text.splitlines())
