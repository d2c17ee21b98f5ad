"""Batched likelihoods are those of one request after the other."""

from __future__ import annotations

import random

import pytest
import torch

from composer_gpt2.algorithms import (
    apply_alibi,
    apply_fused_cross_entropy,
    apply_pad_vocabulary,
    apply_parallel_residual,
)
from composer_gpt2.evaluation.batching import Request, plan_batches
from composer_gpt2.evaluation.likelihood import Scorer
from composer_gpt2.model import GPT2Model

N_TOKENS = 500
CONTEXT = 32


def build_model(*algorithms, **settings) -> GPT2Model:
    torch.manual_seed(3)
    sizes = {"n_embd": 64, "n_positions": CONTEXT, "vocab_size": N_TOKENS}
    model = GPT2Model.from_name("gpt2-tiny", tokenizer_name=None, **sizes, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # predictions that are far from uniform
    for apply in algorithms:
        apply(model)
    return model.eval()


def one_by_one(model: GPT2Model, request: Request, context_length: int) -> tuple[float, bool]:
    tokens = [*request.context, *request.continuation][-(context_length + 1) :]
    n_scored = len(request.continuation)
    with torch.no_grad():
        logits = model({"input_ids": torch.tensor([tokens[:-1]])}).logits[0, -n_scored:].float()
    targets = torch.tensor(request.continuation)
    likelihood = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(likelihood), bool((logits.argmax(-1) == targets).all())


def greedy(model: GPT2Model, context: list[int], n: int) -> list[int]:
    tokens = list(context)
    for _ in range(n):
        with torch.no_grad():
            logits = model({"input_ids": torch.tensor([tokens])}).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(context) :]


def some_requests(model: GPT2Model) -> list[Request]:
    """Of all kinds; some are too long for the context, some are greedy."""
    generator = random.Random(5)

    def tokens(n: int) -> list[int]:
        return [generator.randrange(N_TOKENS) for _ in range(n)]

    requests = [Request(tokens(length), tokens(3)) for length in (1, 2, 9, 30, 50, 31)]
    # Groups with prefixes of several lengths: choices with common words, single tokens, equal ones,
    # a request whose inputs begin another's, and contexts that differ in their last tokens.
    for length in (17, 20, 26):
        question, ending = tokens(length), tokens(6)
        requests += [Request(question, [*ending[:n], *tokens(4)]) for n in (2, 2, 5)]
        requests += [Request(question, ending), Request(question, ending)]
    question = tokens(22)
    requests += [Request(question, [token]) for token in tokens(4)]
    question, ending = tokens(19), tokens(6)
    requests += [Request([*question, *tokens(2)], ending) for _ in range(3)]
    question = tokens(18)
    requests += [Request(question, ending), Request(question, [*ending, *tokens(7)])]
    requests += [Request(tokens(40), tokens(CONTEXT))]
    for length in (4, 19):
        context = tokens(length)
        requests.append(Request(context, greedy(model, context, 3)))
    requests.append(Request(question, greedy(model, question, 2)))
    requests.append(Request([*question, *tokens(1)], greedy(model, question, 2)))
    generator.shuffle(requests)
    return requests


ARCHITECTURES = {
    "plain": (),
    "alibi": (apply_alibi,),
    "parallel residual": (apply_parallel_residual,),
    "alibi, fused loss, padded": (apply_alibi, apply_fused_cross_entropy, apply_pad_vocabulary),
}


