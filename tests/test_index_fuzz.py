"""Damaged and malicious descriptions of a corpus: a clear error, and nothing outside is touched."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_gpt2.data.preparation import prepare
from composer_gpt2.data.streaming import ShardError, StreamingTokens
from composer_gpt2.data.verification import verify

T = 32
ERRORS = (ValueError, OSError, ShardError)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    lines = [json.dumps({"text": f"document {n} " + "some words " * 20}) for n in range(60)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    prepare(
        [str(folder / "a.jsonl")],
        str(folder / "corpus"),
        sequence_length=T,
        validation_fraction=0,
        shard_size_limit="4kb",
        progress=False,
    )
    return folder / "corpus"


@pytest.fixture(scope="module")
def n_samples(sound) -> int:
    return json.loads((sound / "corpus.json").read_text())["splits"]["train"]["samples"]


def damaged(sound: Path, file: str, content: bytes) -> Path:
    """A copy with another content of one file, in a folder of its own beside a secret."""
    outside = Path(tempfile.mkdtemp(prefix="fuzz-", dir=sound.parent))
    shutil.copytree(sound, outside / "corpus")
    (outside / "corpus" / file).write_bytes(content)
    return outside / "corpus"


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def failures(corpus: Path, *, cached: bool = False, read: bool = True) -> list[Exception]:
    """What verifying and reading it raise; anything but the allowed errors goes through."""
    found: list[Exception] = []
    before = files_below(corpus.parent)
    try:
        verify(str(corpus), progress=False)
    except ERRORS as error:
        found.append(error)
    cache = corpus.parent / "cache" / "inner"
    try:
        dataset = StreamingTokens(
            remote=str(corpus),
            local=str(cache) if cached else None,
            sequence_length=T,
            batch_size=1,
        )
        if read:
            assert all(len(dataset[n]["input_ids"]) == T for n in range(len(dataset)))
    except ERRORS as error:
        found.append(error)
    assert all(str(error) for error in found)
    after = files_below(corpus.parent)
    inside = {name: data for name, data in after.items() if not name.startswith("cache/inner/")}
    assert inside == before
    return found


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**63, 10**30, 1e308, float("nan"), float("inf")])
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b", "a\0b", "mds"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def paths(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*path, key))


@st.composite
def mutations(draw, original: dict) -> dict:
    """The original with one to three places replaced, removed or doubled."""
    content = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(paths(content), key=str)))
        if not path:
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "remove", "double"])):
            case "replace":
                parent[path[-1]] = draw(values)
            case "remove":
                del parent[path[-1]]
            case "double" if isinstance(parent, list):
                parent.append(parent[path[-1]])
            case "double":
                parent[draw(st.text(max_size=5))] = parent[path[-1]]
    return content


fuzz = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=70,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@fuzz
@given(data=st.data())
def test_a_mutated_index(sound, data):
    original = json.loads((sound / "train" / "index.json").read_text())
    mutated = data.draw(mutations(original))
    corpus = damaged(sound, "train/index.json", json.dumps(mutated).encode())
    found = failures(corpus, cached=data.draw(st.booleans()))
    assert found or without_limit(mutated) == without_limit(original), mutated
    shutil.rmtree(corpus.parent)


def without_limit(index: dict) -> dict:
    """Without the size at which the writer began another shard, which decides nothing any more."""
    shards = [
        {k: v for k, v in s.items() if k not in ("size_limit", "column_sizes", "hashes")}
        for s in index["shards"]
    ]
    return {**index, "shards": shards}


@fuzz
@given(data=st.data())
def test_a_mutated_description(sound, data):
    original = json.loads((sound / "corpus.json").read_text())
    content = json.dumps(data.draw(mutations(original))).encode()
    corpus = damaged(sound, "corpus.json", content)
    failures(corpus, read=False)
    shutil.rmtree(corpus.parent)


@fuzz
@given(
    file=st.sampled_from(["corpus.json", "train/index.json"]),
    content=st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode()),
)
def test_any_content(sound, file, content):
    corpus = damaged(sound, file, content)
    assert len(failures(corpus, read=False)) == 2
    shutil.rmtree(corpus.parent)


@pytest.mark.parametrize("file", ["corpus.json", "train/index.json"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated(sound, file, share):
    content = (sound / file).read_bytes()
    assert len(failures(damaged(sound, file, content[: int(len(content) * share)]))) == 2


@pytest.mark.parametrize("file", ["corpus.json", "train/index.json"])
def test_deep_nesting(sound, file):
    for content in (b"[" * 100_000, b'{"shards":' * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000):
        assert len(failures(damaged(sound, file, content))) == 2


def with_shard(sound: Path, **changes) -> Path:
    index = json.loads((sound / "train" / "index.json").read_text())
    for key, value in changes.items():
        place, _, name = key.partition("__")
        if name:
            index["shards"][0][place][name] = value
        else:
            index["shards"][0][place] = value
    return damaged(sound, "train/index.json", json.dumps(index).encode())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "name", ["../../secret", "../secret", "{outside}/secret", "..", "", "a\0b"]
)
def test_no_file_outside_is_read_or_written(sound, name, cached):
    """The file has the size and hash of the shard, so that only its place speaks against it."""
    shard = json.loads((sound / "train" / "index.json").read_text())["shards"][0]
    corpus = with_shard(sound)
    content = (corpus / "train" / shard["raw_data"]["basename"]).read_bytes()
    for secret in (corpus.parent / "secret", corpus / "secret"):
        secret.write_bytes(content)
    shard["raw_data"]["basename"] = name.format(outside=corpus.parent)
    index = {"version": 2, "shards": [shard]}
    (corpus / "train" / "index.json").write_text(json.dumps(index))
    found = failures(corpus, cached=cached)
    assert len(found) == 2
    assert all("index.json" in str(error) and "basename" in str(error) for error in found)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"samples": -1}, "samples"),
        ({"samples": True}, "samples"),
        ({"samples": 10**12}, "samples"),
        ({"raw_data__bytes": -5}, "bytes"),
        ({"raw_data__bytes": 2**40}, "bytes"),
        ({"raw_data__hashes": {"rot13": "x"}}, "hashes"),
        ({"raw_data": None}, "raw_data"),
        ({"compression": "rar"}, "compression"),
        ({"compression": "zstd"}, "zip_data"),
        ({"column_names": "tokens"}, "column_names"),
        ({"column_sizes": []}, "as many"),
        ({"format": "json"}, "format"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_wrong_is_said(sound, changes, part):
    found = failures(with_shard(sound, **changes))
    assert len(found) == 2
    assert all("index.json" in str(error) and part in str(error) for error in found), found


def test_more_samples_than_fit(sound):
    """Beyond the last one lie other bytes of the file, which its hash would vouch for."""
    found = failures(with_shard(sound, samples=400))
    assert len(found) == 2
    assert "must have room for the 400 samples" in str(found[1])


def test_a_shard_listed_twice(sound):
    index = json.loads((sound / "train" / "index.json").read_text())
    index["shards"].append(index["shards"][0])
    found = failures(damaged(sound, "train/index.json", json.dumps(index).encode()))
    assert len(found) == 2
    assert all("listed once" in str(error) for error in found)


def test_a_sound_corpus_has_no_failures(sound, n_samples):
    corpus = damaged(sound, "unrelated", b"")
    assert failures(corpus) == []
    assert failures(corpus, cached=True) == []
    dataset = StreamingTokens(remote=str(corpus), sequence_length=T, batch_size=1)
    assert len(dataset) == n_samples
    assert os.path.exists(corpus / "train" / "index.json")
