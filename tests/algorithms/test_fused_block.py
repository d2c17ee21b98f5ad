"""The fused block: training steps against float64, where it acts, and where it refuses."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from settings import ALGORITHMS, runs_here
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from algorithms.activation_checkpointing import apply_activation_checkpointing
from algorithms.alibi import alibi_bias, apply_alibi
from algorithms.fused_block import FusedBlock, apply_fused_block
from algorithms.fused_block import fused_block as fused
from algorithms.fused_cross_entropy import apply_fused_cross_entropy
from algorithms.fused_gelu import apply_fused_gelu
from algorithms.fused_layernorm import apply_fused_layernorm, fused_layernorm
from algorithms.parallel_residual import apply_parallel_residual
from composer_gpt2 import GPT2Model
from composer_gpt2.contract import NoEffectError, Plan

pytestmark = pytest.mark.skipif(
    not runs_here(ALGORITHMS["fused_block"]),
    reason="needs a CPU with AVX512-BF16 and a C++ compiler",
)
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"n_head": 1},
    "heads of 80": {"n_embd": 160},
    "narrow MLP": {"n_inner": 48},
    # transformers' SDPA ignores these two, ALiBi does not; whatever the plain model does is right.
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "not scaled": {"scale_attn_weights": False, "n_embd": 32},
    "other epsilon": {"layer_norm_epsilon": 0.1},
    "PyTorch's GELU": {"activation_function": "gelu_pytorch_tanh"},
}


def network(**settings) -> GPT2LMHeadModel:
    plain = dict(n_layer=2, n_embd=64, n_head=2, n_positions=96, vocab_size=101)
    dropout = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    torch.manual_seed(17)
    model = GPT2LMHeadModel(GPT2Config(**{**plain, **dropout, **settings}))
    model.loss_type = "ForCausalLM"
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def fuse(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    apply_fused_block(model)
    return model


def tokens(rows: int = 2, length: int = 53) -> torch.Tensor:
    """A length that no kernel takes at a time."""
    return torch.randint(101, (rows, length), generator=torch.Generator().manual_seed(1))


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp_bf16")


def step(
    model: nn.Module, precision: str, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and all gradients."""
    ids = tokens() if ids is None else ids
    model.zero_grad()
    with autocast(precision):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def distance(ours: torch.Tensor, true: torch.Tensor) -> float:
    assert ours.shape == true.shape
    return float((ours.double() - true.double()).norm() / true.double().norm())


def assert_as_good_a_step(ours: nn.Module, plain: nn.Module, precision: str) -> None:
    """As near float64 as the plain model's."""
    true_loss, true = step(copy.deepcopy(plain).double(), "fp32")
    plain_loss, theirs = step(plain, precision)
    loss, gradients = step(ours, precision)
    assert gradients.keys() == true.keys()
    if precision == "fp32":
        assert distance(loss, true_loss) <= 1e-5
        for name, gradient in gradients.items():
            # Where a gradient is rounding alone (of the keys' biases, which a softmax does not
            # see, as one of three parts of c_attn's), the plain one is as far off.
            bound = max(1e-5, 2 * distance(theirs[name], true[name]))
            assert distance(gradient, true[name]) <= bound, name
        return
    # A loss of 5 in bfloat16's logits: errors of either sign, which may be 0 by chance.
    error, their_error = (abs(float(x - true_loss)) for x in (loss, plain_loss))
    assert error <= 2 * their_error + 5e-3
    for name, gradient in gradients.items():
        # Other roundings of the same size: half more covers their scatter on 106 tokens.
        assert distance(gradient, true[name]) <= 1.5 * distance(theirs[name], true[name]), name


@pytest.fixture
def calls(monkeypatch) -> list[torch.dtype]:
    """The precision of each block that ran fused."""
    run, seen = fused._run, []

    def noted(block, x, dtype):
        seen.append(dtype)
        return run(block, x, dtype)

    monkeypatch.setattr(fused, "_run", noted)
    return seen


