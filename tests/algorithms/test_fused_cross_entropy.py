from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from composer.metrics import LanguageCrossEntropy as ComposersCrossEntropy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from algorithms.fused_cross_entropy import (
    FusedCrossEntropy,
    apply_fused_cross_entropy,
    linear_cross_entropy,
)
from composer_gpt2.contract import NoEffectError
from composer_gpt2.model import GPT2Model

B, T, D, V = 3, 24, 32, 307
SMALL = {"n_layer": 2, "n_embd": D, "n_head": 4, "n_positions": T, "vocab_size": V}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def make_network(**settings):
    torch.manual_seed(17)
    network = GPT2LMHeadModel(GPT2Config(**{**SMALL, **NO_DROPOUT, **settings}))
    network.loss_type = "ForCausalLM"
    network.generation_config.pad_token_id = 0
    return network


def make_pair(rows=7, **settings):
    plain = make_network(**settings)
    fused = copy.deepcopy(plain)
    apply_fused_cross_entropy(fused, rows=rows)
    return plain, fused


def make_labels(tokens):
    labels = tokens.clone()
    labels[0, 3:9] = labels[2] = -100
    return labels


def make_rows(N=50, dtype=torch.float32):
    torch.manual_seed(3)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype).mul_(0.2).requires_grad_()
    labels = torch.randint(V, (N,))
    labels[4:9] = -100
    return hidden, weight, labels


def plain_loss(hidden, weight, labels, bias=None):
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


def gradients(network):
    return {name: p.grad for name, p in network.named_parameters()}


class Watched(TorchDispatchMode):
    """Remembers the most numbers that any operation inside has returned in one tensor."""

    def __init__(self):
        super().__init__()
        self.numbers = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.products += "mm" in str(function)
        sizes = [leaf.numel() for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return results


# The function.


@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_loss_and_gradients_are_the_plain_paths(rows):
    hidden, weight, labels = make_rows()
    ours = linear_cross_entropy(hidden, weight, labels, rows=rows)
    theirs = plain_loss(hidden, weight, labels)
    # Sums of 307 and 32 float32 numbers in another order: some 1e-7 of the largest.
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)
    assert ours.shape == ()
    for mine, other in zip(
        torch.autograd.grad(3 * ours, [hidden, weight]),
        torch.autograd.grad(3 * theirs, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-6 * other.abs().max().item(), rtol=1e-6)
        assert other.abs().max() > 0


def test_gradients_are_right_in_float64_also_of_a_bias():
    hidden, weight, labels = make_rows(N=9, dtype=torch.float64)
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    leaves = [hidden, weight, bias]
    mine = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, bias, rows=4), leaves)
    other = torch.autograd.grad(plain_loss(hidden, weight, labels, bias), leaves)
    for ours, theirs in zip(mine, other, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-12)


def test_many_rows_of_softmax_at_a_time():
    hidden, weight, labels = make_rows(N=200)  # more than the 64 rows that softmax takes
    ours = linear_cross_entropy(hidden, weight, labels, rows=150)
    torch.testing.assert_close(ours, plain_loss(hidden, weight, labels), atol=0, rtol=1e-6)


def test_autocast_is_as_near_to_float64_as_the_plain_path():
    hidden, weight, labels = make_rows(N=400)

    def differentiate(loss, dtype, autocast):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(*leaves, labels)
        return value.detach(), *torch.autograd.grad(value, leaves)

    def in_chunks(*args):
        return linear_cross_entropy(*args, rows=64)

    def at_once(hidden, weight, labels):  # as Hugging Face has it
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    exact = differentiate(plain_loss, torch.float64, False)
    ours = differentiate(in_chunks, torch.float32, True)
    theirs = differentiate(at_once, torch.float32, True)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.float32
        error, plain_error = (float((x - true).norm() / true.norm()) for x in (mine, other))
        # bfloat16 keeps 8 bits, 2**-9 = 0.2% of each logit; chunks add up in float32.
        assert error < 0.01
        assert error < 1.2 * plain_error + 1e-5


def test_extreme_logits_stay_finite():
    hidden, weight, labels = make_rows()
    hidden, weight = (1000 * hidden).detach().requires_grad_(), weight.detach().requires_grad_()
    ours, theirs = linear_cross_entropy(hidden, weight, labels), plain_loss(hidden, weight, labels)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)
    ours.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_what_a_bias_of_minus_infinity_excludes_has_no_part():
    hidden, weight, labels = make_rows()
    n_real = 290
    labels = labels.clamp(max=n_real - 1)
    bias = torch.zeros(V)
    bias[n_real:] = -torch.inf
    ours = linear_cross_entropy(hidden, weight, labels, bias, rows=16)
    theirs = plain_loss(hidden, weight[:n_real], labels)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)
    mine = torch.autograd.grad(ours, [hidden, weight])
    other = torch.autograd.grad(theirs, [hidden, weight])
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    assert not mine[1][n_real:].any()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear_cross_entropy(hidden, weight, labels, bias)
    assert mixed.item() == pytest.approx(theirs.item(), rel=0.01)


