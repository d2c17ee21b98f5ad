"""Tasks with one right answer: the model writes it, token by token, and is right or wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from composer_gpt2.model import GPT2Model
from composer_gpt2.text_codec import text_codec

__all__ = ["ExactAnswers", "check_answers"]

_SHOWN = 5


@dataclass(frozen=True)
class ExactAnswers:
    """What came of a test."""

    n_right: int
    n_problems: int
    mistakes: tuple[str, ...]
    """The first few: problem, answer, right answer."""

    @property
    def accuracy(self) -> float:
        """Share of the answers that are right in every token."""
        return self.n_right / self.n_problems

    def __str__(self) -> str:
        """The share, and some mistakes."""
        lines = [f"{self.n_right} of {self.n_problems} right ({self.accuracy:.1%})", *self.mistakes]
        return "\n".join(lines)


def check_answers(
    model: GPT2Model, problems: Tensor, n_given: int, *, batch_size: int = 1024
) -> ExactAnswers:
    """Has a model complete problems with its likeliest tokens.

    Args:
        model: On any device.
        problems: With their answers, int64, shape ``(N, T)``.
        n_given: Tokens at the beginning that are the question.
        batch_size: Problems at once.

    Raises:
        ValueError: The model does not know a token of the problems.
    """
    n_known = model.model.config.vocab_size
    if int(problems.max()) >= n_known:
        raise ValueError(
            f"tokens of the problems must be below the model's {n_known}, got "
            f"{int(problems.max())}: it was trained on something else."
        )
    device = next(model.parameters()).device
    decode = text_codec(model).decode
    n_right, mistakes = 0, []
    was_training = model.training
    model.eval()
    for batch in problems.split(batch_size):
        ids = batch[:, :n_given].to(device)
        with torch.inference_mode():
            for _ in range(problems.shape[1] - n_given):
                logits = model({"input_ids": ids}).logits
                assert logits is not None
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        right = (ids.cpu() == batch).all(dim=1)
        n_right += int(right.sum())
        mistakes += [
            f"{decode(wanted[:n_given].tolist())} -> {decode(got[n_given:].tolist())}, "
            f"not {decode(wanted[n_given:].tolist())}"
            for wanted, got in zip(batch[~right][:_SHOWN], ids.cpu()[~right][:_SHOWN], strict=True)
        ]
    model.train(was_training)
    return ExactAnswers(n_right, len(problems), tuple(mistakes[:_SHOWN]))
