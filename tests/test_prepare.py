"""Preparation: the right tokens, the right files, and the same bytes however often it is killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from composer_gpt2.data import prepare
from composer_gpt2.data.local_s3 import local_s3_server
from composer_gpt2.data.object_store import open_store
from composer_gpt2.data.preparation import BadDocumentError, summarize
from composer_gpt2.tokenizer import END_OF_TEXT, get_encoding, get_tokenizer

LENGTH = 64
SETTINGS = {
    "sequence_length": LENGTH,
    "validation_fraction": 0.2,
    "shard_size_limit": "16kb",
    "progress": False,
}
WORDS = [
    "the",
    "model",
    "of",
    "na\u00efve",
    "\u8a9e\u8a00",
    "\U0001f600",
    "12,345",
    "\n\n",
    "  ",
    "?",
]


def write_jsonl(path: Path, n_documents: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(200))) for _ in range(n_documents)]
    texts[5] = "a document may say <|endoftext|> and does not end there"
    texts[7] = texts[8]  # duplicates
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def read_tokens(folder: Path) -> np.ndarray:
    """All samples of a split in order, as streaming reads them."""
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    samples = [dataset[i]["tokens"] for i in range(len(dataset))]
    for sample in samples:
        assert sample.dtype == np.uint16
        assert sample.shape == (LENGTH,)
    return np.concatenate(samples)


def content(url: str) -> dict[str, bytes]:
    """Every file of a folder or bucket."""
    with open_store(str(url)) as store:
        return {name: store.read_bytes(name) for name in store.names()}


def documents_of(tokens: np.ndarray) -> list[str]:
    ends = np.flatnonzero(tokens == END_OF_TEXT)
    pieces = np.split(tokens, ends + 1)[:-1]  # the last one is cut by the remainder
    return [get_encoding().decode(piece[:-1].tolist()) for piece in pieces]


@pytest.fixture
def corpus(tmp_path) -> tuple[str, list[str]]:
    texts = write_jsonl(tmp_path / "corpus.jsonl", 500)
    return str(tmp_path / "corpus.jsonl"), texts


def test_every_token_of_every_document_arrives_once_and_in_order(tmp_path, corpus):
    source, texts = corpus
    result = prepare([source], str(tmp_path / "out"), **SETTINGS)
    assert result == json.loads((tmp_path / "out/corpus.json").read_text())
    assert result["bad_documents"] == 0

    # An independent tokenizer says what the stream of each split must be.
    tokenizer = get_tokenizer()
    streams = {split: read_tokens(tmp_path / "out" / split) for split in ("train", "validation")}
    found = {split: documents_of(stream) for split, stream in streams.items()}
    members = {split: set(documents) for split, documents in found.items()}
    assert not members["train"] & members["validation"]
    for split, stream in streams.items():
        counts = result["splits"][split]
        # All but the document that the remainder cuts are in the shards.
        mine = [text for text in texts if text in members[split]]
        expected = [
            token
            for text in mine
            for token in [*tokenizer(text, split_special_tokens=True).input_ids, END_OF_TEXT]
        ]
        n_whole = len(expected)
        assert stream[:n_whole].tolist() == expected
        assert len(stream) == counts["samples"] * LENGTH
        assert counts["tokens"] == len(stream) + counts["remainder_tokens"]
        assert 0 <= counts["remainder_tokens"] < LENGTH
    assert sum(split["documents"] for split in result["splits"].values()) == len(texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert sum(split["bytes"] for split in result["splits"].values()) == n_bytes
    assert 60 < result["splits"]["validation"]["documents"] < 140  # 100 of 500 expected
    assert "tokens at the end that fill no sample" in summarize(result)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_shards_and_index_are_those_of_mdswriter(tmp_path, corpus, compression):
    source, _ = corpus
    prepare([source], str(tmp_path / "out"), **SETTINGS, compression=compression)
    samples = read_tokens(tmp_path / "out/train").reshape(-1, LENGTH)
    with MDSWriter(
        columns={"tokens": f"ndarray:uint16:{LENGTH}"},
        out=str(tmp_path / "reference"),
        compression=compression,
        hashes=["xxh64"],
        size_limit=16 * 1024,
    ) as writer:
        for sample in samples:
            writer.write({"tokens": sample})
    if compression:  # reading left the decompressed shards beside the others
        for shard in (tmp_path / "out/train").glob("*.mds"):
            shard.unlink()
    ours, reference = content(tmp_path / "out/train"), content(tmp_path / "reference")
    assert len(ours) > 10
    assert ours == reference


def test_split_depends_on_the_text_alone(tmp_path):
    texts = write_jsonl(tmp_path / "a.jsonl", 400)
    shuffled = random.Random(1).sample(texts, len(texts)) + texts[:100]
    lines = [json.dumps({"text": text}) for text in shuffled]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    validation = []
    for name in ("a", "b"):
        prepare([str(tmp_path / f"{name}.jsonl")], str(tmp_path / name), **SETTINGS)
        documents = documents_of(read_tokens(tmp_path / name / "validation"))
        validation.append(set(documents))
    # But for the one document that the remainder cuts off on each side.
    assert len(validation[0] ^ validation[1]) <= 2
    assert len(validation[0]) > 40


def test_threads_and_batches_do_not_show_in_the_output(tmp_path, corpus, monkeypatch):
    source, _ = corpus
    for n_threads in (1, 3):
        monkeypatch.setattr("composer_gpt2.data.preparation._BATCH_CHARACTERS", 5_000 * n_threads)
        prepare([source], str(tmp_path / str(n_threads)), **SETTINGS, num_threads=n_threads)
    assert content(tmp_path / "1") == content(tmp_path / "3")


# Begins prepare() in a process of its own and kills it as soon as the output has a given number of
# files (and a moment later), again and again, then lets it end. Every attempt is a fork, so that
# importing torch is paid for once.
KILLER = """
    import json, os, signal, sys, time
    import composer_gpt2.data.preparation as preparation
    import composer_gpt2.data.token_shards
    from composer_gpt2.data.object_store import open_store

    source, out, settings, moments = json.loads(sys.argv[1])
    preparation._BATCH_CHARACTERS = 20_000
    for n_files, delay in [*moments, (10**9, 0)]:
        child = os.fork()
        if child == 0:
            preparation.prepare([source], out, **settings)
            os._exit(0)
        with open_store(out) as store:
            ended, status = os.waitpid(child, os.WNOHANG)
            while not ended and len(store.names()) < n_files:
                time.sleep(0.005)
                ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                sys.exit(status)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            names = store.names()
            print(len(names), flush=True)
            assert "corpus.json" not in names or "validation/index.json" in names, names
            for split in ("train", "validation"):
                if f"{split}/index.json" in names:
                    index = json.loads(store.read_bytes(f"{split}/index.json"))
                    for shard in index["shards"]:
                        file = shard["zip_data"] or shard["raw_data"]
                        assert f"{split}/{file['basename']}" in names