def test_without_a_label_that_counts_it_is_as_torch_has_it():
    hidden, weight, labels = make_rows()
    labels = torch.full_like(labels, -100)
    for loss in (linear_cross_entropy, plain_loss):
        value = loss(hidden, weight, labels)
        assert math.isnan(value.item())
        of_hidden, of_weight = torch.autograd.grad(value, [hidden, weight])
        assert not of_hidden.any()
        assert not of_weight.any()
    empty = linear_cross_entropy(hidden[:0], weight, labels[:0])
    assert math.isnan(empty.item())


def test_a_label_outside_of_the_vocabulary_is_an_error():
    hidden, weight, labels = make_rows()
    for wrong in (V, -7):
        labels[0] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, labels)


def test_gradients_that_nobody_wants_are_not_made():
    hidden, weight, labels = make_rows()
    expected = plain_loss(hidden, weight, labels).item()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Watched() as seen:
            loss = linear_cross_entropy(hidden, weight, labels, rows=8)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert not loss.requires_grad
        assert seen.products == 7  # one for each 8 of 50 rows
    frozen = weight.detach()
    with Watched() as seen:
        loss = linear_cross_entropy(hidden, frozen, labels, rows=8)
    assert seen.products == 14
    (of_hidden,) = torch.autograd.grad(loss, hidden)
    (expected,) = torch.autograd.grad(plain_loss(hidden, frozen, labels), hidden)
    torch.testing.assert_close(of_hidden, expected, atol=1e-7, rtol=1e-5)


def test_a_kept_graph_can_be_used_twice_and_not_be_differentiated_twice():
    hidden, weight, labels = make_rows()
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(2 * loss, weight)[0], 2 * first)
    squared = linear_cross_entropy(hidden, weight, labels) ** 2
    (of_weight,) = torch.autograd.grad(squared, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        of_weight.sum().backward()


# The network.


def test_training_has_the_plain_loss_and_gradients_and_no_logits():
    plain, fused = make_pair()
    tokens = torch.randint(V, (B, T))
    labels = make_labels(tokens)
    ours, theirs = fused(tokens, labels=labels), plain(tokens, labels=labels)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, theirs.loss, atol=0, rtol=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(gradients(fused)[name], expected, atol=1e-6, rtol=1e-4, msg=name)
    loss, logits, *rest = fused(tokens, labels=labels, return_dict=False)
    assert torch.equal(loss, ours.loss)
    assert logits is None
    assert len(rest) == len(plain(tokens, labels=labels, return_dict=False)) - 2


def test_no_tensor_is_as_large_as_the_logits():
    plain, fused = make_pair(rows=8, vocab_size=5003)
    tokens = torch.randint(5003, (8, T))
    n_logits = 8 * (T - 1) * 5003
    largest = {}
    for name, network in (("plain", plain), ("fused", fused)):
        for autocast in (False, True):
            with Watched() as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = network(tokens, labels=tokens).loss
            with seen:
                loss.backward()
            largest[name, autocast] = seen.numbers
    assert largest["plain", False] >= n_logits
    assert largest["plain", True] >= n_logits
    # The largest is the weight or its gradient; 8 rows of logits are less.
    assert largest["fused", False] == largest["fused", True] == 5003 * D < n_logits / 5


def test_micro_batches_add_up():
    plain, fused = make_pair()
    tokens = torch.randint(V, (4, T))
    plain(tokens, labels=tokens).loss.backward()
    for part in tokens.split(1):
        (fused(part, labels=part).loss / 4).backward()
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(gradients(fused)[name], expected, atol=1e-6, rtol=1e-4, msg=name)
    # Two losses in one graph.
    fused.zero_grad()
    sum(fused(part, labels=part).loss / 2 for part in tokens.split(2)).backward()
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(gradients(fused)[name], expected, atol=1e-6, rtol=1e-4, msg=name)
    n_items = torch.tensor(1000)
    theirs = plain(tokens, labels=tokens, num_items_in_batch=n_items).loss
    ours = fused(tokens, labels=tokens, num_items_in_batch=n_items).loss
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)


def test_evaluation_and_generation_are_unchanged():
    plain, fused = (network.eval() for network in make_pair())
    tokens = torch.randint(V, (B, 10))
    ours, theirs = fused(tokens, labels=tokens), plain(tokens, labels=tokens)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0  # left padding: needs the positions that generate finds by the signature
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(fused.generate(tokens, **options), plain.generate(tokens, **options))
    without = fused(tokens, labels=tokens, return_logits=False)
    assert without.logits is None
    torch.testing.assert_close(without.loss, theirs.loss, atol=0, rtol=1e-6)
    fused.train()
    assert torch.equal(fused(tokens).logits, plain(tokens).logits)
    assert torch.equal(fused(tokens, labels=tokens, return_logits=True).logits, theirs.logits)


def test_a_loss_argument_that_it_does_not_know_takes_hugging_faces_way():
    plain, fused = make_pair()
    tokens = torch.randint(V, (B, T))
    options = {"labels": tokens, "shift_labels": tokens.roll(-1, 1)}
    ours, theirs = fused(tokens, **options), plain(tokens, **options)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)


