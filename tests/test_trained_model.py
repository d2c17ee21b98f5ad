from __future__ import annotations

import pytest

from composer_gpt2.model import GPT2Model
from composer_gpt2.text_codec import text_codec
from composer_gpt2.tokenizer import END_OF_TEXT
from composer_gpt2.trained_model import find_checkpoint, load_trained_model


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    assert find_checkpoint(str(tmp_path)) == str(tmp_path)
    checkpoints = tmp_path / "elsewhere"
    (tmp_path / "recipe.yaml").write_text(f"save_folder: {checkpoints}\n")
    with pytest.raises(FileNotFoundError, match="must have saved a checkpoint"):
        find_checkpoint(str(tmp_path))
    checkpoints.mkdir()
    (checkpoints / "latest-rank0.pt").touch()
    assert find_checkpoint(str(tmp_path)) == str(checkpoints / "latest-rank0.pt")
    (tmp_path / "recipe.yaml").write_text("save_folder: s3://bucket/run\n")
    assert find_checkpoint(str(tmp_path)) == "s3://bucket/run/latest-rank0.pt"


def test_a_loaded_model_is_ready_to_be_used(tmp_path):
    GPT2Model.from_name("gpt2-tiny", n_embd=32).model.save_pretrained(tmp_path)
    model = load_trained_model(str(tmp_path), device="cpu")
    assert not model.training
    codec = text_codec(model)
    assert codec.document_start == END_OF_TEXT
    assert (
        codec.decode([END_OF_TEXT, *codec.encode("as <|endoftext|> is")]) == "as <|endoftext|> is"
    )


def test_a_model_without_tokenizer_cannot_read():
    with pytest.raises(ValueError, match="must have a tokenizer"):
        text_codec(GPT2Model.from_name("gpt2-tiny", n_embd=32, tokenizer_name=None))