# --- The same function -------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_is_as_near_float64_as_the_plain_one(variant, precision, calls):
    settings = VARIANTS[variant]
    ours = fuse(network(**settings))
    calls.clear()
    assert_as_good_a_step(ours, network(**settings), precision)
    assert calls == [torch.float32 if precision == "fp32" else torch.bfloat16] * 2


@PRECISIONS
@pytest.mark.parametrize("order", ["alibi first", "fused first"])
@pytest.mark.parametrize("variant", ["plain", "scaled by layer", "not scaled", "heads of 80"])
def test_with_alibi_in_either_order(variant, order, precision, calls):
    ours, plain = network(**VARIANTS[variant]), network(**VARIANTS[variant])
    for apply in (apply_alibi, apply_fused_block)[:: 1 if order == "alibi first" else -1]:
        apply(ours)
    # The formula, independent of ALiBi's own attention, which widens heads instead.
    apply_alibi(plain, kernel="eager")
    calls.clear()
    assert_as_good_a_step(ours, plain, precision)
    assert len(calls) == 2
    assert alibi_bias(2, 1, 3)[0, 0, 0] != 0


@PRECISIONS
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 2), (3, 48), (1, 96), (16, 5)])
def test_batches_of_any_shape(rows, length, precision):
    ids, ours, plain = tokens(rows, length), fuse(network()), network()
    upstream = torch.randn(rows, length, 101)
    results = []
    for model, kind in [(plain, "fp32"), (plain, precision), (ours, precision)]:
        model.zero_grad()
        with autocast(kind):
            logits = model(ids, use_cache=False).logits
        logits.float().backward(upstream)
        results.append((logits.detach(), model.transformer.wte.weight.grad.clone()))
    (true, true_gradient), (theirs, their_gradient), (logits, gradient) = results
    assert distance(logits, true) <= max(1e-5, 1.5 * distance(theirs, true))
    bound = max(1e-5, 1.5 * distance(their_gradient, true_gradient))
    assert distance(gradient, true_gradient) <= bound


@PRECISIONS
def test_evaluation_is_the_same_function_and_keeps_nothing(precision, calls):
    ours, plain = fuse(network()).eval(), network().eval()
    calls.clear()
    with torch.no_grad(), autocast(precision):
        logits, theirs = (m(tokens(), use_cache=False).logits for m in (ours, plain))
        inputs = ours.transformer.wte(tokens())
        assert ours.transformer.h[0](inputs)[0].grad_fn is None
    with torch.no_grad():
        true = plain(tokens(), use_cache=False).logits
    assert len(calls) == 3
    assert distance(logits, true) <= max(1e-5, 1.5 * distance(theirs, true))
    with autocast(precision):  # recorded in evaluation mode too, if gradients are
        assert torch.equal(ours(tokens(), use_cache=False).logits.detach(), logits)


def test_a_number_that_is_none_reaches_the_loss_and_the_gradients():
    for precision in ("fp32", "amp_bf16"):
        model = fuse(network())
        model.transformer.h[1].mlp.c_fc.weight.data[3, 3] = torch.nan
        loss, gradients = step(model, precision)
        assert loss.isnan()
        assert gradients["transformer.h.0.attn.c_attn.weight"].isnan().all()


# --- Calls that want more than the output --------------------------------------------------------


