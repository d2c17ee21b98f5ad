from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from composer_gpt2.data.array_corpus import write_array_corpus
from composer_gpt2.data.streaming import StreamingTokens, build_token_dataloader
from composer_gpt2.data.verification import DamagedCorpusError, verify
from composer_gpt2.model import GPT2Model
from composer_gpt2.small_tokenizers import character_tokenizer

T = 8


@pytest.fixture
def corpus(tmp_path):
    """Digits, of which the second half are targets; a tokenizer of its own."""
    tokens = np.random.default_rng(17).integers(0, 10, (40, T))
    mask = np.broadcast_to(np.arange(T) >= 4, tokens.shape)
    write_array_corpus(
        tmp_path / "corpus",
        {"train": tokens, "validation": tokens[:8]},
        tokenizer=character_tokenizer("0123456789"),
        loss_masks={"train": mask, "validation": mask[:8]},
        source="a test",
    )
    return tmp_path / "corpus", tokens


def read(folder, **options):
    dataset = StreamingTokens(
        remote=str(folder),
        sequence_length=T,
        batch_size=4,
        tokenizer=str(folder / "tokenizer"),
        **options,
    )
    return list(build_token_dataloader(dataset))


def test_samples_come_back_with_labels_where_the_mask_says(corpus):
    folder, tokens = corpus
    batches = read(folder)
    ids = torch.cat([batch["input_ids"] for batch in batches]).numpy()
    labels = torch.cat([batch["labels"] for batch in batches]).numpy()
    np.testing.assert_array_equal(ids, tokens)
    np.testing.assert_array_equal(labels[:, 4:], tokens[:, 4:])
    assert (labels[:, :4] == -100).all()


def test_the_loss_is_that_of_the_targets_alone(corpus):
    folder, _ = corpus
    batch = read(folder)[0]
    torch.manual_seed(17)
    model = GPT2Model.from_name(
        "gpt-nano", vocab_size=10, n_positions=T, dropout=0.0, tokenizer_name=None
    )
    outputs = model(batch)
    by_hand = torch.nn.functional.cross_entropy(
        outputs.logits[:, 3:-1].flatten(0, 1), batch["input_ids"][:, 4:].flatten()
    )
    torch.testing.assert_close(outputs.loss, by_hand)


def test_it_verifies_and_damage_is_found(corpus):
    folder, _ = corpus
    assert verify(str(folder), progress=False)["loss_mask"] is True
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["0"], tokenizer["model"]["vocab"]["1"] = 1, 0
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DamagedCorpusError, match=r"corpus.json: tokenizer must be"):
        verify(str(folder), progress=False)
    with pytest.raises(ValueError, match="sha256 of the tokenizer must be"):
        read(folder)


def test_another_tokenizer_is_refused(corpus, tmp_path):
    folder, _ = corpus
    with pytest.raises(ValueError, match="the tokenizer must be 'gpt2', but"):
        StreamingTokens(remote=str(folder), sequence_length=T, batch_size=4)
    character_tokenizer("abc").save_pretrained(tmp_path / "abc")
    with pytest.raises(ValueError, match="sha256 of the tokenizer must be"):
        StreamingTokens(
            remote=str(folder), sequence_length=T, batch_size=4, tokenizer=str(tmp_path / "abc")
        )


def test_masked_and_plain_corpora_mix(corpus, tmp_path):
    folder, tokens = corpus
    write_array_corpus(
        tmp_path / "plain",
        {"train": tokens},
        tokenizer=character_tokenizer("0123456789"),
        source="a test",
    )
    dataset = StreamingTokens(
        streams={"a": {"remote": str(folder)}, "b": {"remote": str(tmp_path / "plain")}},
        sequence_length=T,
        batch_size=80,
        tokenizer=str(folder / "tokenizer"),
    )
    (batch,) = build_token_dataloader(dataset)
    masked = (batch["labels"] == -100).any(dim=1)
    assert masked.sum() == 40
    torch.testing.assert_close(batch["labels"][~masked], batch["input_ids"][~masked])


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (np.zeros((3, 0)), None, r"shape \(N, T\)"),
        (np.zeros(8), None, r"shape \(N, T\)"),
        (np.full((2, 4), 10), None, "must be from 0 to 9, got 10 to 10"),
        (np.zeros((2, 4), int), np.full((2, 4), 2), "must be 0 or 1"),
        (np.zeros((2, 4), int), np.ones((2, 3), int), "of shape"),
    ],
)
def test_arrays_that_are_no_samples_are_refused(tmp_path, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        write_array_corpus(
            tmp_path / "x",
            {"train": tokens},
            tokenizer=character_tokenizer("0123456789"),
            loss_masks=None if mask is None else {"train": mask},
            source="a test",
        )


def test_only_a_corpus_of_arrays_is_replaced(corpus, tmp_path):
    folder, tokens = corpus
    write_array_corpus(folder, {"train": tokens[:5]}, source="a test")
    assert verify(str(folder), progress=False)["splits"].keys() == {"train"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="must be empty or hold a corpus written from arrays"):
        write_array_corpus(tmp_path / "mine", {"train": tokens}, source="a test")
    assert (tmp_path / "mine" / "thesis.txt").exists()