def test_it_is_the_same_network_to_everybody_else(tmp_path):
    plain, fused = make_pair()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert fused.lm_head.weight is fused.transformer.wte.weight
    assert f"{type(fused).__module__}.{type(fused).__name__}" == (
        "transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel"  # as Composer records it
    )
    tokens = torch.randint(V, (B, T))
    expected = fused(tokens, labels=tokens).loss
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert copied.lm_head.weight is not fused.lm_head.weight
        assert copied.lm_head.weight is copied.transformer.wte.weight
        assert torch.equal(copied(tokens, labels=tokens).loss, expected)
        assert copied(tokens, labels=tokens).logits is None
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is GPT2LMHeadModel
    assert loaded.config.architectures == ["GPT2LMHeadModel"]
    assert torch.equal(loaded(tokens).logits, plain.eval()(tokens).logits)


def test_a_subclass_of_the_network_keeps_what_it_adds():
    class Scaled(GPT2LMHeadModel):
        def forward(self, *args, **kwargs):  # pyright: ignore
            outputs = super().forward(*args, **kwargs)
            outputs.logits = 2 * outputs.logits
            return outputs

    network = make_network().eval()
    tokens = torch.randint(V, (B, T))
    expected = 2 * network(tokens).logits
    network.__class__ = Scaled
    apply_fused_cross_entropy(network)
    assert type(network).__name__ == "Scaled"
    assert torch.equal(network(tokens).logits, expected)


def test_it_compiles():
    plain, fused = make_pair()
    tokens = torch.randint(V, (B, T))
    loss = torch.compile(fused, backend="aot_eager")(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, plain(tokens, labels=tokens).loss, atol=0, rtol=1e-6)
    loss.backward()
    assert all(gradient is not None for gradient in gradients(fused).values())


# Composer.


def make_model():
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
    return GPT2Model.from_name("gpt2-tiny", dropout=0.0, **sizes)


def test_evaluation_asks_for_no_logits_where_metrics_need_none():
    model = make_model().eval()
    tokens = torch.randint(50257, (2, 16))
    batch = {"input_ids": tokens, "labels": tokens}
    expected = model.eval_forward(batch)
    assert expected.logits.shape == (2, 16, 50257)
    apply_fused_cross_entropy(model)
    outputs = model.eval_forward(batch)
    assert outputs.logits is None
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert torch.equal(model(batch).logits, expected.logits)
    metrics = model.get_metrics(is_train=False)
    for metric in metrics.values():
        model.update_metric(batch, outputs, metric)
    assert metrics["LanguageCrossEntropy"].compute().item() == pytest.approx(outputs.loss.item())

    other = ComposersCrossEntropy()
    with pytest.raises(ValueError, match=r"makes no logits, got LanguageCrossEntropy; leave the"):
        model.update_metric(batch, outputs, other)
    model.val_metrics = {**metrics, "Composer's": other}
    assert torch.equal(model.eval_forward(batch).logits, expected.logits)


# Receipts and refusals.


def test_the_probe_measures_the_models_own_head_and_disturbs_nothing():
    network = make_network()
    before = copy.deepcopy(network.state_dict())
    state = torch.random.get_rng_state()
    with torch.no_grad():
        receipt = apply_fused_cross_entropy(network)
    assert str(receipt).startswith(
        "fused_cross_entropy: fused 1 of 1 loss (307 x 32), at most 1,024 rows of logits at a time"
    )
    # 0 would be a comparison with itself.
    assert 0 < receipt.probe["of the weight's gradient"] < 1e-5
    assert 0 < receipt.probe["of the hidden states' gradient"] < 1e-5
    assert receipt.probe["relative error of the loss"] < 1e-6
    assert torch.equal(torch.random.get_rng_state(), state)
    assert network.training
    assert all(gradient is None for gradient in gradients(network).values())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_probe_that_fails_leaves_the_model_as_it_was(monkeypatch):
    network = make_network()
    module = "algorithms.fused_cross_entropy.fused_cross_entropy.linear_cross_entropy"
    monkeypatch.setattr(module, lambda *args, rows: 2 * plain_loss(*args))
    with pytest.raises(NoEffectError, match="must give the loss and the gradients of the plain"):
        apply_fused_cross_entropy(network)
    assert type(network) is GPT2LMHeadModel


def test_what_it_cannot_do_is_refused():
    class Capped(nn.Linear):
        def forward(self, hidden):  # pyright: ignore
            return 30 * torch.tanh(super().forward(hidden) / 30)

    network = make_network()
    apply_fused_cross_entropy(network)
    with pytest.raises(NoEffectError, match="changed already; apply it once"):
        apply_fused_cross_entropy(network)
    network = make_network()
    network.lm_head = Capped(D, V, bias=False)
    with pytest.raises(NoEffectError, match=r"torch\.nn\.Linear, got Capped"):
        apply_fused_cross_entropy(network)
    with pytest.raises(NoEffectError, match="needs a transformers GPT2LMHeadModel"):
        apply_fused_cross_entropy(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        FusedCrossEntropy(rows=0)
    assert repr(FusedCrossEntropy(rows=5)) == "FusedCrossEntropy(rows=5)"
