from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from algorithms.fused_gelu import FusedGELU, apply_fused_gelu
from composer_gpt2.contract import NoEffectError

SMALL = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 32, "vocab_size": 101}


def make_model(**settings):
    torch.manual_seed(17)
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**{**SMALL, **dropout, **settings}))
    model.loss_type = "ForCausalLM"
    return model


def activations(model):
    return [block.mlp.act for block in model.transformer.h]


def test_the_function_and_its_gradient_are_gelu_news():
    model = make_model()
    plain = activations(model)[0]
    assert isinstance(plain, NewGELUActivation)
    apply_fused_gelu(model)
    fused = activations(model)[0]
    inputs = torch.linspace(-12, 12, 20_001, requires_grad=True)
    wide = inputs.detach().double().requires_grad_()
    exact, ours, theirs = plain(wide), fused(inputs), plain(inputs)
    assert ours.shape == inputs.shape
    # float32 has steps of 1e-6 at 12.
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-7)
    (gradient,) = torch.autograd.grad(ours.sum(), inputs)
    (wide_gradient,) = torch.autograd.grad(exact.sum(), wide)
    error = (gradient - wide_gradient).abs()
    # 1 - tanh(...)**2 loses digits where it is near 0 and is then multiplied by x: from 4 on, both
    # kernels are up to 1e-6 away from float64.
    assert error[inputs.abs() < 4].max() < 5e-7
    assert error.max() < 1.5e-6


def test_every_activation_is_one_operation_and_nothing_else_changes():
    model = make_model()
    plain = copy.deepcopy(model)
    before = [(id(parameter), name) for name, parameter in model.named_parameters()]
    receipt = apply_fused_gelu(model)
    assert receipt.count == 3
    assert str(receipt).startswith("fused_gelu: fused the activation of 3 of 3 MLPs [")
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert [(id(parameter), name) for name, parameter in model.named_parameters()] == before
    hidden = torch.randn(2, 5, 128)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        activations(model)[0](hidden)
    assert [event.key for event in profile.key_averages()] == ["aten::gelu"]

    tokens = torch.randint(101, (2, 16))
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=1e-6, rtol=1e-6)
    for network in (model, plain):
        network(tokens, labels=tokens).loss.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-5)


def test_the_probe_measures_the_activation_and_disturbs_nothing():
    model = make_model()
    state = torch.random.get_rng_state()
    with torch.no_grad():
        receipt = apply_fused_gelu(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert set(receipt.probe) == {"largest error", "of the gradient"}
    assert 0 < receipt.probe["largest error"] < 1e-6  # 0 would be a comparison with itself
    assert 0 < receipt.probe["of the gradient"] < 2e-6


def test_a_saved_model_is_built_with_the_same_function(tmp_path):
    model = make_model().eval()
    apply_fused_gelu(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(activations(loaded)[0]) is type(activations(model)[0])
    tokens = torch.randint(101, (2, 16))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_nothing_to_fuse_is_an_error_with_the_reason():
    model = make_model()
    apply_fused_gelu(model)
    with pytest.raises(NoEffectError, match="'gelu_pytorch_tanh'\\): it is fused already"):
        apply_fused_gelu(model)
    with pytest.raises(NoEffectError, match="activation_function is 'relu'\\): only gelu_new"):
        apply_fused_gelu(make_model(activation_function="relu"))
    with pytest.raises(NoEffectError, match="needs a transformers GPT2LMHeadModel"):
        apply_fused_gelu(nn.Linear(2, 2))


def test_the_class_is_rebuilt_from_its_text():
    assert repr(FusedGELU()) == "FusedGELU()"
    assert FusedGELU().settings == {}


def test_a_kernel_that_is_another_function_is_refused(monkeypatch):
    from algorithms.fused_gelu import fused_gelu as fused

    monkeypatch.setattr(fused, "_FUSED", "gelu")  # the exact one differs by 1e-3
    network = make_model()
    with pytest.raises(NoEffectError, match="the same function within"):
        apply_fused_gelu(network)
    assert network.config.activation_function == "gelu_new"
