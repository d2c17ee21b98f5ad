from __future__ import annotations

import functools
import hashlib
import json
import socket
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_gpt2 import tokenizer
from composer_gpt2.tokenizer import END_OF_TEXT, get_encoding, get_tokenizer, token_byte_lengths

hugging_face = functools.cache(get_tokenizer)

# Arbitrary Unicode (no lone surrogates: they are no text), and what tokenizers stumble over:
# control characters, emoji with modifiers, contractions, special tokens, long runs of one letter.
characters = st.characters(exclude_categories=("Cs",))
runs = st.builds(
    lambda character, n: character * n,
    st.sampled_from(
        [" ", "\n", "\t", "a", "Z", "0", "!", "\u00a0", "\u3000", "\u00e9", "\U0001f600"]
    ),
    st.integers(1, 3_000),
)
pieces = st.one_of(
    st.text(characters),
    runs,
    st.text(st.characters(categories=("Cc", "Cf", "Zs", "Zl", "Zp"))),
    st.text(st.characters(min_codepoint=0x1F300, max_codepoint=0x1FAFF)),
    st.sampled_from(
        [
            "<|endoftext|>",
            "don't",
            "WE'LL",
            "'s",
            "\r\n",
            "\u200d\ufe0f",
            "\U0001f468\u200d\U0001f469",
        ]
    ),
)
texts = st.lists(pieces, max_size=6).map("".join)


@settings(max_examples=400, deadline=None)
@given(texts)
def test_both_tokenizers_agree_and_lose_nothing(text):
    ids = get_encoding().encode_ordinary(text)
    assert hugging_face()(text, split_special_tokens=True)["input_ids"] == ids
    assert get_encoding().decode(ids) == text
    assert hugging_face().decode(ids, clean_up_tokenization_spaces=False) == text
    assert END_OF_TEXT not in ids


def test_known_ids():
    ids = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert get_encoding().encode_ordinary("Hello, I'm a language model,") == ids
    assert hugging_face()("Hello, I'm a language model,")["input_ids"] == ids
    assert get_encoding().eot_token == hugging_face().eos_token_id == END_OF_TEXT == 50256
    assert get_encoding().n_vocab == len(hugging_face()) == tokenizer.VOCAB_SIZE


def test_the_vocabulary_is_the_file_that_openai_published():
    vocabulary = sorted(hugging_face().get_vocab().items(), key=lambda entry: entry[1])
    published = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    assert hashlib.sha256(json.dumps(dict(vocabulary)).encode()).hexdigest() == published


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path):
    from transformers import AutoTokenizer

    hugging_face().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " don't\n\n  stop\u00a0<|endoftext|> \U0001f600"
    assert loaded(text)["input_ids"] == hugging_face()(text)["input_ids"]
    assert loaded.decode(get_encoding().encode_ordinary(text)) == text


def test_byte_lengths_are_those_of_the_text():
    text = "na\u00efve \U0001f600 text"
    ids = get_encoding().encode_ordinary(text)
    assert token_byte_lengths()[ids].sum() == len(text.encode())
    assert token_byte_lengths()[END_OF_TEXT] == 0
    assert token_byte_lengths().shape == (50257,)
    assert (token_byte_lengths()[:END_OF_TEXT] > 0).all()
    assert token_byte_lengths().dtype == np.int64


def test_each_tokenizer_is_its_own():
    first, second = get_tokenizer(), get_tokenizer()
    first.add_tokens(["<user>"])
    assert len(second) == 50257


def test_nothing_touches_the_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    for cached in (get_encoding, tokenizer._load_ranks, tokenizer._tokenizer_json):
        cached.cache_clear()
    assert get_encoding().encode_ordinary("a b") == get_tokenizer()("a b")["input_ids"]


def test_a_damaged_rank_table_is_refused(monkeypatch, tmp_path):
    ranks = resources.files("composer_gpt2").joinpath("assets/r50k_base.tiktoken").read_bytes()
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "r50k_base.tiktoken").write_bytes(ranks[:-1])
    monkeypatch.setattr(resources, "files", lambda _package: tmp_path)
    tokenizer._load_ranks.cache_clear()
    with pytest.raises(RuntimeError, match=f"must have sha256 {tokenizer.RANKS_SHA256}, got "):
        tokenizer._load_ranks()