"""


def run_and_kill(source: str, out: str, n_final: int, seed: int, **settings) -> None:
    """Prepares, with SIGKILLs while the output has from none to nearly all of its files."""
    rng = random.Random(seed)
    moments = [(0, rng.uniform(0, 0.1)), (0, 0.2)]  # also before anything is there
    moments += [(n, rng.uniform(0, 0.03)) for n in sorted(rng.sample(range(1, n_final), 8))]
    arguments = json.dumps([source, out, SETTINGS | settings, moments])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    n_files = [int(line) for line in result.stdout.splitlines()]
    assert sum(1 < n < n_final for n in n_files) >= 4, f"kills came at {n_files} of {n_final}"


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, compression):
    source, out = tmp_path / "corpus.jsonl", tmp_path / "killed"
    write_jsonl(source, 3000)
    prepare([str(source)], str(tmp_path / "undisturbed"), **SETTINGS, compression=compression)
    reference = content(tmp_path / "undisturbed")
    run_and_kill(str(source), str(out), len(reference), 1, compression=compression)
    assert content(out) == reference


def test_killed_while_uploading_it_ends_with_the_same_bytes(tmp_path, s3_bucket):
    source, out = tmp_path / "corpus.jsonl", f"s3://{s3_bucket}/some/where"
    write_jsonl(source, 1500)
    prepare([str(source)], str(tmp_path / "undisturbed"), **SETTINGS)
    reference = content(tmp_path / "undisturbed")
    run_and_kill(str(source), out, len(reference), 2)
    assert content(out) == reference


@pytest.fixture
def puts(monkeypatch, tmp_path) -> list[str]:
    """The names that are put into folders, in order."""
    names = []
    with open_store(str(tmp_path)) as store:
        put = type(store).put

    def recorded(self, name):
        put(self, name)
        names.append(name)

    monkeypatch.setattr(type(store), "put", recorded)
    return names


def test_files_appear_in_the_order_that_makes_a_kill_harmless(tmp_path, corpus, puts):
    source, _ = corpus
    prepare([source], str(tmp_path / "out"), **SETTINGS)
    assert puts[0] == "unfinished.npz"
    assert puts[-3:] == ["train/index.json", "validation/index.json", "corpus.json"]
    assert puts.count("train/index.json") == puts.count("corpus.json") == 1
    assert len(puts) == len(set(puts)) + puts.count("unfinished.npz") - 1  # each shard once


def test_a_run_goes_on_and_does_not_begin_again(tmp_path, puts, monkeypatch):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, 500)
    with source.open("a") as file:
        file.write("not json\n")
    monkeypatch.setattr("composer_gpt2.data.preparation._BATCH_CHARACTERS", 1000)
    with pytest.raises(BadDocumentError):
        prepare([str(source)], str(tmp_path / "out"), **SETTINGS, num_threads=1)
    before = {name for name in puts if "shard" in name}
    assert len(before) >= 5
    puts.clear()
    prepare([str(source)], str(tmp_path / "out"), **SETTINGS, on_error="skip")
    assert not before & set(puts)


def test_a_shard_that_cannot_be_stored_is_not_counted(tmp_path, corpus, monkeypatch):
    source, _ = corpus
    prepare([source], str(tmp_path / "undisturbed"), **SETTINGS)
    monkeypatch.setattr("composer_gpt2.data.preparation._BATCH_CHARACTERS", 1000)
    with open_store(str(tmp_path)) as store:
        put = type(store).put

    def fail_at_the_fifth(self, name):
        if name == "train/shard.00004.mds":
            raise OSError(28, "No space left on device")
        put(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put", fail_at_the_fifth)
        with pytest.raises(OSError, match="No space left"):
            prepare([source], str(tmp_path / "out"), **SETTINGS)
    assert prepare([source], str(tmp_path / "out"), **SETTINGS)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_killed_between_the_last_two_steps_it_only_tidies(tmp_path, corpus, monkeypatch):
    source, _ = corpus
    out = str(tmp_path / "out")
    with open_store(out) as store:
        delete = type(store).delete

    def die_at_the_state(self, names):
        names = list(names)
        if "unfinished.npz" in names:
            raise KeyboardInterrupt
        delete(self, names)

    monkeypatch.setattr(type(store), "delete", die_at_the_state)
    with pytest.raises(KeyboardInterrupt):
        prepare([source], out, **SETTINGS)
    monkeypatch.undo()
    left = content(out)
    assert left.pop("unfinished.npz")
    assert prepare([source], out, **SETTINGS) == json.loads(left["corpus.json"])
    assert content(out) == left


def test_a_finished_corpus_is_not_overwritten_unless_told(tmp_path, corpus):
    source, _ = corpus
    out = str(tmp_path / "out")
    prepare([source], out, **SETTINGS, compression="zstd")
    before = content(out)
    with pytest.raises(FileExistsError, match=r"holds a finished corpus; .*overwrite"):
        prepare([source], out, **SETTINGS)
    assert content(out) == before
    (tmp_path / "out/mine.txt").write_text("not of the corpus")
    (tmp_path / "out/train/notes.txt").write_text("not of the corpus")

    smaller = SETTINGS | {"shard_size_limit": "32kb"}
    prepare([source], out, **smaller, overwrite=True)
    prepare([source], str(tmp_path / "fresh"), **smaller)
    after = content(out)
    assert after.pop("mine.txt") == after.pop("train/notes.txt") == b"not of the corpus"
    assert after == content(tmp_path / "fresh")  # no stale shard


def test_overwriting_takes_away_first_what_looks_finished(tmp_path, corpus, s3_bucket):
    source, _ = corpus
    out = f"s3://{s3_bucket}/corpus"
    prepare([source], out, **SETTINGS)
    deleted = []
    with open_store(out) as store:
        delete = type(store).delete
    with pytest.MonkeyPatch.context() as patch:

        def recorded(self, names):
            names = list(names)
            deleted.extend(names)
            delete(self, names)

        patch.setattr(type(store), "delete", recorded)
        prepare([source], out, **SETTINGS, overwrite=True)
    assert deleted[:3] == ["corpus.json", "train/index.json", "validation/index.json"]
    assert deleted[3].startswith("train/shard.00000")


def test_an_unfinished_corpus_of_other_arguments_is_refused_with_the_difference(tmp_path):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, 500)
    with source.open("a") as file:
        file.write("not json\n")
    out = str(tmp_path / "out")
    with pytest.raises(BadDocumentError, match=r"a\.jsonl:501 is not JSON"):
        prepare([str(source)], out, **SETTINGS)
    assert not (tmp_path / "out/corpus.json").exists()
    assert not (tmp_path / "out/train/index.json").exists()

    with pytest.raises(ValueError, match="compression was None and is 'zstd'"):
        prepare([str(source)], out, **SETTINGS, compression="zstd")
    with pytest.raises(ValueError, match=r"sequence_length was 64 and is 32.*overwrite"):
        prepare([str(source)], out, **SETTINGS | {"sequence_length": 32})
    write_jsonl(tmp_path / "b.jsonl", 10)
    with pytest.raises(ValueError, match=r"the source '.*b\.jsonl' is new"):
        prepare([str(source), str(tmp_path / "b.jsonl")], out, **SETTINGS)
    text = source.read_text()
    source.write_text(text.replace("not json", "NOT JSON"))
    with pytest.raises(ValueError, match="has changed"):
        prepare([str(source)], out, **SETTINGS)
    source.write_text(text)

    # To skip what stopped it is no other corpus: the run goes on.
    result = prepare([str(source)], out, **SETTINGS, on_error="skip")
    assert result["bad_documents"] == 1
    prepare([str(source)], str(tmp_path / "fresh"), **SETTINGS, on_error="skip")
    assert content(out) == content(tmp_path / "fresh")


def test_shards_lost_from_an_unfinished_corpus_are_noticed(tmp_path, monkeypatch):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, 500)
    with source.open("a") as file:
        file.write("not json\n")
    out = tmp_path / "out"
    monkeypatch.setattr("composer_gpt2.data.preparation._BATCH_CHARACTERS", 1000)
    with pytest.raises(BadDocumentError):
        prepare([str(source)], str(out), **SETTINGS, num_threads=1)
    (out / "train/shard.00001.mds").unlink()
    with pytest.raises(FileNotFoundError, match=r"train/shard\.00001\.mds, but it is gone"):
        prepare([str(source)], str(out), **SETTINGS, on_error="skip")


def test_shards_without_a_state_are_not_built_upon(tmp_path, corpus):
    source, _ = corpus
    out = tmp_path / "out"
    prepare([source], str(out), **SETTINGS)
    (out / "corpus.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds files of a corpus \(train/index\.json\)"):
        prepare([source], str(out), **SETTINGS)


def test_bad_documents_stop_or_are_counted(tmp_path, caplog):
    source = tmp_path / "a.jsonl"
    texts = write_jsonl(source, 200)
    lines = source.read_text().splitlines()
    bad = ["{", '{"body": 1}', '{"text": "\\ud800"}'] * 5
    for i, line in enumerate(bad):
        lines.insert(3 + 10 * i, line)
    source.write_text("\n".join(lines))
    with pytest.raises(BadDocumentError, match=r"a\.jsonl:4 is not JSON .*--on-error skip"):
        prepare([str(source)], str(tmp_path / "stop"), **SETTINGS)
    result = prepare([str(source)], str(tmp_path / "skip"), **SETTINGS, on_error="skip")
    assert result["bad_documents"] == len(bad)
    assert sum(split["documents"] for split in result["splits"].values()) == len(texts)
    assert f"{source}:14 must have a field 'text', got 'body'" in caplog.text
    assert caplog.text.count("skipped:") == 10
    assert "skipped 15 bad documents" in summarize(result)


def test_a_split_smaller_than_a_sample_is_refused_and_leaves_nothing(tmp_path, corpus):
    source, texts = corpus
    out = tmp_path / "out"
    settings = SETTINGS | {"sequence_length": 1024}
    with pytest.raises(ValueError, match=r"validation split .*\(--validation-fraction 0\.\d+\)"):
        prepare([source], str(out), **settings | {"validation_fraction": 0.0001})
    assert not content(out)
    (tmp_path / "tiny.txt").write_text("A few words.")
    with pytest.raises(ValueError, match="whole corpus has 5"):
        prepare([str(tmp_path / "tiny.txt")], str(out), **settings)
    # What the message proposes works at once.
    result = prepare([source], str(out), **settings | {"validation_fraction": 0})
    assert list(result["splits"]) == ["train"]
    assert result["splits"]["train"]["documents"] == len(texts)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"validation_fraction": 1.0}, "at least 0 and below 1"),
        ({"on_error": "ignore"}, "'stop' or 'skip', got 'ignore'"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
        ({"compression": "zip"}, "compression must be br"),
        ({"shard_size_limit": 100}, "at least 1152 bytes"),
        ({"shard_size_limit": "4gb"}, "below 4 GiB"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, corpus, changed, message):
    with pytest.raises(ValueError, match=message):
        prepare([corpus[0]], str(tmp_path / "out"), **SETTINGS | changed)
    assert not (tmp_path / "out").exists()


def test_very_long_runs_neither_hang_nor_change_tokens(tmp_path):
    million = 1_000_000
    texts = [
        "a" * million,
        " " * million,
        " " * (2 * million) + "x" + "\n" * (million + 7) + " y",  # tiktoken alone gives up here
        "\u3000" * (million + 1) + "\x1c" + "end" + "\t" * (million + 1),
        "-" * 300_000,
    ]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    start = time.monotonic()
    settings = SETTINGS | {"validation_fraction": 0, "shard_size_limit": "64mb"}
    prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), **settings)
    assert time.monotonic() - start < 60
    tokens = read_tokens(tmp_path / "out/train")
    ends = np.flatnonzero(tokens == END_OF_TEXT)
    documents = [piece[:-1].tolist() for piece in np.split(tokens, ends + 1)[:-1]]
    # The first ones are in the shards whole; their tokens as runs of one piece give them.
    encode = get_encoding().encode_ordinary
    assert documents[0] == encode(texts[0])
    assert documents[1] == encode(texts[1])
    assert documents[2] == [
        *encode(" " * (2 * million - 1)),
        *encode(" x"),
        *encode("\n" * (million + 7)),  # a run before " y" ends before the space
        *encode(" y"),
    ]
    assert get_encoding().decode(documents[3]) == texts[3]


def test_the_cuts_of_long_runs_agree_with_the_uncut_text(monkeypatch):
    import re

    from composer_gpt2.data import encoding

    monkeypatch.setattr(
        encoding, "_LONG_SPACE", re.compile(encoding._LONG_SPACE.pattern.replace("100000", "3"))
    )

    class GivesUp:
        """Fails on a whole text as tiktoken does on a long run, once."""

        def __init__(self):
            self.failed = False

        def encode_to_numpy(self, text, **arguments):
            if not self.failed:
                self.failed = True
                raise ValueError("Max stack size exceeded")
            return get_encoding().encode_to_numpy(text, **arguments)

    spaces = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u3000\u200b"
    rng = random.Random(3)
    for _ in range(3000):
        text = "".join(rng.choices(spaces + "ab1.", weights=[3] * len(spaces) + [2] * 4, k=40))
        monkeypatch.setattr(encoding, "get_encoding", GivesUp)
        ours = encoding._encode_document(text).tolist()
        assert ours == [*get_encoding().encode_ordinary(text), END_OF_TEXT], repr(text)


def test_only_one_process_prepares_a_folder(tmp_path, corpus):
    out = str(tmp_path / "out")
    with open_store(out) as store:
        store.start_writing()
        with pytest.raises(BlockingIOError, match="another is at work"):
            prepare([corpus[0]], out, **SETTINGS)
    prepare([corpus[0]], out, **SETTINGS)


@pytest.mark.parametrize(
    ("variables", "bucket", "error", "message"),
    [
        ({}, "no-such-bucket", FileNotFoundError, "no-such-bucket.*create it"),
        ({"S3_ENDPOINT_URL": "http://127.0.0.1:9"}, None, ConnectionError, "S3_ENDPOINT_URL"),
        ({"S3_ENDPOINT_URL": "no address"}, None, ConnectionError, "S3_ENDPOINT_URL"),
        ({"AWS_ACCESS_KEY_ID": None}, None, PermissionError, "AWS_ACCESS_KEY_ID"),
    ],
)
def test_trouble_with_the_bucket_is_told_before_the_work(
    tmp_path, corpus, s3_bucket, monkeypatch, variables, bucket, error, message
):
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws of the developer
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for variable, value in variables.items():
        if value is None:
            monkeypatch.delenv(variable)
        else:
            monkeypatch.setenv(variable, value)
    start = time.monotonic()
    with pytest.raises(error, match=message):
        prepare([corpus[0]], f"s3://{bucket or s3_bucket}/x", **SETTINGS)
    assert time.monotonic() - start < 20


def test_other_kinds_of_stores_and_files_in_the_way_are_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="must be in a folder or at an address"):
        prepare([corpus[0]], "ftp://host/x", **SETTINGS)
    with pytest.raises(NotADirectoryError, match="must be in a folder, got the file"):
        prepare([corpus[0]], corpus[0], **SETTINGS)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """A corpus four times as large may not take more than a little more memory."""
    program = """
        import resource, sys
        import composer_gpt2.data.token_shards
        from composer_gpt2.data import prepare
        from composer_gpt2.tokenizer import get_encoding
        get_encoding()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prepare([sys.argv[1]], sys.argv[2], validation_fraction=0.1, shard_size_limit="256kb",
                num_threads=2, progress=False)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    used = []
    for n_megabytes in (4, 32):
        path = tmp_path / f"{n_megabytes}.jsonl"
        rng = random.Random(0)
        text = " ".join(rng.choices(WORDS, k=3000))
        lines = [json.dumps({"text": f"{i} {text}"}) for i in range(n_megabytes * 40)]
        path.write_text("\n".join(lines))
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), path, tmp_path / str(n_megabytes)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        used.append(int(result.stdout) / 1024)  # MiB
    small, large = used
    assert large < small + 12, f"{small:.0f} MiB for 4 MB of text, {large:.0f} MiB for 32 MB"


def test_a_store_that_goes_away_is_one_error_that_says_how_to_go_on(monkeypatch):
    with local_s3_server() as server:
        for variable, value in server.environment.items():
            monkeypatch.setenv(variable, value)
        server.create_bucket("soon-gone")
        with open_store("s3://soon-gone/corpus", retries=1) as store:
            store.put_bytes("first", b"1")
            server.stop()
            with pytest.raises(ConnectionError, match="start the same command again"):
                store.put_bytes("second", b"2")