def test_special_calls_run_as_before(calls):
    ours, plain, ids = fuse(network()).eval(), network().eval(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    half = torch.tensor([1.0, 0.0])
    eager = fuse(network())
    for layer in eager.transformer.h:  # as a user may set it later
        layer.attn.config._attn_implementation = "eager"
    calls.clear()
    with torch.no_grad():
        for arguments in (
            {"attention_mask": mask, "use_cache": False},
            {"use_cache": True},
            {"head_mask": half, "use_cache": False},
        ):
            assert torch.equal(ours(ids, **arguments).logits, plain(ids, **arguments).logits)
        cache = ours(ids[:, :40], use_cache=True).past_key_values
        theirs = plain(ids[:, :40], use_cache=True).past_key_values
        rest, their_rest = (
            model(ids[:, 40:], past_key_values=past, use_cache=True).logits
            for model, past in ((ours, cache), (plain, theirs))
        )
        assert torch.equal(rest, their_rest)
        outputs = eager.eval()(ids, output_attentions=True, use_cache=False)
        assert [weights.shape for weights in outputs.attentions] == [(2, 2, 53, 53)] * 2
        assert distance(outputs.logits, plain(ids, use_cache=False).logits) <= 1e-5
    assert calls == []
    # A mask that masks nothing is none.
    ours(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert calls == [torch.float32] * 2


def test_double_precision_runs_as_before(calls):
    model = fuse(network())
    calls.clear()
    model.double()(tokens(), use_cache=False)
    assert calls == []


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "alibi"])
def test_generation_equals_that_of_the_plain_model(biased):
    ours, plain = fuse(network()).eval(), network().eval()
    if biased:
        apply_alibi(ours)
        apply_alibi(plain)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    arguments: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    for attention_mask in (torch.ones_like(ids), mask):
        texts = [
            model.generate(ids, attention_mask=attention_mask, use_cache=cached, **arguments)
            for model in (ours, plain)
            for cached in (True, False)
        ]
        assert all(torch.equal(text, texts[0]) for text in texts)


def test_hidden_states_are_those_of_the_plain_model():
    ours, plain = fuse(network()), network()
    for mine, theirs in zip(
        ours(tokens(), output_hidden_states=True, use_cache=False).hidden_states,
        plain(tokens(), output_hidden_states=True, use_cache=False).hidden_states,
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# --- What users do with a model ------------------------------------------------------------------


@PRECISIONS
def test_microbatches_add_up(precision):
    model, ids = fuse(network()), tokens(4)
    _, whole = step(model, precision, ids)
    model.zero_grad()
    for part in ids.chunk(2):
        with autocast(precision):
            loss = model(part, labels=part, use_cache=False).loss
        (loss / 2).backward()
    for name, parameter in model.named_parameters():
        bound = 1e-5 if precision == "fp32" else 2e-2  # bfloat16's 8 bits, a few times
        assert distance(parameter.grad, whole[name]) <= bound, name


@PRECISIONS
@pytest.mark.parametrize("order", ["checkpointing first", "fused first"])
def test_activation_checkpointing_computes_it_again_to_the_bit(order, precision, calls):
    model = fuse(network())
    loss, gradients = step(model, precision)
    model = network()
    both = (apply_activation_checkpointing, apply_fused_block)
    for apply in both[:: 1 if order == "checkpointing first" else -1]:
        apply(model)
    calls.clear()
    checkpointed_loss, checkpointed = step(model, precision)
    assert len(calls) == 4
    assert torch.equal(checkpointed_loss, loss)
    for name, gradient in gradients.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_a_second_backward_pass_gives_the_same_again():
    model, ids = fuse(network()), tokens()
    for precision in ("fp32", "amp_bf16"):
        _, once = step(model, precision, ids)
        model.zero_grad()
        with autocast(precision):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward(retain_graph=True)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, 2 * once[name]), name


def test_second_derivatives_are_refused():
    model, ids = fuse(network()), tokens()
    loss = model(ids, labels=ids, use_cache=False).loss
    weight = model.transformer.h[0].mlp.c_fc.weight
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@PRECISIONS
@pytest.mark.parametrize("frozen", ["blocks", "embeddings", "biases", "first block"])
def test_frozen_parameters(frozen, precision):
    model, ids = fuse(network()), tokens()
    _, whole = step(model, precision)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not {
            "blocks": ".h." in name,
            "embeddings": ".wte." in name or ".wpe." in name,
            "biases": name.endswith("bias"),
            "first block": ".h.0." in name or ".wte." in name or ".wpe." in name,
        }[frozen]
    _, gradients = step(model, precision, ids)
    assert 0 < len(gradients) < len(whole)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, whole[name]), name


def test_the_gradient_of_inputs_alone():
    model, plain = fuse(network()).requires_grad_(False), network().requires_grad_(False)
    inputs = torch.randn(2, 20, 64)
    gradients = []
    for either in (model, plain):
        leaf = inputs.clone().requires_grad_()
        either(inputs_embeds=leaf, use_cache=False).logits.square().sum().backward()
        gradients.append(leaf.grad)
    assert distance(*gradients) <= 1e-5


