"""Models compared on the same tokens."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from test_importing import nanogpt
from typer.testing import CliRunner

from composer_gpt2.algorithms import apply_pad_vocabulary
from composer_gpt2.cli import app
from composer_gpt2.data.array_corpus import write_array_corpus
from composer_gpt2.data.streaming import StreamingTokens
from composer_gpt2.model import GPT2Model
from composer_gpt2.side_by_side import compare, format_comparison
from composer_gpt2.tokenizer import token_byte_lengths


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Hugging Face folder (context 64), the same padded, and nanoGPT's file (context 32)."""
    folder = tmp_path_factory.mktemp("models")
    model = GPT2Model.from_name("gpt2-tiny", n_embd=32, n_positions=64)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.model.save_pretrained(folder / "plain")
    apply_pad_vocabulary(model)
    model.model.save_pretrained(folder / "padded")
    nanogpt(folder / "ckpt.pt")
    return [str(folder / name) for name in ("plain", "padded", "ckpt.pt")]


def test_the_losses_are_those_of_the_models_own_forward_pass(models, tiny_corpus):
    plain, padded = compare(models[:2], tiny_corpus, max_sequences=5, batch_tokens=128)
    dataset = StreamingTokens(
        remote=tiny_corpus, split="validation", sequence_length=64, batch_size=1
    )
    tokens = torch.stack([torch.from_numpy(dataset[i]["input_ids"]) for i in range(5)])
    with torch.no_grad():
        expected = GPT2Model.from_pretrained(models[0])({"input_ids": tokens, "labels": tokens})
    assert plain.loss == pytest.approx(float(expected.loss), rel=1e-5)
    assert plain.perplexity == pytest.approx(math.exp(plain.loss))
    assert (plain.n_tokens, plain.sequence_length) == (5 * 63, 64)
    n_bytes = token_byte_lengths()[tokens[:, 1:].numpy()].sum()
    bits = plain.loss * plain.n_tokens / math.log(2) / n_bytes
    assert plain.bits_per_byte == pytest.approx(bits, rel=1e-6)
    # Padding changes nothing.
    assert padded.difference == pytest.approx(0, abs=1e-5)
    assert padded.standard_error < 1e-5


def test_only_targets_of_a_masked_corpus_count(models, tmp_path):
    generator = np.random.default_rng(3)
    tokens = generator.integers(0, 50257, (7, 24))
    mask = generator.integers(0, 2, (7, 24))
    mask[2] = 0  # nothing is asked of it
    write_array_corpus(
        tmp_path / "corpus",
        {"validation": tokens},
        loss_masks={"validation": mask},
        source="random numbers",
    )
    plain, _ = compare(models[:2], str(tmp_path / "corpus"))
    inputs, wanted = torch.from_numpy(tokens), torch.from_numpy(mask).bool()
    with torch.no_grad():
        model = GPT2Model.from_pretrained(models[0])
        expected = model({"input_ids": inputs, "labels": inputs.masked_fill(~wanted, -100)})
    assert plain.loss == pytest.approx(float(expected.loss), rel=1e-5)
    assert plain.n_tokens == mask[:, 1:].sum()


def test_all_read_the_same_tokens_in_the_shortest_context(models, tiny_corpus):
    plain, foreign = compare([models[0], models[2]], tiny_corpus, max_sequences=3)
    assert plain.sequence_length == foreign.sequence_length == 32
    assert plain.n_tokens == foreign.n_tokens == 3 * 2 * 31
    assert foreign.difference == pytest.approx(foreign.loss - plain.loss)
    assert foreign.standard_error > 0


def test_the_error_is_that_of_a_mean_of_paired_differences(models, tiny_corpus, tmp_path):
    GPT2Model.from_name("gpt2-tiny", n_embd=32, n_positions=64).model.save_pretrained(tmp_path)
    runs = [compare([models[0], str(tmp_path)], tiny_corpus, max_sequences=n)[1] for n in (1, 2, 3)]
    sums = [run.difference * run.n_tokens for run in runs]  # nats, of 1, 2 and 3 sequences
    each = [sums[0], sums[1] - sums[0], sums[2] - sums[1]]
    expected = statistics.stdev(each) / math.sqrt(3) / 63  # 63 predicted tokens a sequence
    assert runs[2].standard_error == pytest.approx(expected, rel=1e-4)


def test_other_tokenizers_and_single_models_are_refused(models, tiny_corpus, tmp_path):
    with pytest.raises(ValueError, match="at least two models"):
        compare(models[:1], tiny_corpus)
    with pytest.raises(ValueError, match="max_sequences must be at least 1"):
        compare(models[:2], tiny_corpus, max_sequences=0)
    with pytest.raises(FileNotFoundError):
        compare(models[:2], str(tmp_path))
    from composer_gpt2.tokenizer import get_tokenizer

    other = GPT2Model.from_name("gpt2-tiny", n_embd=32, vocab_size=50300)
    other.model.save_pretrained(tmp_path / "other")
    tokenizer = get_tokenizer()
    tokenizer.add_tokens(["<new>"])
    smaller = tokenizer.train_new_from_iterator(["a few words and no more"], 270)
    smaller.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="must have one tokenizer"):
        compare([models[0], str(tmp_path / "other")], tiny_corpus)


def test_the_command_prints_a_table(models, tiny_corpus):
    arguments = ["compare", *models[:2], "--data", tiny_corpus, "--max-sequences", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    table = format_comparison(compare(models[:2], tiny_corpus, max_sequences=2))
    assert result.stdout.strip() == table
    assert table.splitlines()[0].split() == [
        "model",
        "loss",
        "perplexity",
        "bits/byte",
        "difference",
    ]
    assert "126 predicted tokens in sequences of 64" in table
