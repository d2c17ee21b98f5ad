from __future__ import annotations

import pytest

from composer_gpt2.model import GPT2Model
from composer_gpt2.small_tokenizers import byte_tokenizer, character_tokenizer
from composer_gpt2.text_codec import text_codec
from composer_gpt2.tokenizer_by_name import describe_tokenizer, load_tokenizer

TEXT = "First, hear me:\n\n  speak \u8a9e\U0001f600!\n"


def test_a_character_is_a_token_in_the_order_of_code_points():
    tokenizer = character_tokenizer(TEXT)
    ids = tokenizer.encode(TEXT)
    assert ids == [sorted(set(TEXT)).index(character) for character in TEXT]
    assert tokenizer.decode(ids) == TEXT


def test_a_byte_is_its_own_token():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(list(TEXT.encode())) == TEXT
    assert len(tokenizer) == 256


@pytest.mark.parametrize("characters", ["", ["ab"]])
def test_what_is_no_alphabet_is_refused(characters):
    with pytest.raises(ValueError, match="must be single characters"):
        character_tokenizer(characters)


def test_a_saved_one_is_loaded_and_recognised(tmp_path):
    character_tokenizer("abc").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode("cab") == [2, 0, 1]
    description = describe_tokenizer(str(tmp_path))
    assert description["vocab_size"] == 3
    load_tokenizer(str(tmp_path)).save_pretrained(tmp_path)
    assert describe_tokenizer(str(tmp_path)) == description
    with pytest.raises(ValueError, match="must be 'gpt2' or a folder"):
        load_tokenizer(str(tmp_path / "none"))


def test_a_model_reads_and_writes_with_its_own(tmp_path):
    character_tokenizer("abc").save_pretrained(tmp_path)
    codec = text_codec(GPT2Model.from_name("gpt-nano", vocab_size=3, tokenizer_name=str(tmp_path)))
    assert codec.decode(codec.encode("cab")) == "cab"
    assert codec.document_start is None
    with pytest.raises(ValueError, match=r"the 3 characters that the model knows, got \['x'\]"):
        codec.encode("axb")
