from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

from composer_gpt2 import scaling
from composer_gpt2.configs import get_config


@pytest.mark.parametrize(
    ("name", "loss", "perplexity"),
    [  # the model card's published column is 32.54, 27.84, 24.64
        ("gpt2-52m", 3.482618529842513, 32.54),
        ("gpt2-83m", 3.32654107284093, 27.84),
        ("gpt2-125m", 3.2042232768969785, 24.64),
    ],
)
def test_predicted_loss_is_the_published_one(name, loss, perplexity):
    assert scaling.predicted_loss(name) == pytest.approx(loss, rel=1e-12)
    assert round(scaling.predicted_perplexity(name), 2) == perplexity
    assert scaling.predicted_loss(get_config(name)) == scaling.predicted_loss(name)


def test_recipes_of_2022_train_for_the_compute_optimal_tokens():
    # 512 x 1024 tokens a batch for 9,000, 11,000 and 14,000 batches: Kaplan's figure within 5%.
    for name, n_batches in {"gpt2-52m": 9_000, "gpt2-83m": 11_000, "gpt2-125m": 14_000}.items():
        trained = n_batches * 512 * 1024
        assert math.isclose(scaling.compute_optimal_tokens(name), trained, rel_tol=0.05)


def test_flops_are_those_that_pytorch_counts():
    config = get_config("gpt2-tiny", attn_implementation="eager")
    T = 64
    with torch.device("meta"):
        module = GPT2LMHeadModel(config)
        tokens = torch.zeros(1, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        module(tokens, use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == scaling.flops_per_token(config, T) * T


def test_parameter_count_follows_the_configuration():
    config = get_config("gpt2-tiny", n_inner=200, tie_word_embeddings=False)
    module = GPT2LMHeadModel(config)
    assert scaling.parameter_count(config) == sum(p.numel() for p in module.parameters())
