"""ALiBi: the formula, cached and padded generation, longer contexts, half the sequence length."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from training import N_TOKENS, VOCAB_SIZE, build_network, train, trainer
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

from algorithms.alibi import ALiBi, alibi_bias, apply_alibi, linear_bias_slopes
from algorithms.alibi.alibi import _FUNCTIONS, _kernel_problem, _score_bias
from composer_gpt2 import GPT2Model
from composer_gpt2.contract import NoEffectError, Plan

N_HEADS = (1, 2, 3, 5, 8, 12, 16, 25)


def build(n_heads: int = 4, **settings) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    settings = {"n_layer": 2, "n_embd": 8 * n_heads, "n_positions": 16, **settings}
    config = GPT2Config(n_head=n_heads, vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=0,
                        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **settings)  # fmt: skip
    module = GPT2LMHeadModel(config).eval()
    module.loss_type = "ForCausalLM"
    with torch.no_grad():  # so that attention is far from uniform
        for layer in module.transformer.h:
            layer.attn.c_attn.weight.mul_(10)
    return module


def tokens(n_tokens: int, n_sequences: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB_SIZE, (n_sequences, n_tokens), generator=generator)


def naive_logits(module: GPT2LMHeadModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The network written out for one sequence at a time, head by head, token by token."""
    network = module.transformer
    outputs = []
    for sequence in input_ids:
        x = network.wte(sequence)
        for block in network.h:
            query, key, value = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
            heads = []
            n_heads, width = block.attn.num_heads, block.attn.head_dim
            for h, slope in enumerate(slopes_by_the_papers_text(n_heads)):
                of_head = slice(h * width, (h + 1) * width)
                rows = []
                for i in range(len(sequence)):
                    scores = torch.stack(
                        [
                            query[i, of_head] @ key[j, of_head] / width**0.5 - slope * (i - j)
                            for j in range(i + 1)
                        ]
                    )
                    rows.append(scores.softmax(dim=0) @ value[: i + 1, of_head])
                heads.append(torch.stack(rows))
            x = x + block.attn.c_proj(torch.cat(heads, dim=-1))
            x = x + block.mlp(block.ln_2(x))
        outputs.append(module.lm_head(network.ln_f(x)))
    return torch.stack(outputs)


def slopes_by_the_papers_text(n_heads: int) -> list[float]:
    """Geometric from 2**(-8/n) with that ratio; else as the authors' footnote has it."""
    if n_heads & (n_heads - 1) == 0:
        return [2 ** (-8 / n_heads * (h + 1)) for h in range(n_heads)]
    below = 1
    while 2 * below < n_heads:
        below *= 2
    more = slopes_by_the_papers_text(2 * below)[0::2]
    return slopes_by_the_papers_text(below) + more[: n_heads - below]


@pytest.mark.parametrize("n_heads", N_HEADS)
def test_slopes(n_heads):
    slopes = linear_bias_slopes(n_heads)
    assert slopes.shape == (n_heads,)
    torch.testing.assert_close(slopes, torch.tensor(slopes_by_the_papers_text(n_heads)))
    assert slopes.unique().numel() == n_heads


def test_slopes_and_biases_of_the_papers_figure():
    assert linear_bias_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_bias(8, 2, 3)[0].tolist() == [[-0.5, 0.0, 0.5], [-1.0, -0.5, 0.0]]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        linear_bias_slopes(0)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("n_heads", N_HEADS)
