"""Verification finds each way in which a corpus can be wrong, and names the file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import xxhash

from composer_gpt2.data import prepare, verify
from composer_gpt2.data.object_store import open_store
from composer_gpt2.data.preparation import BadDocumentError
from composer_gpt2.data.verification import DamagedCorpusError

SETTINGS = {
    "sequence_length": 32,
    "validation_fraction": 0.2,
    "shard_size_limit": "8kb",
    "progress": False,
}


@pytest.fixture(params=[None, "zstd"])
def corpus(request, tmp_path) -> Path:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["some", "words", "of", "text"], k=40)) for _ in range(1000)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    prepare([str(tmp_path / "a.jsonl")], str(out), **SETTINGS, compression=request.param)
    return out


def shard_path(corpus: Path, number: int) -> Path:
    (path,) = (corpus / "train").glob(f"shard.{number:05}.mds*")
    return path


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def mistakes(corpus: Path) -> list[str]:
    with pytest.raises(DamagedCorpusError) as raised:
        verify(str(corpus), progress=False)
    first, *lines, last = str(raised.value).splitlines()
    assert first == f"{corpus} must be as it was prepared, but:"
    assert last.startswith("Copy these files again")
    return [line.strip() for line in lines]


def test_a_sound_corpus_passes(corpus):
    assert verify(str(corpus), progress=False) == json.loads((corpus / "corpus.json").read_text())


@pytest.mark.parametrize("at", [0, 100, -1])
def test_one_flipped_bit_is_found_and_its_shard_named(corpus, at):
    path = shard_path(corpus, 3)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    (mistake,) = mistakes(corpus)
    assert mistake.startswith(f"train/{path.name}: must have xxh64 ")


def test_missing_truncated_and_extra_shards_are_named(corpus):
    truncated, missing = shard_path(corpus, 0), shard_path(corpus, 1)
    truncated.write_bytes(truncated.read_bytes()[:-1])
    missing.unlink()
    (corpus / "train/shard.00099.mds").write_bytes(b"")
    found = mistakes(corpus)
    assert len(found) == 3
    assert found[0].startswith(f"train/{truncated.name}: must have ")
    assert "bytes, got" in found[0]
    assert found[1] == f"train/{missing.name}: is missing"
    assert found[2] == "train/shard.00099.mds: is not in train/index.json"


@pytest.mark.parametrize("corpus", [None], indirect=True)
def test_tokens_outside_the_vocabulary_are_found_even_with_a_matching_hash(corpus):
    path = corpus / "train/shard.00002.mds"
    data = bytearray(path.read_bytes())
    data[-2:] = np.uint16(50257).tobytes()
    path.write_bytes(data)

    def adopt(index):
        index["shards"][2]["raw_data"]["hashes"]["xxh64"] = xxhash.xxh64_hexdigest(data)

    edit_json(corpus / "train/index.json", adopt)
    assert mistakes(corpus) == ["train/shard.00002.mds: tokens must be below 50257, got 50257"]


def test_an_index_that_does_not_add_up_is_found(corpus):
    edit_json(corpus / "train/index.json", lambda index: index["shards"].pop())
    found = mistakes(corpus)
    assert any("is not in train/index.json" in mistake for mistake in found)
    assert any(mistake.startswith("train/index.json: must have ") for mistake in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["tokenizer"].update(ranks_sha256="0"), "corpus.json: tokenizer must be"),
        (lambda c: c.update(version=2), "corpus.json: version must be 1, got 2"),
        (lambda c: c["splits"]["train"].update(documents=1), "documents must be the number of"),
        (lambda c: c["splits"]["train"].update(tokens=1), "must be tokens (1), got"),
        (lambda c: c.update(sequence_length=16), "must be ['ndarray:uint16:16']"),
    ],
)
def test_a_wrong_corpus_json_is_found(corpus, change, message):
    edit_json(corpus / "corpus.json", change)
    assert any(message in mistake for mistake in mistakes(corpus))


def test_a_lost_or_broken_index_is_named(corpus):
    (corpus / "train/index.json").unlink()
    (corpus / "validation/index.json").write_text('{"shards": [')
    lost, broken = mistakes(corpus)
    assert lost == "train/index.json: is missing"
    assert broken.startswith("validation/index.json: is not an index")


def test_no_corpus_and_an_unfinished_one_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no corpus\.json"):
        verify(str(tmp_path), progress=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.jsonl").write_text("not json")
    with pytest.raises(BadDocumentError):
        prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), **SETTINGS)
    with pytest.raises(DamagedCorpusError, match="run the same prepare command again"):
        verify(str(tmp_path / "out"), progress=False)


def test_a_corpus_in_a_bucket_is_verified_there(tmp_path, s3_bucket, corpus):
    url = f"s3://{s3_bucket}/a/corpus"
    prepare([str(tmp_path / "a.jsonl")], url, **SETTINGS)
    assert verify(url, progress=False)["splits"]["train"]["documents"] > 200
    with open_store(url) as store:
        data = bytearray(store.read_bytes("train/shard.00001.mds"))
        data[777] ^= 4
        store.put_bytes("train/shard.00001.mds", bytes(data))
    with pytest.raises(DamagedCorpusError, match=r"train/shard\.00001\.mds: must have xxh64"):
        verify(url, progress=False)
