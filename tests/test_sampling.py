"""The distributions against Hugging Face's, and against the formulas written naively."""

from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

from composer_gpt2.generation import sampling as sampling_module
from composer_gpt2.generation.sampling import (
    Sampling,
    draw,
    keep_nucleus,
    keep_top_k,
    keep_typical,
    restrict,
)


@pytest.fixture(params=[8, 1024])
def logits(request, monkeypatch) -> torch.Tensor:
    """Peaked and flat rows; sorted at once, and in several goes."""
    monkeypatch.setattr(sampling_module, "_FIRST_SORTED", request.param)
    spread = torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0])[:, None]
    return torch.randn(5, 2000) * spread


@pytest.mark.parametrize("k", [1, 2, 50, 5000])
def test_top_k_is_hugging_faces(logits, k):
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(torch.empty(0), logits.clone()))


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_nucleus_is_hugging_faces(logits, p):
    expected = TopPLogitsWarper(p)(torch.empty(0), logits[1:].clone())  # of ties it keeps some
    assert torch.equal(keep_nucleus(logits[1:], p), expected)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.9, 0.99])
def test_typical_is_hugging_faces(logits, p):
    expected = TypicalLogitsWarper(p)(torch.empty(0), logits[1:].clone())
    assert torch.equal(keep_typical(logits[1:], p), expected)


def test_nucleus_by_hand():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    kept = [0.1, 0.5, 0.6, 0.8, 0.81, 0.95, 1.0]
    counts = [int(keep_nucleus(logits, p).isfinite().sum()) for p in kept]
    assert counts == [1, 1, 2, 2, 3, 3, 4]  # 0.8 = 0.5 + 0.3 is reached with two
    assert keep_nucleus(logits, 0.6).isfinite().tolist() == [[False, True, False, True]]


def test_typical_sampling_can_leave_out_the_likeliest_token():
    # Entropy 2.15 nats, surprises 0.51 and 4.61: the likely token is nearer.
    probabilities = torch.tensor([[0.6] + 40 * [0.01]])
    kept = keep_typical(probabilities.log(), 0.3).isfinite()[0]
    assert kept.tolist() == [True] + 40 * [False]
    # Entropy 2.05, surprises 0.92 and 2.81: the rare ones are nearer.
    probabilities = torch.tensor([[0.4] + 10 * [0.06]])
    kept = keep_typical(probabilities.log(), 0.3).isfinite()[0]
    assert kept.tolist() == [False] + 10 * [True]


def test_everything_is_kept_by_neutral_settings(logits):
    assert torch.equal(restrict(logits, Sampling()), logits)
    everything = restrict(logits, Sampling(1.0, top_k=2000, top_p=1.0, typical_p=1.0))
    # Sums of 2,000 float32 reach 1 early by rounding: a tail of 1e-6 may be cut.
    lost = logits.softmax(-1).masked_fill(everything.isfinite(), 0).sum(-1)
    assert lost.max() < 1e-5


def test_each_step_acts_on_what_the_one_before_has_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the first two, 0.4 / 0.7 = 0.57 reaches 0.5; of all, 0.4 would not.
    assert restrict(logits, Sampling(top_k=2, top_p=0.5)).isfinite().sum() == 1
    assert restrict(logits, Sampling(top_p=0.5)).isfinite().sum() == 2
    assert torch.allclose(restrict(logits, Sampling(temperature=2.0)), logits / 2)


def test_draws_have_the_probabilities():
    probabilities = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # evenly: frequencies are exact
    drawn = draw(probabilities.log().expand(n, -1), uniform)
    assert torch.allclose(drawn.bincount(minlength=6) / n, probabilities, atol=2 / n)


def test_the_ends_of_the_unit_interval_draw_what_is_possible():
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 3:990] = 0.0
    ends = [0.0, 1 - 2.0**-53]
    drawn = [int(draw(logits, torch.tensor([u], dtype=torch.float64))) for u in ends]
    assert drawn == [3, 989]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0, "typical_p": 1.5}, "top_p .* got 0.0; typical_p .* got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
