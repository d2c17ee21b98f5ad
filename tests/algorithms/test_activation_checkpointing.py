from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import N_TOKENS, TOKENS, build_network, train
from transformers import GPT2Config, GPT2LMHeadModel

from algorithms.activation_checkpointing import (
    ActivationCheckpointing,
    apply_activation_checkpointing,
)
from algorithms.fused_gelu import FusedGELU
from algorithms.fused_layernorm import FusedLayerNorm
from algorithms.parallel_residual import ParallelResidual
from composer_gpt2.contract import NoEffectError, receipts

SMALL = {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 32, "vocab_size": 101}


def make_model(dropout: float = 0.0, **settings) -> GPT2LMHeadModel:
    torch.manual_seed(17)
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    model = GPT2LMHeadModel(GPT2Config(**{**SMALL, **rates, **settings})).train()
    model.loss_type = "ForCausalLM"
    return model


def gradients(model, tokens, **options):
    """The loss and all gradients, each time with the same dropout."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(tokens, labels=tokens, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def count_forwards(model) -> list[int]:
    """Numbers of the blocks whose MLP runs, as they do."""
    ran: list[int] = []
    for number, block in enumerate(model.transformer.h):
        block.mlp.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    return ran


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_are_bitwise_those_without(dropout, autocast, attention):
    plain = make_model(dropout, attn_implementation=attention)
    model = copy.deepcopy(plain)
    apply_activation_checkpointing(model)
    tokens = torch.randint(101, (2, 16))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted_loss, wanted = gradients(plain, tokens, use_cache=False)
        loss, found = gradients(model, tokens, use_cache=False)
        other_dropout = model(tokens, labels=tokens, use_cache=False).loss.detach()
    assert torch.equal(loss, wanted_loss)
    assert (dropout == 0) == torch.equal(other_dropout, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient.shape == wanted[name].shape
        assert torch.equal(gradient, wanted[name]), name


@pytest.mark.parametrize(("every", "again"), [(1, [3, 2, 1, 0]), (2, [3, 1]), (3, [2]), (4, [3])])
def test_every_nth_block_runs_again_in_the_backward_pass(every, again):
    model = make_model()
    receipt = apply_activation_checkpointing(model, every)
    assert receipt.count == len(again)
    assert str(receipt).startswith(
        f"activation_checkpointing: computes {len(again)} of 4 blocks again in the backward pass ["
    )
    ran = count_forwards(model)
    gradients(model, TOKENS[:2, :16], use_cache=False)
    assert ran == [0, 1, 2, 3, *again]


def test_the_probe_is_what_autograd_keeps_and_disturbs_nothing():
    def saved(network) -> float:
        kept = {}
        own = {p.data_ptr() for p in [*network.parameters(), *network.buffers()]}

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = network.transformer(torch.zeros(1, 32, dtype=torch.long), use_cache=False)
        assert hidden is not None
        return sum(size for address, size in kept.items() if address not in own) / 1024 / 32

    model = make_model(dropout=0.1)
    without = saved(model)
    model.eval()
    model.transformer.h[0].train()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    with torch.no_grad():
        receipt = apply_activation_checkpointing(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert receipt.probe["without"] == without
    assert receipt.probe["KiB kept a token"] == saved(model.train())
    # A block's input has 32 numbers of 4 bytes. Beside those of 4 blocks, the embedding's dropout,
    # the last norm and small change are kept.
    assert 4 * 32 * 4 / 1024 < receipt.probe["KiB kept a token"] < 3 * 4 * 32 * 4 / 1024
    assert receipt.probe["KiB kept a token"] < without / 8
    half = apply_activation_checkpointing(model, every=2).probe
    assert half["without"] == without
    assert receipt.probe["KiB kept a token"] < half["KiB kept a token"] < without


def test_names_parameters_and_what_is_saved_stay(tmp_path):
    model = make_model()
    before = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    config = model.config.to_dict()
    apply_activation_checkpointing(model)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == before
    assert model.config.to_dict() == config
    model.eval().save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = TOKENS[:2, :16]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_evaluation_runs_each_block_once():
    model = make_model(dropout=0.1)
    plain = copy.deepcopy(model).eval()
    apply_activation_checkpointing(model)
    ran = count_forwards(model)
    tokens = TOKENS[:2, :8]
    model.eval()
    loss, found = gradients(model, tokens)
    assert ran == [0, 1, 2, 3]
    wanted_loss, wanted = gradients(plain, tokens)
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("training", [False, True])
def test_generation_reads_its_cache(training):
    """In training mode too, where that of transformers drops it and goes on from one token."""
    # Weights so large that what comes next depends on all that went before.
    model = make_model(initializer_range=0.5).train(training)
    tokens = TOKENS[:2, :8]
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    wanted: Any = model.generate(tokens, attention_mask=mask, use_cache=False, **arguments)
    assert len(set(wanted[0, 8:].tolist())) > 6
    apply_activation_checkpointing(model)
    ran = count_forwards(model)
    found: Any = model.generate(tokens, attention_mask=mask, use_cache=True, **arguments)
    assert torch.equal(found, wanted)
    assert ran == 12 * [0, 1, 2, 3]


def test_a_network_that_trains_with_a_cache_it_did_not_ask_for_gets_the_same_gradients():
    plain = make_model()
    model = copy.deepcopy(plain)
    apply_activation_checkpointing(model, every=2)
    ran = count_forwards(model)
    tokens = TOKENS[:2, :16]
    (loss, found), (wanted_loss, wanted) = gradients(model, tokens), gradients(plain, tokens)
    assert ran == [0, 1, 2, 3, 3, 1]
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    # After a prefix nothing is computed again, and nothing forgotten.
    with torch.no_grad():
        caches = [network(tokens, use_cache=True).past_key_values for network in (plain, model)]
    ran.clear()
    (loss, found), (wanted_loss, wanted) = (
        gradients(network, tokens, past_key_values=cache)
        for network, cache in zip((model, plain), caches[::-1], strict=True)
    )
    assert ran == [0, 1, 2, 3]
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_its_own_blocks_again(copied):
    model = make_model()
    apply_activation_checkpointing(model)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    tokens = TOKENS[:2, :16]
    ran, ran_in_copy = count_forwards(model), count_forwards(other)
    loss, found = gradients(other, tokens, use_cache=False)
    wanted_loss, wanted = gradients(make_model(), tokens, use_cache=False)
    assert ran == []
    assert len(ran_in_copy) == 8
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_a_compiled_model_are_those_of_its_loss(dropout):
    """Against differences of the loss: compiled dropout draws other numbers than uncompiled."""
    model = make_model(dropout, initializer_range=0.2).double()
    apply_activation_checkpointing(model)
    compiled = torch.compile(model, backend="aot_eager")
    tokens = TOKENS[:2, :16]

    def loss() -> Tensor:  # of transformers, it would be in float32
        torch.manual_seed(3)  # the same dropout each time
        logits = compiled(tokens, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    parameters = list(model.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]
    found = torch.autograd.grad(loss(), parameters)
    slope = sum((g * d).sum() for g, d in zip(found, directions, strict=True))
    losses = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
        losses.append(loss().detach())
    torch.testing.assert_close(slope, (losses[0] - losses[1]) / 2e-6, rtol=1e-5, atol=0)


@pytest.mark.parametrize("other", [FusedLayerNorm, ParallelResidual, FusedGELU])
@pytest.mark.parametrize("ours_first", [True, False])
def test_blocks_that_others_exchange_are_computed_again(other, ours_first):
    """Applied directly, before and after; the Trainer always applies it last."""
    precision = "amp_bf16" if other is FusedLayerNorm else "fp32"
    plain, model = build_network(precision), build_network(precision)
    algorithm = other()
    if other is FusedLayerNorm:
        algorithm._cpu_precision = precision
    algorithm.apply_to_model(plain.model, ())  # type: ignore[reportArgumentType]
    ours = ActivationCheckpointing()
    for applied in (ours, algorithm) if ours_first else (algorithm, ours):
        applied.apply_to_model(model.model, ())  # type: ignore[reportArgumentType]
    ran = count_forwards(model.model)
    batch = {"input_ids": TOKENS[:2], "labels": TOKENS[:2]}
    for network in (plain, model):
        network.train()
        network(batch)["loss"].backward()
    assert ran == [0, 1, 1, 0]
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0, msg=name)


def test_it_stands_behind_what_exchanges_blocks():
    algorithms = [ActivationCheckpointing(), FusedGELU(), FusedLayerNorm()]
    run, losses = train(build_network("amp_bf16"), algorithms)
    found = receipts(run.state.algorithms)
    assert [receipt["algorithm"] for receipt in found] == [
        "fused_gelu",
        "fused_layernorm",
        "activation_checkpointing",
    ]
    _, without = train(build_network("amp_bf16"), [FusedGELU(), FusedLayerNorm()])
    assert losses.of_batches == without.of_batches
    # What it is compared with is the network as it trains: gelu_new keeps more than its one kernel.
    plain = apply_activation_checkpointing(build_network("amp_bf16").model).probe
    assert found[-1]["probe"]["without"] < plain["without"]


def test_the_last_every_holds():
    model = make_model()
    apply_activation_checkpointing(model)
    first = apply_activation_checkpointing(model, every=3)
    assert first == apply_activation_checkpointing(model, every=3)
    ran = count_forwards(model)
    gradients(model, TOKENS[:2, :16], use_cache=False)
    assert ran == [0, 1, 2, 3, 2]


def test_a_model_on_which_it_would_do_nothing_is_an_error():
    with pytest.raises(ValueError, match="at most the 4 layers, got 5"):
        apply_activation_checkpointing(make_model(), every=5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ActivationCheckpointing(every=0)
    with pytest.raises(ValueError, match="at most the 2 layers, got 3"):
        train(build_network(), [ActivationCheckpointing(every=3)])
    with pytest.raises(NoEffectError, match="needs a transformers GPT2LMHeadModel"):
        apply_activation_checkpointing(nn.Linear(2, 2))


def test_checkpointing_of_another_kind_is_refused():
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(NoEffectError, match="got blocks with transformers' gradient"):
        apply_activation_checkpointing(model)
    model.gradient_checkpointing_disable()
    block = model.transformer.h[1]
    block.forward = lambda hidden_states, *_, **__: (hidden_states,)
    with pytest.raises(NoEffectError, match="got blocks with a forward of their own"):
        apply_activation_checkpointing(model)
    del block.forward
    assert apply_activation_checkpointing(model).count == 4


def test_a_checkpoint_that_keeps_no_less_is_refused(monkeypatch):
    from algorithms.activation_checkpointing import activation_checkpointing as ours

    model = make_model()
    monkeypatch.setattr(ours, "checkpoint", lambda f, *args, use_reentrant, **kw: f(*args, **kw))
    with pytest.raises(NoEffectError, match="must keep less for the backward pass"):
        apply_activation_checkpointing(model)
    assert not any("forward" in vars(block) for block in model.transformer.h)


def test_the_peak_of_a_long_sequence_falls():
    """Not only a number of hooks: what is alive after the forward pass, as the allocator has it."""

    def alive_after_forward(network) -> int:
        tokens = TOKENS[:4, :N_TOKENS] % 101
        profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        with profile:
            output = network.transformer(tokens, use_cache=False)
        assert output is not None
        return sum(event.self_cpu_memory_usage for event in profile.key_averages())

    model = make_model()
    before = alive_after_forward(model)
    apply_activation_checkpointing(model)
    assert alive_after_forward(model) < before / 4
