"""Parallel residual: the formula, its gradient, and all the ways in which a block is called."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from algorithms.parallel_residual import ParallelResidual, apply_parallel_residual
from composer_gpt2.contract import NoEffectError, architecture


def network(**settings) -> GPT2LMHeadModel:
    plain = dict(n_layer=2, n_embd=32, n_head=4, n_positions=32, vocab_size=101)
    dropout = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    torch.manual_seed(17)
    model = GPT2LMHeadModel(GPT2Config(**{**plain, **dropout, **settings})).eval()
    model.loss_type = "ForCausalLM"
    for parameter in model.parameters():  # biases and norms that matter, scores that are not flat
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def parallel(**settings) -> GPT2LMHeadModel:
    model = network(**settings)
    apply_parallel_residual(model)
    return model


def tokens(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(101, (rows, length), generator=torch.Generator().manual_seed(1))


def naive_block(weights: dict, x: torch.Tensor, heads: int) -> torch.Tensor:
    """The block from its parameters alone, for one sequence, shape (T, D)."""
    length, width = x.shape
    y = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = y * weights["ln_1.weight"] + weights["ln_1.bias"]
    qkv = y @ weights["attn.c_attn.weight"] + weights["attn.c_attn.bias"]
    q, k, v = qkv.view(length, 3, heads, width // heads).permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) / (width // heads) ** 0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    attended = (scores.softmax(2) @ v).transpose(0, 1).reshape(length, width)
    attended = attended @ weights["attn.c_proj.weight"] + weights["attn.c_proj.bias"]
    inner = y @ weights["mlp.c_fc.weight"] + weights["mlp.c_fc.bias"]
    inner = F.gelu(inner, approximate="tanh")
    return x + attended + inner @ weights["mlp.c_proj.weight"] + weights["mlp.c_proj.bias"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_block_and_its_gradient_equal_the_formula(attention):
    model = parallel(attn_implementation=attention)
    for block in model.transformer.h:
        x = torch.randn(2, 16, 32, requires_grad=True)
        result = block(x)[0]
        weights = dict(block.named_parameters())
        expected = torch.stack([naive_block(weights, row, heads=4) for row in x])
        assert result.shape == expected.shape == (2, 16, 32)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)  # float32
        upstream = torch.randn(2, 16, 32)
        sources = [x, *weights.values()]
        ours = torch.autograd.grad(result, sources, upstream)
        theirs = torch.autograd.grad(expected, sources, upstream)
        for mine, other in zip(ours, theirs, strict=True):  # sums over 32 tokens
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_only_the_second_norms_go_and_nothing_else_changes():
    model, before = network(), network().state_dict()
    receipt = apply_parallel_residual(model)
    after = model.state_dict()
    assert before.keys() - after.keys() == {
        f"transformer.h.{layer}.ln_2.{kind}" for layer in range(2) for kind in ("weight", "bias")
    }
    assert after.keys() <= before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert receipt.count == 2
    assert receipt.changed == "made 2 of 2 blocks parallel, removed 128 parameters of ln_2"
    assert receipt.probe["error"] <= 1e-5 < receipt.probe["change"]
    assert architecture(model) == {"parallel_residual": {}}
    ids = tokens()
    assert not torch.allclose(model(ids).logits, network()(ids).logits, atol=1e-3)


def test_every_parameter_trains_and_the_optimizer_forgets_the_second_norms():
    model = network().train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    apply_parallel_residual(model, [optimizer])
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(model.parameters())
    assert model.training
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_cached_generation_equals_uncached():
    model, prompt = parallel(), tokens(length=5)
    mask = torch.ones_like(prompt)
    arguments = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    cached = model.generate(prompt, use_cache=True, **arguments)
    assert cached.shape == (2, 13)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **arguments))


def test_left_padding_changes_nothing():
    model, ids = parallel(), tokens(rows=1, length=6)
    padded = F.pad(ids, (3, 0))
    mask = F.pad(torch.ones_like(ids), (3, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_attention_weights_and_head_masks_arrive():
    model, ids = parallel(attn_implementation="eager"), tokens()
    outputs = model(ids, output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, 16, 16)] * 2
    assert len(outputs.hidden_states) == 3
    without_attention = model(ids, head_mask=torch.zeros(2, 4)).logits
    assert not torch.allclose(without_attention, outputs.logits, atol=1e-3)


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_gives_the_same_gradients_with_dropout(when):
    ids, gradients = tokens(), []
    for checkpointing in (False, True):
        model = network(resid_pdrop=0.1).train()
        if checkpointing and when == "before":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        apply_parallel_residual(model)
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        model.transformer.h[0].ln_1.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        torch.manual_seed(3)
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert len(calls) == 1 + checkpointing  # the second pass of checkpointing
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6)


def test_residual_dropout_acts_in_training_alone():
    model, ids = parallel(resid_pdrop=0.5), tokens()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits, atol=1e-3)


def test_an_attention_function_of_a_layer_of_its_own_is_used():
    """As ALiBi sets one: the configuration of the attention layer differs from the network's."""
    model, ids = parallel(), tokens()
    plain = model(ids).logits
    for block in model.transformer.h:
        block.attn.config = copy.copy(model.config)
        block.attn.config._attn_implementation = "eager"
    calls = []
    model.transformer.h[1].attn.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
    assert calls == [1]


def test_a_copy_and_a_reloaded_model_are_the_same(tmp_path):
    model, ids = parallel(), tokens()
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    fresh = GPT2LMHeadModel(GPT2Config.from_dict(model.config.to_dict())).eval()
    apply_parallel_residual(fresh)  # its configuration has the record, its blocks not yet
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_twice_is_once():
    model, ids = parallel(), tokens()
    logits = model(ids).logits
    receipt = apply_parallel_residual(model)
    assert receipt.changed.startswith("made 0 of 2 blocks")
    assert receipt.count == 2
    assert torch.equal(model(ids).logits, logits)


def test_gradients_mode_and_random_numbers_stay():
    model = network().train()
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    gradient = model.transformer.wte.weight.grad.clone()
    before = torch.get_rng_state()
    apply_parallel_residual(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.transformer.wte.weight.grad, gradient)
    assert all(module.training for module in model.modules())


def test_unknown_blocks_and_cross_attention_are_refused():
    class OtherBlock(GPT2Block):
        pass

    model = network()
    model.transformer.h[1].__class__ = OtherBlock
    with pytest.raises(NoEffectError, match=r"needs transformers' GPT2Block .* got GPT2Block, Oth"):
        apply_parallel_residual(model)
    assert hasattr(model.transformer.h[0], "ln_2")
    with pytest.raises(NoEffectError, match="add_cross_attention=True"):
        apply_parallel_residual(network(add_cross_attention=True))


def test_the_class_is_rebuilt_from_its_repr():
    assert eval(repr(ParallelResidual())) == ParallelResidual()
