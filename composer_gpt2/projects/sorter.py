"""The sorter: a model that learns to sort digits from examples.

Six digits from 0 to 2, then the same digits in order: ``201102`` gives ``001122``. Only the sorted
ones are targets. Source: minGPT's notebook ``demo``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from composer_gpt2.data.array_corpus import write_array_corpus
from composer_gpt2.model import GPT2Model
from composer_gpt2.projects.exact_answers import ExactAnswers, check_answers
from composer_gpt2.small_tokenizers import character_tokenizer

__all__ = ["LENGTH", "N_KINDS", "check_sorter", "sorter_problems", "write_sorter"]

LENGTH = 6  # digits
N_KINDS = 3  # of digits


def sorter_problems(
    length: int = LENGTH, n_kinds: int = N_KINDS, *, seed: int = 17
) -> tuple[np.ndarray, np.ndarray]:
    """All rows of digits with the sorted ones behind, in two parts that share none.

    Args:
        length: Digits to sort.
        n_kinds: How many different ones there are.
        seed: Of the division into parts.

    Returns:
        Three quarters to train on and one to test with, shape ``(N, 2 * length)``.

    Raises:
        ValueError: There are less than 4 problems or more than a million.
    """
    if not 4 <= n_kinds**length <= 10**6 or n_kinds > 10:
        raise ValueError(
            "n_kinds must be at most 10 and n_kinds ** length from 4 to a million, got "
            f"{n_kinds} ** {length}."
        )
    order = np.random.default_rng(seed).permutation(n_kinds**length)
    digits = order[:, None] // n_kinds ** np.arange(length) % n_kinds
    problems = np.concatenate([digits, np.sort(digits, axis=1)], axis=1)
    n_test = len(problems) // 4
    return problems[n_test:], problems[:n_test]


def write_sorter(out: str | Path, length: int = LENGTH, n_kinds: int = N_KINDS) -> None:
    """Writes the corpus of the sorter; what is tested is its validation split.

    Raises:
        ValueError: As :func:`sorter_problems`.
        FileExistsError: ``out`` holds something else.
    """
    train, test = sorter_problems(length, n_kinds)
    splits = {"train": train, "validation": test}
    is_target = np.arange(2 * length) >= length
    write_array_corpus(
        out,
        splits,
        tokenizer=character_tokenizer("0123456789"[:n_kinds]),
        loss_masks={name: np.broadcast_to(is_target, s.shape) for name, s in splits.items()},
        source=f"all rows of {length} digits below {n_kinds}",
    )


def check_sorter(model: GPT2Model, length: int = LENGTH, n_kinds: int = N_KINDS) -> ExactAnswers:
    """How many rows that it was not trained on it sorts without a mistake."""
    _, test = sorter_problems(length, n_kinds)
    return check_answers(model, torch.from_numpy(test), n_given=length)
