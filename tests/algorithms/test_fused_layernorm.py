"""Fused LayerNorm: values and gradients against float64, where it acts, and where it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from composer import State
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from algorithms.fused_layernorm import FusedLayerNorm, apply_fused_layernorm
from algorithms.fused_layernorm import fused_layernorm as fused
from composer_gpt2 import GPT2Model
from composer_gpt2.contract import NoEffectError, Plan

EPS = 1e-5


def network(**settings) -> GPT2LMHeadModel:
    plain = dict(n_layer=2, n_embd=32, n_head=4, n_positions=32, vocab_size=101)
    dropout = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    torch.manual_seed(17)
    model = GPT2LMHeadModel(GPT2Config(**{**plain, **dropout, **settings}))
    model.loss_type = "ForCausalLM"
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def joined(**settings) -> GPT2LMHeadModel:
    model = network(**settings)
    apply_fused_layernorm(model, cpu_precision="amp_bf16")
    return model


def tokens(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(101, (rows, length), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and all gradients under bfloat16 autocast."""
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def results(function, inputs, upstream, dtype):
    """Sum, norm and the gradients of sum, addend, weight and bias."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    if dtype is torch.float32:
        leaves[1] = inputs[1].clone().requires_grad_()  # the addend is bfloat16
    outputs = function(*leaves, EPS)
    gradients = torch.autograd.grad(
        outputs, leaves, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
    )
    return [*(output.detach() for output in outputs), *gradients]


@pytest.mark.parametrize("rows", [1, 7, 256])
def test_values_and_gradients_are_as_near_float64_as_the_plain_way(rows):
    D = 48
    # Far from zero mean, where a variance of squares would cancel.
    inputs = [3 + 2 * torch.randn(rows, D), torch.randn(rows, D).bfloat16()]
    inputs += [torch.randn(D), torch.randn(D)]
    upstream = [torch.randn(rows, D), torch.randn(rows, D).bfloat16()]

    def exact(x, y, weight, bias, eps):
        return x + y, F.layer_norm(x + y, (D,), weight, bias, eps)

    reference = results(exact, inputs, upstream, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(fused._add_and_normalize, inputs, upstream, torch.float32)
        ours = results(fused._compiled(), inputs, upstream, torch.float32)
    for mine, theirs, true in zip(ours, plain, reference, strict=True):
        assert mine.shape == theirs.shape == true.shape
        assert mine.dtype == theirs.dtype
        # Sums in another order: float32 results may differ in their last bits, of rows x D terms.
        assert distance(mine, true) <= 1.05 * distance(theirs, true) + 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_training_step_equals_the_plain_one(attention):
    exact = network(attn_implementation=attention).double()
    ids = tokens()
    exact(ids, labels=ids).loss.backward()
    true = {name: p.grad for name, p in exact.named_parameters()}
    plain_loss, plain = train(network(attn_implementation=attention), ids)
    loss, gradients = train(joined(attn_implementation=attention), ids)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-3, atol=1e-3)
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        # Other roundings of the same size: twice covers their scatter on 32 tokens.
        assert distance(gradient, true[name]) <= 2 * distance(plain[name], true[name]) + 1e-3, name


def test_the_mlp_reads_bfloat16_only_where_it_trains_under_autocast():
    model, ids, seen = joined(), tokens(), []
    for block in model.transformer.h:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    train(model, ids)
    assert seen == [torch.bfloat16] * 2
    seen.clear()
    model(ids)  # no autocast
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert seen == [torch.float32] * 4


def test_elsewhere_it_is_bitwise_the_plain_model():
    ids = tokens()
    assert torch.equal(joined()(ids).logits, network()(ids).logits)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(joined()(ids).logits, network()(ids).logits)
    arguments = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    ours = joined().eval().generate(ids, pad_token_id=0, **arguments)
    assert torch.equal(ours, network().eval().generate(ids, pad_token_id=0, **arguments))


def test_parameters_names_modes_gradients_and_random_numbers_stay():
    model, before = network(), network().state_dict()
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    gradient = model.transformer.h[0].ln_2.weight.grad.clone()
    parameters, random = list(model.parameters()), torch.get_rng_state()
    receipt = apply_fused_layernorm(model, cpu_precision="amp_bf16")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.transformer.h[0].ln_2.weight.grad, gradient)
    assert all(module.training for module in model.modules())
    assert receipt.changed == "joined 2 of 5 LayerNorms with the addition before them"
    assert receipt.count == 2
    assert 0 < receipt.probe["error"] <= 1.05 * receipt.probe["plain error"]


def test_twice_is_once():
    model = joined()
    loss, _ = train(model, tokens())
    assert apply_fused_layernorm(model, cpu_precision="amp_bf16").count == 2
    assert torch.equal(train(model, tokens())[0], loss)


def test_gradient_checkpointing_gives_the_same_gradients_with_dropout():
    ids, model = tokens(), joined(resid_pdrop=0.1)
    loss, plain = train(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed_loss, checkpointed = train(model, ids)
    assert torch.equal(checkpointed_loss, loss)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


def test_inside_a_compiled_model():
    model, ids = joined(), tokens()
    loss, _ = train(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled_loss = compiled(ids, labels=ids, use_cache=False).loss
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss.detach(), loss, rtol=1e-3, atol=1e-3)


def test_attention_weights_arrive():
    with torch.autocast("cpu", torch.bfloat16):
        outputs = joined(attn_implementation="eager")(tokens(), output_attentions=True)
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, 16, 16)] * 2


def test_few_kernels_for_many_shapes():
    torch._dynamo.reset()
    model = joined()
    torch._dynamo.utils.counters.clear()
    for rows, length in [(2, 16), (2, 32), (3, 8), (5, 31)]:
        train(model, tokens(rows, length))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_float32_on_a_cpu_is_refused():
    with pytest.raises(NoEffectError, match=r"needs precision amp_bf16 on a CPU .* got fp32"):
        apply_fused_layernorm(network())
    model = GPT2Model(network(), tokenizer_name=None)
    with pytest.raises(NoEffectError, match="got fp32"):
        apply_fused_layernorm(model)
    plan = Plan(sequence_length=32, on_cpu=True, precision="fp32", model={})
    with pytest.raises(ValueError, match="got fp32"):
        FusedLayerNorm().check_plan(plan)
    FusedLayerNorm().check_plan(dataclasses.replace(plan, precision="amp_bf16"))
    FusedLayerNorm().check_plan(dataclasses.replace(plan, on_cpu=False))


def test_the_run_says_its_precision():
    model = GPT2Model(network(), tokenizer_name=None, cpu_precision="amp_bf16")
    assert apply_fused_layernorm(model).count == 2
    model = GPT2Model(network(), tokenizer_name=None, cpu_precision="amp_bf16")
    state = State(model=model, rank_zero_seed=0, run_name="run", device=None, max_duration="1ba")
    algorithm = FusedLayerNorm()
    algorithm.prepare(state)
    assert algorithm.apply_to_model(model.model, ()).count == 2
    assert eval(repr(algorithm)) == algorithm


def test_blocks_without_an_addition_before_a_norm_are_refused():
    class OtherBlock(GPT2Block):
        pass

    model = network()
    for block in model.transformer.h:
        block.__class__ = OtherBlock
    with pytest.raises(NoEffectError, match=r"GPT2Block without .* got OtherBlock"):
        apply_fused_layernorm(model, cpu_precision="amp_bf16")


def test_a_missing_compiler_is_said(monkeypatch):
    from torch._inductor import config, cpp_builder

    def missing(*_):
        raise RuntimeError("No working C++ compiler found")

    torch._dynamo.reset()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    model = network()
    no_cache = config.patch(force_disable_caches=True)
    with no_cache, pytest.raises(NoEffectError, match="Install g\\+\\+"):
        apply_fused_layernorm(model, cpu_precision="amp_bf16")
    assert all(type(block) is GPT2Block for block in model.transformer.h)
    monkeypatch.undo()
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_ligers_kernel_equals_layer_norm():
    pytest.importorskip("liger_kernel")
    model, plain, ids = network().cuda(), network().cuda(), tokens().cuda()
    receipt = apply_fused_layernorm(model)
    assert receipt.count == 5
    assert receipt.probe["error"] <= 1e-5
    for either in (model, plain):
        either(ids, labels=ids).loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_kernel_that_is_another_function_is_refused(monkeypatch):
    def off_by_ten_percent(x, y, weight, bias, eps):
        normalized = F.layer_norm(x + y, weight.shape, weight, bias, eps)
        return x + y, 1.1 * normalized.bfloat16()

    monkeypatch.setattr(fused, "_compiled", lambda: off_by_ten_percent)
    module = network()
    with pytest.raises(NoEffectError, match="as near float64 as the plain way"):
        apply_fused_layernorm(module, cpu_precision="amp_bf16")
    assert {type(block).__name__ for block in module.transformer.h} == {"GPT2Block"}