def test_copies_pickles_and_saved_models(tmp_path):
    model, ids = fuse(network()), tokens()
    loss, _ = step(model, "amp_bf16")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again.transformer.h[0]) is type(model.transformer.h[0])
        assert torch.equal(step(again, "amp_bf16")[0], loss)
    model.save_pretrained(tmp_path)
    saved = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert type(saved.transformer.h[0]) is GPT2Block
    assert torch.equal(saved(ids).logits, model.eval()(ids).logits)  # both with a cache


def test_twice_is_once():
    model = fuse(network())
    loss, _ = step(model, "amp_bf16")
    assert apply_fused_block(model).count == 2
    assert torch.equal(step(model, "amp_bf16")[0], loss)


def test_inside_a_compiled_model(calls):
    model = fuse(network())
    loss, gradients = step(model, "amp_bf16")
    calls.clear()
    compiled = torch.compile(model, backend="aot_eager")
    compiled_loss, compiled_gradients = step(compiled, "amp_bf16")
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-3, atol=1e-3)
    for (name, gradient), other in zip(gradients.items(), compiled_gradients.values(), strict=True):
        assert distance(other, gradient) <= 2e-2, name


def test_parameters_names_modes_gradients_hooks_and_random_numbers_stay():
    model, before = network(), network().state_dict()
    step(model, "fp32")
    gradient = model.transformer.h[0].ln_2.weight.grad.clone()
    seen: list[int] = []
    model.transformer.h[0].register_forward_hook(lambda *_: seen.append(1))
    parameters, random = list(model.parameters()), torch.get_rng_state()
    with torch.no_grad():
        receipt = apply_fused_block(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.transformer.h[0].ln_2.weight.grad, gradient)
    assert all(module.training for module in model.modules())
    assert not seen  # the probe calls no hook
    step(model, "fp32")
    assert seen == [1]
    assert receipt.changed == "fused 2 of 2 blocks"
    assert receipt.count == 2
    assert 0 < receipt.probe["float32 error"] < 1e-5
    assert 0 < receipt.probe["error"] <= 1.5 * receipt.probe["plain error"] < 0.05
    assert 0 < receipt.probe["gradient error"] <= 1.5 * receipt.probe["plain gradient error"] < 0.05


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attn_pdrop": 0.1}, r"no dropout, got 0\.1; set the model's dropout to 0"),
        ({"resid_pdrop": 0.2}, r"no dropout, got 0\.2"),
        ({"activation_function": "relu"}, "gelu_new or gelu_pytorch_tanh, got relu"),
        ({"activation_function": "gelu"}, "gelu_new or gelu_pytorch_tanh, got gelu;"),
        ({"n_embd": 40, "n_head": 2}, r"multiple of 16, got 20 \(40 / 2\)"),
        ({"n_inner": 100}, "multiple of 16, got n_inner 100"),
        ({"attn_implementation": "eager"}, "attn_implementation sdpa, got eager"),
    ],
)
def test_what_it_has_no_kernel_for_is_refused(settings, said):
    model = network(**settings)
    with pytest.raises(NoEffectError, match=said):
        apply_fused_block(model)
    assert all(type(block) is GPT2Block for block in model.transformer.h)
    configuration = {
        **model.config.to_dict(),
        "attn_implementation": model.config._attn_implementation,
    }
    plan = Plan(sequence_length=32, on_cpu=True, precision="amp_bf16", model=configuration)
    with pytest.raises(ValueError, match=said):
        FusedBlock().check_plan(plan)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reorder_and_upcast_attn": True}, r"reorder_and_upcast_attn=True"),
        ({"add_cross_attention": True}, "without cross attention"),
        ({"n_layer": 0}, "got none"),
    ],
)
def test_unusual_blocks_are_refused(settings, said):
    with pytest.raises(NoEffectError, match=said):
        apply_fused_block(network(**settings))


def test_dropout_of_the_embedding_is_none_of_its_business():
    assert apply_fused_block(network(embd_pdrop=0.1)).count == 2


