"""Text from models of every kind, against the definition: the network on all tokens, no cache."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from composer_gpt2 import cli
from composer_gpt2.algorithms import (
    apply_alibi,
    apply_fused_block,
    apply_fused_cross_entropy,
    apply_fused_gelu,
    apply_pad_vocabulary,
    apply_parallel_residual,
)
from composer_gpt2.contract import NoEffectError
from composer_gpt2.generation import Sampling, TextGenerator, generate
from composer_gpt2.generation.network import Batch
from composer_gpt2.generation.prompts import read_prompts
from composer_gpt2.generation.text_generator import DivergedModelError
from composer_gpt2.model import GPT2Model
from composer_gpt2.tokenizer import END_OF_TEXT, get_encoding

PROMPTS = ["Hello, I'm", "", " a b c d e f g", "Hello, I'm", "one two three four"]
GREEDY = Sampling(temperature=0)


def build(*algorithms, **settings) -> GPT2Model:
    torch.manual_seed(17)
    model = GPT2Model.from_name("gpt2-tiny", n_embd=64, n_positions=64, dropout=0.0, **settings)
    for parameter in model.parameters():  # away from the near-uniform predictions of a new network
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    for apply in algorithms:
        apply(model)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT2Model:
    return build()


def greedy_by_definition(model, prompt, n_tokens) -> str:
    ids = [END_OF_TEXT, *get_encoding().encode_ordinary(prompt)]
    n_before = len(ids)
    with torch.inference_mode():
        for _ in range(n_tokens):
            logits = model.eval()({"input_ids": torch.tensor([ids])}).logits[0, -1]
            ids.append(int(logits.argmax()))
    return get_encoding().decode(ids[n_before:])


@pytest.mark.parametrize(
    "algorithms",
    [
        (),
        (apply_alibi,),
        (lambda model: apply_alibi(model, kernel="eager"),),
        (apply_parallel_residual,),
        (apply_pad_vocabulary, apply_fused_gelu, apply_fused_cross_entropy),
        (apply_alibi, apply_parallel_residual),
        (apply_fused_block,),
        (apply_alibi, apply_fused_block),
    ],
)
def test_greedy_text_is_the_likeliest_token_each_time(algorithms):
    try:
        model = build(*algorithms)
    except NoEffectError as error:
        pytest.skip(str(error))
    expected = [greedy_by_definition(model, prompt, 12) for prompt in PROMPTS]
    generator = TextGenerator(model)
    # One by one and together, where prompts of other lengths stand beside each other.
    for together in (PROMPTS, *([prompt] for prompt in PROMPTS)):
        samples = generator.generate(together, max_new_tokens=12, sampling=GREEDY)
        assert [s.text for s in samples] == [expected[PROMPTS.index(p)] for p in together]
    assert generator._network.fast_step is not None  # and the module's own step, at the first token
    generator._network.fast_step = None
    samples = generator.generate(PROMPTS, max_new_tokens=12, sampling=GREEDY)
    assert [sample.text for sample in samples] == expected


def test_blocks_of_another_kind_go_through_the_network():
    model = build()
    scale = nn.Parameter(torch.tensor(0.5))
    for block in model.model.transformer.h:  # an algorithm that the fast step knows nothing of
        block.mlp.register_forward_hook(lambda module, inputs, output: output * scale)
    generator = TextGenerator(model)
    samples = generator.generate(PROMPTS, max_new_tokens=8, sampling=GREEDY)
    assert generator._network.fast_step is None
    assert [s.text for s in samples] == [greedy_by_definition(model, p, 8) for p in PROMPTS]


def test_eager_attention_and_scaled_scores():
    model = build(attn_implementation="eager", scale_attn_by_inverse_layer_idx=True)
    generator = TextGenerator(model)
    assert generator._network.fast_step is None
    samples = generator.generate(PROMPTS, max_new_tokens=8, sampling=GREEDY)
    assert [s.text for s in samples] == [greedy_by_definition(model, p, 8) for p in PROMPTS]


@pytest.mark.parametrize(
    "algorithms",
    [
        (),
        (apply_alibi, apply_parallel_residual),
        (apply_pad_vocabulary, apply_fused_gelu),
        (apply_fused_block,),
    ],
)
def test_bfloat16_is_close_to_float32(algorithms):
    try:
        exact = build(*algorithms)
        model = build(*algorithms, cpu_precision="amp_bf16")
    except NoEffectError as error:
        pytest.skip(str(error))
    network = TextGenerator(model)._network
    prompts, following = (
        [[END_OF_TEXT, 5, 6, 7], [END_OF_TEXT]],
        torch.tensor([[3, 4, 5], [8, 9, 1]]),
    )
    with torch.inference_mode():
        batch = Batch(network, prompts, max_new_tokens=4)
        for n in range(4):
            assert batch.logits.dtype is torch.bfloat16
            for row, prompt in enumerate(prompts):
                ids = torch.tensor([[*prompt, *following[row, :n]]])
                expected = exact({"input_ids": ids}).logits[0, -1, :50257]
                difference = (batch.logits[row].float() - expected).abs().max()
                assert 0 < difference < 0.03 * (expected.max() - expected.min())
            if n < 3:
                batch.step(following[:, n].tolist())
    assert network.fast_step is not None


def test_samples_are_repeatable_and_different(model):
    first = generate(model, "a", max_new_tokens=8, n_samples=3, seed=1)
    assert len(set(first)) == 3
    assert generate(model, "a", max_new_tokens=8, n_samples=3, seed=1) == first
    assert generate(model, "a", max_new_tokens=8, n_samples=3, seed=2) != first
    assert generate(model, "a", max_new_tokens=8) != generate(model, "a", max_new_tokens=8)
    assert all(text.startswith("a") for text in first)


def test_a_sample_depends_on_nothing_beside_it(model):
    generator = TextGenerator(model)
    settings = {"seed": 5, "sampling": Sampling(0.8, top_k=500, top_p=0.95, typical_p=0.9)}
    all_at_once = generator.generate(PROMPTS, n_samples=3, max_new_tokens=10, **settings)
    texts = [sample.text for sample in all_at_once]
    assert len(texts) == 15
    in_parts = generator.generate(PROMPTS, n_samples=3, max_new_tokens=10, batch_size=4, **settings)
    assert [sample.text for sample in in_parts] == texts
    one_by_one = [
        sample.text
        for prompt in PROMPTS
        for sample in generator.generate([prompt], n_samples=3, max_new_tokens=10, **settings)
    ]
    assert one_by_one == texts
    fewer = generator.generate(PROMPTS, n_samples=2, max_new_tokens=10, **settings)
    assert [sample.text for sample in fewer] == [t for i, t in enumerate(texts) if i % 3 < 2]


def test_streamed_text_is_the_text(model):
    generator = TextGenerator(model)
    settings = {"n_samples": 2, "max_new_tokens": 20, "seed": 3, "stop": ["ee", "7"]}
    samples = generator.generate(PROMPTS, **settings)
    pieces = list(generator.stream(PROMPTS, **settings))
    assert len(pieces) > len(samples)
    for number, sample in enumerate(samples):
        own = [p for p in pieces if (p.prompt, p.sample) == divmod(number, 2)]
        assert "".join(piece.text for piece in own) == sample.text
        assert [piece.ending for piece in own] == [None] * (len(own) - 1) + [sample.ending]
    assert {sample.ending for sample in samples} == {"stop string", "length"}
    assert not any("ee" in sample.text or "7" in sample.text for sample in samples)


def test_texts_end_each_for_itself():
    """A document that ends gives its row away; the others go on as if alone."""
    model = build()
    with torch.no_grad():  # the end of a document gets a few percent
        model.model.transformer.ln_f.weight[0] = 0.0
        model.model.transformer.ln_f.bias[0] = 1.0
        model.model.transformer.wte.weight[:, 0] = 0.0
        model.model.transformer.wte.weight[END_OF_TEXT, 0] = 9.0
    generator = TextGenerator(model)
    settings = {"n_samples": 8, "max_new_tokens": 40, "seed": 1}
    samples = generator.generate(PROMPTS, **settings)
    alone = [generator.generate([prompt], **settings) for prompt in PROMPTS]
    assert samples == [sample for of_prompt in alone for sample in of_prompt]
    ended = [sample for sample in samples if sample.ending == "document end"]
    assert 5 < len(ended) < len(samples)
    assert len({len(sample.tokens) for sample in ended}) > 3
    assert not any(END_OF_TEXT in [token.id for token in s.tokens] for s in samples)


def test_log_probabilities_are_the_networks(model):
    (sample,) = TextGenerator(model).generate(
        ["one two"], max_new_tokens=6, seed=1, n_alternatives=3, sampling=Sampling(0.5, top_k=20)
    )
    ids = [END_OF_TEXT, *get_encoding().encode_ordinary("one two")]
    for token in sample.tokens:
        logs = model({"input_ids": torch.tensor([ids])}).logits[0, -1].log_softmax(-1)
        # float32 in another order, over logits up to 10
        assert token.log_probability == pytest.approx(float(logs[token.id]), abs=1e-4)
        best = logs.topk(3)
        assert [i for i, _ in token.alternatives] == best.indices.tolist()
        expected = pytest.approx(best.values.tolist(), abs=1e-4)
        assert [log for _, log in token.alternatives] == expected
        ids.append(token.id)


def test_padding_of_the_vocabulary_is_never_drawn():
    """Neither that of pad_vocabulary nor rows that an imported model brings along."""
    model = build(apply_pad_vocabulary)
    hot = Sampling(temperature=100.0)  # all tokens are about equally likely: 47 of 50,304 are none
    samples = TextGenerator(model).generate([""] * 20, max_new_tokens=63, sampling=hot, seed=1)
    other = build(vocab_size=60_000)
    samples += TextGenerator(other).generate([""] * 4, max_new_tokens=63, sampling=hot, seed=1)
    ids = [token.id for sample in samples for token in sample.tokens]
    assert len(ids) > 1400
    assert max(ids) < END_OF_TEXT


def test_one_candidate_is_greedy(model):
    greedy = generate(model, "a", max_new_tokens=5, temperature=0)
    assert generate(model, "a", max_new_tokens=5, top_k=1, seed=3) == greedy
    assert generate(model, "a", max_new_tokens=5, top_p=1e-9, seed=3) == greedy


def test_writing_leaves_no_trace(model):
    model.train()
    model.model.lm_head.eval()  # someone's own mixture of modes
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    generate(model, "", max_new_tokens=3, seed=5)
    generate(model, "", max_new_tokens=3)
    stream = TextGenerator(model).stream([""], max_new_tokens=5)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_numbers_out_of_range_are_refused(model):
    generator = TextGenerator(model)
    wrong = {"n_samples": 0, "max_new_tokens": 0, "batch_size": 0, "seed": -1, "stop": [""]}
    with pytest.raises(ValueError, match="must be at least 1") as raised:
        generator.stream(["a"], **wrong)
    assert all(name in str(raised.value) for name in wrong)
    with pytest.raises(ValueError, match="at least one, got none"):
        generator.stream([])
    with pytest.raises(ValueError, match="precision must be fp32 or amp_bf16"):
        TextGenerator(model, "fp16")


def test_prompts_that_do_not_fit_are_refused_together(model):
    with pytest.raises(ValueError, match=r"64 positions, got 61 \+ 10"):
        generate(model, " a" * 60, max_new_tokens=10)
    with pytest.raises(ValueError, match=r"(?s)prompt 1: .*prompt 3: ") as raised:
        TextGenerator(model).stream([" a" * 60, "", " b" * 60], max_new_tokens=10)
    assert "prompt 2" not in str(raised.value)


def test_a_model_without_positions_writes_on_beyond_them():
    model = build(apply_alibi)
    assert model.context_length is None
    prompts = [" a" * 60, " b c" * 40]
    samples = TextGenerator(model).generate(prompts, max_new_tokens=20, sampling=GREEDY)
    expected = [greedy_by_definition(model, prompt, 20) for prompt in prompts]
    assert [sample.text for sample in samples] == expected


def test_a_diverged_model_is_refused():
    model = build()
    with torch.no_grad():
        model.model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(DivergedModelError, match="got NaN or infinity"):
        generate(model, "a", max_new_tokens=2)


def test_a_model_of_characters(tmp_path):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = {character: i for i, character in enumerate("abc \u00e9\U0001f600")}
    tokenizer = Tokenizer(models.WordLevel(alphabet, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    model = build(tokenizer_name=str(tmp_path), vocab_size=8)
    generator = TextGenerator(model)
    assert generator.codec.n_tokens == 6
    assert generator.codec.document_start is None
    (sample,) = generator.generate(["ab c"], max_new_tokens=30, seed=1, stop=["\U0001f600"])
    assert set(sample.text) <= set("abc \u00e9")
    assert sample.ending == "stop string"
    with pytest.raises(ValueError, match="must have a token where the model knows no beginning"):
        generator.stream([""])


# --- The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    model.model.save_pretrained(path)
    return str(path)


def command(*arguments: object) -> None:
    cli.app(["generate", *map(str, arguments)], standalone_mode=False)


def test_the_command_prints_what_it_streams(folder, model, capsys):
    options = (folder, "-p", "a", "-p", "b", "-n", 2, "-m", 8, "--seed", 1, "--top-p", 0.9)
    command(*options, "--stop", r"\n", "--batch-size", 3)
    printed = capsys.readouterr()
    assert printed.out.count("\n---\n") == 3
    samples = TextGenerator(model).generate(
        ["a", "b"], n_samples=2, max_new_tokens=8, seed=1, sampling=Sampling(top_p=0.9), stop=["\n"]
    )
    texts = [sample.prompt + sample.text for sample in samples]
    assert printed.out == "\n---\n".join(texts) + "\n"
    assert "tokens/s" in printed.err
    command(*options, "--stop", r"\n", "--batch-size", 3, "--stream")
    assert capsys.readouterr().out == printed.out


def test_prompts_come_from_files_and_standard_input(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "one.txt").write_text("first\nsecond\n\n")
    (tmp_path / "many.jsonl").write_text('"third"\n\n{"prompt": "fourth "}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("fifth\r\n"))
    files = ("--prompt-file", tmp_path / "one.txt", "--prompt-file", tmp_path / "many.jsonl")
    command(folder, "-p", "-", *files, "-m", 1, "--temperature", 0)
    texts = capsys.readouterr().out.split("\n---\n")
    starts = ["fifth", "first\nsecond\n", "third", "fourth "]
    assert len(texts) == 4
    assert all(text.startswith(start) for text, start in zip(texts, starts, strict=True))
    (tmp_path / "bad.jsonl").write_text('"a"\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2 must be a string or"):
        command(folder, "--prompt-file", tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="at least one prompt, got none"):
        command(folder, "--prompt-file", tmp_path / "empty.jsonl")


def test_lines_of_prompts_end_with_line_feeds_alone(tmp_path):
    prompts = ["one\u2028two\x85three", "four"]
    text = "\r\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
    (tmp_path / "many.jsonl").write_bytes(text.encode())
    assert read_prompts([], [str(tmp_path / "many.jsonl")]) == prompts


def test_what_is_wrong_is_said_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="top_p must be above 0"):
        command("none", "--top-p", 2)
