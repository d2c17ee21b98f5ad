from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from composer_gpt2.model import GPT2Model
from composer_gpt2.text_codec import text_codec
from composer_gpt2.tokenizer import END_OF_TEXT, get_tokenizer
from composer_gpt2.tokenizer_by_name import is_gpt2_tokenizer, read_tokenizer_folder
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


@pytest.fixture
def letters():
    """A tokenizer of GPT-2's kind with as many tokens as the models here."""
    return get_tokenizer().train_new_from_iterator(["first citizen: before we proceed"], 270)


def save_small(folder: Path, vocab_size: int) -> None:
    """A model without a tokenizer."""
    model = GPT2Model.from_name(
        "gpt2-tiny", n_embd=32, vocab_size=vocab_size, tokenizer_name=None
    ).model
    model.save_pretrained(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of a hub that is not reached: names a model, gives the folder of its files."""
    for place in (
        "huggingface_hub.constants.HF_HUB_CACHE",
        "transformers.utils.hub.TRANSFORMERS_CACHE",
    ):
        monkeypatch.setattr(place, str(tmp_path / "cache"), raising=False)
    commit = "a" * 40

    def folder_of(name: str, missing: tuple[str, ...] = ()) -> Path:
        model = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        for folder in ("refs", f"snapshots/{commit}", f".no_exist/{commit}"):
            (model / folder).mkdir(parents=True)
        (model / "refs" / "main").write_text(commit)
        for file in missing:  # as the hub has once said
            (model / ".no_exist" / commit / file).touch()
        return model / "snapshots" / commit

    return folder_of


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def test_a_model_of_the_hub_has_its_own_tokenizer(hub, letters):
    for name, save in (
        ("owner/fast", letters.save_pretrained),
        ("owner/slow", letters.save_vocabulary),
    ):
        folder = hub(name)
        save_small(folder, 270)
        save(str(folder))
        model = GPT2Model.from_pretrained(name)
        assert model.tokenizer.get_vocab() == letters.get_vocab()
        assert GPT2Model.from_pretrained(name, tokenizer_name=None).tokenizer is None
    folder = hub("owner/gpt2s")
    save_small(folder, 50257)
    get_tokenizer().save_pretrained(folder)
    assert GPT2Model.from_pretrained("owner/gpt2s").tokenizer_name == "gpt2"


def test_a_model_of_the_hub_without_tokenizer_has_gpt2s_only_with_its_vocabulary(hub):
    save_small(hub("owner/padded", missing=TOKENIZER_FILES), 50304)
    assert GPT2Model.from_pretrained("owner/padded").tokenizer_name == "gpt2"
    save_small(hub("owner/large", missing=TOKENIZER_FILES), 60000)
    with pytest.raises(ValueError, match=r"owner/large must have a tokenizer.* 60000 tokens"):
        GPT2Model.from_pretrained("owner/large")
    save_small(hub("owner/unknown"), 50257)
    with pytest.raises(FileNotFoundError, match="tokenizer of owner/unknown must be on the hub"):
        GPT2Model.from_pretrained("owner/unknown")
    assert GPT2Model.from_pretrained("owner/unknown", tokenizer_name="gpt2").tokenizer is not None


def test_the_tokenizer_is_asked_of_the_hub(hub, letters, tmp_path, monkeypatch):
    letters.save_pretrained(tmp_path / "there")

    def download(hub_id, name, revision=None, **others):
        if hub_id != "owner/mine":
            return hf_hub_download(hub_id, name, revision=revision, **others)
        assert revision == "a" * 40  # the commit of the weights
        if not (tmp_path / "there" / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / "there" / name)

    save_small(hub("owner/mine"), 270)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = GPT2Model.from_pretrained("owner/mine")
    assert model.tokenizer.get_vocab() == letters.get_vocab()
    (tmp_path / "there" / "tokenizer.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"^tokenizer.json must be JSON, .* in owner/mine; save"):
        GPT2Model.from_pretrained("owner/mine")


def test_a_folder_with_the_files_of_a_slow_tokenizer(letters, tmp_path):
    save_small(tmp_path, 270)
    letters.save_vocabulary(str(tmp_path))
    assert GPT2Model.from_pretrained(tmp_path).tokenizer.get_vocab() == letters.get_vocab()
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"vocab.json and merges.txt .* got only vocab.json"):
        GPT2Model.from_pretrained(tmp_path)
    assert GPT2Model.from_pretrained(tmp_path, tokenizer_name=None).tokenizer is None
    (tmp_path / "merges.txt").write_text("no merges\n")
    (tmp_path / "vocab.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"vocab.json and merges.txt of GPT-2's kind"):
        GPT2Model.from_pretrained(tmp_path)


def test_gpt2s_tokenizer_with_further_tokens_is_another(tmp_path):
    tokenizer = get_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert is_gpt2_tokenizer(read_tokenizer_folder(tmp_path))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    assert not is_gpt2_tokenizer(read_tokenizer_folder(tmp_path))
    save_small(tmp_path, 50258)
    assert GPT2Model.from_pretrained(tmp_path).tokenizer.pad_token_id == 50257
