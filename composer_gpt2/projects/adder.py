"""The adder: a model that learns to add numbers from examples, digit by digit.

A problem is its digits in a row: those of both numbers, then those of the sum, the last one first,
for that is the order in which a sum can be carried: 85 + 50 = 135 is ``8550531``. Only the sum is a
target. Source: minGPT's project ``adder``; the idea is in Brown et al., 2020, section 3.9.1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from composer_gpt2.data.array_corpus import write_array_corpus
from composer_gpt2.model import GPT2Model
from composer_gpt2.projects.exact_answers import ExactAnswers, check_answers
from composer_gpt2.small_tokenizers import character_tokenizer

__all__ = ["N_DIGITS", "adder_problems", "check_adder", "write_adder"]

N_DIGITS = 2
_N_TEST = 500  # as minGPT: of 10,000 problems


def adder_problems(n_digits: int = N_DIGITS, *, seed: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """All additions of two numbers, in two parts that share none.

    Args:
        n_digits: Of each number, at most 3 (a million problems).
        seed: Of the division into parts.

    Returns:
        Problems to train on and to test with, digits, shape ``(N, 3 * n_digits + 1)``.

    Raises:
        ValueError: ``n_digits`` is not from 1 to 3.
    """
    if not 1 <= n_digits <= 3:
        raise ValueError(f"n_digits must be from 1 to 3, got {n_digits}.")
    order = np.random.default_rng(seed).permutation(10 ** (2 * n_digits))
    first, second = np.divmod(order, 10**n_digits)
    powers = 10 ** np.arange(n_digits + 1)  # of the last digit first
    total = (first + second)[:, None] // powers % 10
    numbers = [number[:, None] // powers[:n_digits][::-1] % 10 for number in (first, second)]
    problems = np.concatenate([*numbers, total], axis=1)
    n_test = min(_N_TEST, len(problems) // 5)
    return problems[n_test:], problems[:n_test]


def write_adder(out: str | Path, n_digits: int = N_DIGITS) -> None:
    """Writes the corpus of the adder; what is tested is its validation split.

    Raises:
        ValueError: As :func:`adder_problems`.
        FileExistsError: ``out`` holds something else.
    """
    train, test = adder_problems(n_digits)
    splits = {"train": train, "validation": test}
    is_target = np.arange(train.shape[1]) >= 2 * n_digits
    write_array_corpus(
        out,
        splits,
        tokenizer=character_tokenizer("0123456789"),
        loss_masks={name: np.broadcast_to(is_target, s.shape) for name, s in splits.items()},
        source=f"all additions of two numbers of {n_digits} digits",
    )


def check_adder(model: GPT2Model, n_digits: int = N_DIGITS) -> ExactAnswers:
    """How many sums of problems it was not trained on are right to the last digit."""
    _, test = adder_problems(n_digits)
    return check_answers(model, torch.from_numpy(test), n_given=2 * n_digits)