def test_a_gpu_is_refused():
    plan = Plan(sequence_length=32, on_cpu=True, precision="fp32", model=_configuration())
    FusedBlock().check_plan(plan)
    FusedBlock().check_plan(dataclasses.replace(plan, on_cpu=None))
    with pytest.raises(ValueError, match="kernels for CPUs, got a GPU"):
        FusedBlock().check_plan(dataclasses.replace(plan, on_cpu=False))
    with pytest.raises(NoEffectError, match="kernels for CPUs, got meta"):
        apply_fused_block(network().to("meta"))


def _configuration() -> dict[str, Any]:
    config = network().config
    return {**config.to_dict(), "attn_implementation": config._attn_implementation}


def test_parameters_of_another_type_are_refused():
    with pytest.raises(NoEffectError, match=r"parameters in float32, got torch\.bfloat16"):
        apply_fused_block(network().bfloat16())


def test_blocks_of_other_algorithms_are_refused():
    model = network()
    apply_parallel_residual(model)
    with pytest.raises(NoEffectError, match="got _ParallelBlock"):
        apply_fused_block(model)
    model = network()
    for block in model.transformer.h:  # without the compilation that the function takes
        block.__class__ = fused_layernorm._FusedBlock
    with pytest.raises(NoEffectError, match="blocks of GPT-2"):
        apply_fused_block(model)
    for apply in (
        apply_parallel_residual,
        lambda model: apply_fused_layernorm(model, cpu_precision="amp_bf16"),
    ):
        model = fuse(network())
        with pytest.raises(NoEffectError, match="got _FusedBlock"):
            apply(model)


def test_a_layer_that_somebody_exchanged_is_refused():
    """Its parameters alone do not say what it computes."""

    class LowRank(Conv1D):
        pass

    model = network()
    model.transformer.h[1].mlp.c_fc.__class__ = LowRank
    with pytest.raises(NoEffectError, match="got LowRank"):
        apply_fused_block(model)


def test_missing_kernels_are_said(monkeypatch):
    def unavailable():
        raise fused.kernels.KernelsUnavailableError("the CPU must have wings, got none")

    monkeypatch.setattr(fused.kernels, "kernel_library", unavailable)
    model = network()
    with pytest.raises(NoEffectError, match="the CPU must have wings, got none, or leave it out"):
        apply_fused_block(model)
    assert all(type(block) is GPT2Block for block in model.transformer.h)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [("gelu", "in float32"), ("gelu_backward_", "in float32"), ("attention", "as the plain block"),
     ("attention_backward", "as the plain block"), ("add_layer_norm", "in float32"),
     ("add_layer_norm_backward", "in float32")],
)  # fmt: skip
def test_a_kernel_that_is_another_function_leaves_the_model_as_it_was(kernel, said, monkeypatch):
    right = getattr(fused.kernels, kernel)

    def off_by_ten_percent(*arguments, **options):
        results = right(*arguments, **options)
        if kernel == "gelu_backward_":
            arguments[1].mul_(1.1)
        else:
            (results if isinstance(results, torch.Tensor) else results[0]).mul_(1.1)
        return results

    monkeypatch.setattr(fused.kernels, kernel, off_by_ten_percent)
    model = network()
    with pytest.raises(NoEffectError, match=rf"{said}.* leaves the model as it was"):
        apply_fused_block(model)
    assert all(type(block) is GPT2Block for block in model.transformer.h)


def test_beside_the_others_that_it_goes_with():
    """All at once, on a GPT2Model, which brings its precision."""
    plain = GPT2Model(network(), tokenizer_name=None, cpu_precision="amp_bf16")
    ours = GPT2Model(network(), tokenizer_name=None, cpu_precision="amp_bf16")
    for model in (plain, ours):
        apply_alibi(model)
    apply_fused_gelu(ours)
    apply_fused_block(ours)
    apply_activation_checkpointing(ours)
    apply_fused_cross_entropy(ours)
    batch = {"input_ids": tokens(), "labels": tokens()}
    losses = [model(batch).loss for model in (ours, plain)]
    torch.testing.assert_close(*losses, rtol=2e-3, atol=0)
    losses[0].backward()
    assert all(p.grad is not None for p in ours.parameters())