def test_logits_are_those_of_the_formula(n_heads, kernel):
    module = build(n_heads)
    input_ids = tokens(12)
    apply_alibi(module, kernel=kernel)
    with torch.no_grad():
        torch.testing.assert_close(
            module(input_ids).logits, naive_logits(module, input_ids), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_gradients_are_those_of_the_formula(kernel):
    ours, naive = build(5), build(5)
    apply_alibi(ours, kernel=kernel)
    apply_alibi(naive)
    input_ids = tokens(12)
    for module, logits in ((ours, ours(input_ids).logits), (naive, naive_logits(naive, input_ids))):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    for (name, one), other in zip(ours.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_heads", [8, 12])
def test_half_precision_stays_near_the_formula_far_into_a_sequence(dtype, n_heads):
    """Key numbers above 256 are no bfloat16; ours go in two parts, each of which is."""
    module = build(n_heads, n_layer=1)
    apply_alibi(module)
    layer = module.transformer.h[0].attn
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, n_heads, 3000, 8, generator=generator).to(dtype)
    got, _ = _FUNCTIONS["sdpa"](layer, query, key, value, None, is_causal=True)
    slopes = layer.alibi_slopes.to(dtype).double()  # the slope itself has its type's precision
    scores = query.double() @ key.double().mT / 8**0.5
    numbers = torch.arange(3000)
    scores = scores - slopes[:, None, None] * (numbers[:, None] - numbers)
    scores = scores.masked_fill(numbers[:, None] < numbers, -torch.inf)
    wanted = (scores.softmax(dim=-1) @ value.double()).transpose(1, 2)
    error = (got.double() - wanted).abs().max()
    assert error < 8 * torch.finfo(dtype).eps  # sums of products, rounded at the end


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_no_parameter_of_positions_is_left(kernel):
    module = build()
    before = sum(p.numel() for p in module.parameters())
    receipt = apply_alibi(module, kernel=kernel)
    assert before - sum(p.numel() for p in module.parameters()) == 16 * 32
    assert not [name for name in module.state_dict() if "wpe" in name or "alibi" in name]
    assert str(receipt).startswith("alibi: biased 2 of 2 attention layers, removed 512 position")


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_contexts_longer_than_any_position(kernel):
    module = build()
    apply_alibi(module, kernel=kernel)
    long = tokens(70, n_sequences=1)  # n_positions is 16
    with torch.no_grad():
        logits = module(long).logits
        torch.testing.assert_close(logits, naive_logits(module, long), rtol=0, atol=1e-5)
        # What is far away is forgotten: the steepest bias is half a point a token.
        generated = module.generate(long, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 70


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_cached_steps_equal_one_pass(kernel, cache):
    module = build()
    apply_alibi(module, kernel=kernel)
    input_ids = tokens(14)
    past = (
        StaticCache(module.config, max_batch_size=2, max_cache_len=20, device="cpu")
        if cache
        else None
    )
    with torch.no_grad():
        whole = module(input_ids).logits
        steps = []
        for start, stop in [(0, 6), (6, 7), (7, 11), (11, 12), (12, 13), (13, 14)]:
            output = module(
                input_ids[:, start:stop],
                past_key_values=past,
                use_cache=True,
                cache_position=torch.arange(start, stop),
            )
            past = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_left_padding_changes_nothing(kernel):
    module = build()
    apply_alibi(module, kernel=kernel)
    text = tokens(6)
    padded = F.pad(text, (5, 0))
    mask = F.pad(torch.ones_like(text), (5, 0))
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        logits = module(padded, attention_mask=mask).logits[:, 5:]
        torch.testing.assert_close(logits, module(text).logits, rtol=0, atol=1e-5)
        with_padding = module.generate(padded, attention_mask=mask, **arguments)
        without = module.generate(text, attention_mask=torch.ones_like(text), **arguments)
    assert torch.equal(with_padding[:, 5:], without)


def test_eager_gives_attention_weights_that_fall_with_distance():
    module = build()
    apply_alibi(module, kernel="eager")
    with torch.no_grad():
        for layer in module.transformer.h:
            layer.attn.c_attn.weight.zero_()  # nothing is left but the bias
        weights = module(tokens(10), output_attentions=True).attentions
    for of_layer in weights:
        assert of_layer.shape == (2, 4, 10, 10)
        last = of_layer[:, :, -1]
        assert (last.diff(dim=-1) > 0).all()
        slopes = linear_bias_slopes(4)
        expected = (slopes[:, None] * torch.arange(10)).softmax(dim=-1)
        torch.testing.assert_close(last[0], expected, rtol=0, atol=1e-6)


def test_attention_dropout_acts_in_training_only():
    module = build()
    module.config.attn_pdrop = 0.5
    for layer in module.transformer.h:
        layer.attn.attn_dropout.p = 0.5
    apply_alibi(module)
    input_ids = tokens(10)
    with torch.no_grad():
        assert torch.equal(module(input_ids).logits, module(input_ids).logits)
        module.train()
        torch.manual_seed(0)
        assert not torch.equal(module(input_ids).logits, module(input_ids).logits)


def test_a_copy_and_a_saved_model_predict_the_same(tmp_path):
    module = build()
    apply_alibi(module)
    input_ids = tokens(40)
    with torch.no_grad():
        wanted = module(input_ids).logits
        assert torch.equal(copy.deepcopy(module)(input_ids).logits, wanted)
        module.save_pretrained(tmp_path)
        again = GPT2Model.from_pretrained(tmp_path, tokenizer_name=None)
        assert torch.equal(again({"input_ids": input_ids})["logits"], wanted)


def test_flex_attention_has_the_same_formula():
    """Its reference on a CPU; the compiled kernel needs a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    module = build(5)
    apply_alibi(module)
    layer = module.transformer.h[0].attn
    slopes = layer.alibi_slopes
    query, key, value = torch.randn(3, 2, 5, 12, 8, generator=torch.Generator().manual_seed(0))

    def biased_and_causal(score, batch, head, q, k):
        score = _score_bias(slopes)(score, batch, head, q, k)
        return torch.where(q >= k, score, -torch.inf)

    by_flex = flex_attention(query, key, value, score_mod=biased_and_causal, scale=8**-0.5)
    by_sdpa, _ = _FUNCTIONS["sdpa"](layer, query, key, value, None, is_causal=True)
    assert isinstance(by_flex, torch.Tensor)
    torch.testing.assert_close(by_flex.transpose(1, 2), by_sdpa, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_flex_attention_trains_on_a_gpu():
    flex, sdpa = build(4).cuda(), build(4).cuda()
    apply_alibi(flex, kernel="flex")
    apply_alibi(sdpa)
    input_ids = tokens(256).cuda()
    for module in (flex, sdpa):
        module(input_ids, labels=input_ids).loss.backward()
    for one, other in zip(flex.parameters(), sdpa.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-2, atol=1e-4)


# --- What is refused ------------------------------------------------------------------------------


def test_kernels_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="must be one of sdpa, eager, flex"):
        ALiBi(kernel="flash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trains on GPUs only, got a CPU"):
        apply_alibi(build(), kernel="flex")
    assert "attn_pdrop 0.1" in str(_kernel_problem("flex", False, 0.1))
    assert _kernel_problem("flex", False, 0.0) is None
    module = build()
    module.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="got 'flash_attention_2', which has no biases"):
        apply_alibi(module)


@pytest.mark.parametrize("scaling", [0.0, -1.0, 0.3, 2.0, 0.75])
def test_a_scaling_that_divides_nothing_is_refused(scaling):
    with pytest.raises(ValueError, match="1 or one over a whole number"):
        ALiBi(train_sequence_length_scaling=scaling)


def test_a_sequence_length_that_cannot_be_divided_is_refused():
    model = {"attn_implementation": "sdpa", "attn_pdrop": 0.0}
    plan = Plan(1026, True, "fp32", model)
    with pytest.raises(ValueError, match=r"\(1026\) into whole parts, got 0.25"):
        ALiBi(0.25).check_plan(plan)
    ALiBi(0.5).check_plan(plan)


def test_attention_that_goes_another_way_is_noticed(monkeypatch):
    """As when a transformers release stops asking the interface."""
    from transformers.models.gpt2 import modeling_gpt2

    monkeypatch.setattr(
        modeling_gpt2,
        "ALL_ATTENTION_FUNCTIONS",
        {f"composer_gpt2_alibi_{k}": plain for k in _FUNCTIONS},
    )
    with pytest.raises(NoEffectError, match="does not go through"):
        apply_alibi(build())


def plain(layer, query, key, value, attention_mask, dropout=0.0, is_causal=None, **_):
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return output.transpose(1, 2), None


# --- Training at a part of the length ------------------------------------------------------------


def test_an_interrupted_batch_leaves_the_micro_batch_as_it_was():
    from composer import Callback

    class Interrupt(Callback):
        shapes: list[tuple[int, ...]] = []  # noqa: RUF012
        n_left = 1

        def before_forward(self, state, logger):
            self.shapes.append(tuple(state.batch["input_ids"].shape))
            if self.n_left:
                self.n_left -= 1
                raise KeyboardInterrupt

    watch = Interrupt()
    run = trainer(build_network(), [ALiBi(0.25)], microbatch_size=1, callbacks=[watch])
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    run.fit()
    run.close()
    assert set(watch.shapes) == {(4, N_TOKENS // 4)}
    assert run.state.device_train_microbatch_size == 1


def test_batches_are_split_and_micro_batches_keep_their_tokens():
    run, losses = train(build_network(), [ALiBi(0.25)], microbatch_size=1)
    # 4 sequences of 32 tokens become 16 of 8, in micro-batches of 4 x 8 = 1 x 32 tokens.
    assert losses.shapes == [(4, N_TOKENS // 4)] * 3 * 4
    assert run.state.device_train_microbatch_size == 1
    assert run.state.timestamp.token.value == 3 * 4 * N_TOKENS
    assert run.state.timestamp.sample.value == 3 * 4  # as the corpus counts, for the resume
