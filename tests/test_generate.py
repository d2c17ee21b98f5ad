from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from composer_gpt2.algorithms import apply_alibi
from composer_gpt2.generate import generate
from composer_gpt2.model import GPT2Model
from composer_gpt2.tokenizer import END_OF_TEXT, get_encoding


@pytest.fixture(scope="module")
def model() -> GPT2Model:
    torch.manual_seed(17)
    return GPT2Model.from_name("gpt2-tiny", n_embd=32, n_positions=64)


def test_greedy_text_is_the_likeliest_token_each_time(model):
    (text,) = generate(model, "Hello, I'm", max_new_tokens=4, temperature=0)
    ids = [END_OF_TEXT, *get_encoding().encode_ordinary("Hello, I'm")]
    model.eval()
    for _ in range(4):  # without a cache, the definition
        batch = {"input_ids": torch.tensor([ids])}
        ids.append(int(model(batch).logits[0, -1].argmax()))
    assert text == get_encoding().decode(ids[1:])


def test_samples_are_repeatable_and_different(model):
    first = generate(model, "a", max_new_tokens=8, n_samples=3, seed=1)
    assert len(set(first)) == 3
    assert generate(model, "a", max_new_tokens=8, n_samples=3, seed=1) == first
    assert generate(model, "a", max_new_tokens=8, n_samples=3, seed=2) != first
    assert all(text.startswith("a") for text in first)


def test_one_candidate_is_greedy(model):
    greedy = generate(model, "a", max_new_tokens=5, temperature=0)
    assert generate(model, "a", max_new_tokens=5, top_k=1, seed=3) == greedy


def test_sampling_leaves_no_trace(model):
    model.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    generate(model, "", max_new_tokens=3, seed=5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert model.training


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"n_samples": 0}, {"temperature": -1.0}, {"top_k": 0}]
)
def test_numbers_out_of_range_are_refused(model, wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        generate(model, "a", **wrong)


def test_a_prompt_that_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match=r"64 positions, got 61 \+ 10"):
        generate(model, " a" * 60, max_new_tokens=10)


def test_a_model_without_positions_writes_on_beyond_them():
    torch.manual_seed(17)
    model = GPT2Model.from_name("gpt2-tiny", n_embd=32, n_positions=64)
    assert model.context_length == 64
    apply_alibi(model)
    assert model.context_length is None
    (text,) = generate(model, " a" * 60, max_new_tokens=30, temperature=0)
    ids = [END_OF_TEXT, *get_encoding().encode_ordinary(" a" * 60)]
    for _ in range(30):  # without a cache, the definition
        ids.append(int(model.eval()({"input_ids": torch.tensor([ids])}).logits[0, -1].argmax()))
    assert text == get_encoding().decode(ids[1:])