@pytest.mark.parametrize("algorithms", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_batched_equals_one_by_one(algorithms, batch_tokens):
    model = build_model(*algorithms)
    requests = some_requests(model)
    found = Scorer(model, batch_tokens=batch_tokens, progress=False).log_likelihoods(requests)
    assert len(found) == len(requests)
    n_greedy = 0
    for each, request in zip(found, requests, strict=True):
        likelihood, is_greedy = one_by_one(model, request, CONTEXT)
        assert each.log_likelihood == pytest.approx(likelihood, abs=1e-4)
        assert each.is_greedy is is_greedy
        n_greedy += is_greedy
    assert n_greedy >= 3


def test_bfloat16_is_near():
    model = build_model()
    requests = some_requests(model)
    exact = Scorer(model, progress=False).log_likelihoods(requests)
    model.cpu_precision = "amp_bf16"
    scorer = Scorer(model, progress=False)
    assert scorer.autocast_dtype is torch.bfloat16
    rounded = scorer.log_likelihoods(requests)
    errors = [
        abs(a.log_likelihood - b.log_likelihood) / len(request.continuation)
        for a, b, request in zip(exact, rounded, requests, strict=True)
    ]
    assert 0 < max(errors) < 0.3  # a token; predictions are sharp, and bfloat16 has eight bits


def test_of_equal_logits_the_first_is_the_likeliest():
    """As argmax has it. bfloat16 makes logits equal; here two tokens have the same embedding."""
    model = build_model()
    embedding = model.model.transformer.wte.weight
    with torch.no_grad():
        embedding[7:9] = 9 * embedding[7]  # one of them or both are the likeliest somewhere
    requests = [Request([token], [twin]) for token in range(N_TOKENS) for twin in (7, 8)]
    model.cpu_precision = "amp_bf16"
    found = Scorer(model, progress=False).log_likelihoods(requests)
    firsts, seconds = found[::2], found[1::2]
    assert any(first.is_greedy for first in firsts)
    assert not any(second.is_greedy for second in seconds)


def test_alibi_reads_beyond_the_length_it_was_made_for():
    model = build_model(apply_alibi)
    generator = random.Random(2)
    context = [generator.randrange(N_TOKENS) for _ in range(70)]
    requests = [Request(context, [generator.randrange(N_TOKENS) for _ in range(5)])] * 2
    (found, _) = Scorer(model, context_length=80, progress=False).log_likelihoods(requests)
    assert found.log_likelihood == pytest.approx(one_by_one(model, requests[0], 80)[0], abs=1e-4)
    cut = Scorer(model, progress=False).log_likelihoods(requests)[0]
    assert cut.log_likelihood == pytest.approx(one_by_one(model, requests[0], CONTEXT)[0], abs=1e-4)
    with pytest.raises(ValueError, match="at most the model's 32 learned positions, got 80"):
        Scorer(build_model(), context_length=80)


def test_the_model_is_left_as_it_was():
    model = build_model(dropout=0.5).train()
    state = torch.get_rng_state()
    requests = [Request([1, 2], [3])]
    scorer = Scorer(model, progress=False)
    assert scorer.log_likelihoods(requests) == scorer.log_likelihoods(requests)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_choices_share_their_question_and_their_common_words():
    question = list(range(100, 140))
    requests = [Request(question, [1, 2, 3, token, 9, 8]) for token in (4, 5, 6, 7)]
    (batch,) = plan_batches(requests, context_length=1000, batch_tokens=1000)
    assert [len(prefix) for prefix in batch.prefixes] == [43]
    assert batch.n_tokens == 43 + 4 * 2
    alone = plan_batches(requests[:1], context_length=1000, batch_tokens=1000)
    assert [each.n_tokens for each in alone] == [45]


def test_batches_keep_to_their_size():
    generator = random.Random(1)
    requests = [
        Request([generator.randrange(9) for _ in range(generator.randint(1, 60))], [1, 2])
        for _ in range(200)
    ]
    batches = plan_batches(requests, context_length=1000, batch_tokens=128)
    numbers = sorted(row.request for batch in batches for row in batch.rows)
    assert numbers == list(range(200))
    for batch in batches:
        for step in [*batch.prefix_steps, *([row.inputs for row in rows] for rows in batch.steps)]:
            lengths = [len(each) for each in step]
            assert len(lengths) * max(lengths, default=0) <= 128


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [1]), "at least one token of context"),
        (Request([1], []), "one of continuation"),
        (Request([1], [1] * 33), "must fit the context of 32 tokens, got 33"),
    ],
)
def test_requests_that_cannot_be_scored(request_, message):
    with pytest.raises(ValueError, match=message):
        Scorer(build_model(), progress=False).log_likelihoods([Request([1], [2]), request_])
