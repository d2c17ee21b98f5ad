"""Every kind of corpus is read whole, in order, from any position, and says what is wrong."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import textwrap
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from composer_gpt2.data.corpora import BadDocument, open_sources

TEXTS = [
    "A first document.",
    "Zwei\nZeilen, \u00e4\u00f6\u00fc und \u4e2d\u6587.",
    "",
    "\U0001f600 " * 50,
    "   leading and trailing   \n",
    *(f"document number {i} " * (i % 7 + 1) for i in range(3000)),
]


def read(source, start: int = 0, **arguments) -> list:
    (group,) = open_sources([str(source)], **arguments).values()
    (file,) = group
    return list(file.documents(start))


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".xz":
        return lzma.compress(data)
    if suffix == ".zst":
        half = len(data) // 2  # two frames, as parallel compressors write
        return b"".join(pa.compress(part, "zstd", asbytes=True) for part in split_at(data, half))
    return data


def split_at(data: bytes, at: int) -> tuple[bytes, bytes]:
    return data[:at], data[at:]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # pyright: ignore
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def write_corpus(folder, kind: str):
    """TEXTS in one file of this kind, with the arguments to read it."""
    path = folder / f"corpus{kind}"
    if kind == ".parquet":
        pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=700)
    elif kind.startswith(".tar"):
        # As in openwebtext.tar.xz: archives in an archive, each of some hundred text files.
        inner = {}
        for start in range(0, len(TEXTS), 400):
            texts = TEXTS[start : start + 400]
            files = {f"{start + i:07}-abc.txt": text.encode() for i, text in enumerate(texts)}
            inner[f"openwebtext/urlsf_subset00-{start}_data.xz"] = tar(files, "w:xz")
        path.write_bytes(compress(tar(inner), kind[len(".tar") :]))
    else:
        path.write_bytes(compress(jsonl(TEXTS), kind[len(".jsonl") :]))
    return path


KINDS = [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet", ".tar.xz", ".tar.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_reads_all_documents_in_order_from_any_position(tmp_path, kind):
    path = write_corpus(tmp_path, kind)
    assert read(path) == TEXTS
    for start in (1, 2, 399, 400, 701, 1400, len(TEXTS) - 1, len(TEXTS)):
        assert read(path, start) == TEXTS[start:]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_read_reach_the_size_of_the_file(tmp_path, kind):
    path = write_corpus(tmp_path, kind)
    ((file,),) = open_sources([str(path)]).values()
    seen = [file.n_bytes_read for _ in file.documents()]
    assert seen == sorted(seen)
    assert seen[-1] == file.n_bytes == path.stat().st_size


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".tar.xz", ".tar.gz"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
def test_a_damaged_file_is_a_bad_document_and_not_the_end_of_the_file(tmp_path, kind, damage):
    path = write_corpus(tmp_path, kind)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[len(data) * 2 // 3 :]
    else:
        for i in range(len(data) // 2, len(data) // 2 + 40):
            data[i] ^= 0x5A
    path.write_bytes(data)
    documents = read(path)
    bad = [document for document in documents if isinstance(document, BadDocument)]
    assert bad
    assert bad[-1].where.startswith(str(path))
    assert "damaged" in bad[-1].reason
    # Reading on from any position meets the same items.
    for start in (0, len(documents) // 2, len(documents) - 1):
        assert read(path, start) == documents[start:]


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = write_corpus(tmp_path, ".parquet")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"corpus\.parquet must be a parquet file"):
        read(path)


def test_bad_lines_are_named_with_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        (b'\xef\xbb\xbf{"text": "byte order mark"}', "byte order mark"),
        (b"", None),
        (b'{"text": "cut', "is not JSON"),
        (b'["text"]', "must be a JSON object, got list"),
        (b'{"body": "x", "id": 1}', "must have a field 'text', got 'body', 'id'"),
        (b'{"text": 5}', "field 'text' must be a string, got int"),
        (b'{"text": null}', "field 'text' must be a string, got NoneType"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "half \\ud83d of a pair"}', "is not Unicode text"),
        (b'{"text": "\\ud83d\\ude00"}', "\U0001f600"),
        (b"[" * 100_000, "is not JSON"),
        (b"   ", None),
        (b'{"text": "last, without a newline"}', "last, without a newline"),
    ]
    path.write_bytes(b"\n".join(line for line, _ in lines))
    found = iter(read(path))
    for number, (_, expected) in enumerate(lines, 1):
        if expected is None:
            continue
        document = next(found)
        if isinstance(document, BadDocument):
            assert document.where == f"{path}:{number}"
            assert expected in document.reason
        else:
            assert document == expected
    assert next(found, None) is None


def test_bad_rows_of_parquet_are_named(tmp_path):
    path = tmp_path / "bad.parquet"
    raw = pa.array([b"fine", b"\xff\xfe", None, b"fine too"], pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string())}), path)
    first, not_utf8, null, last = read(path)
    assert (first, last) == ("fine", "fine too")
    assert not_utf8.where == f"{path}: row 2"
    assert "is not UTF-8" in not_utf8.reason
    assert null.where == f"{path}: row 3"
    assert "must be a string, got NoneType" in null.reason


def test_other_columns_and_fields_can_be_chosen_and_wrong_ones_are_refused(tmp_path):
    table = pa.table({"body": pa.array(["x", "y", "x"]).dictionary_encode(), "n": [1, 2, 3]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    assert read(path, text_field="body") == ["x", "y", "x"]
    with pytest.raises(ValueError, match="must have a column 'text', got body, n"):
        read(path)
    with pytest.raises(ValueError, match="must hold strings, got int64"):
        read(path, text_field="n")
    (tmp_path / "a.jsonl").write_text('{"body": "z"}\n')
    assert read(tmp_path / "a.jsonl", text_field="body") == ["z"]


def test_a_text_file_is_one_document_or_cut_at_a_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n\n\n\nthree \xc3\xa4\n\n")
    assert read(path) == ["one\r\ntwo\n\n\n\nthree \u00e4\n\n"]
    assert read(path, split_on="\n\n") == ["one\r\ntwo", "three \u00e4"]
    assert read(path, 1, split_on="\n\n") == ["three \u00e4"]


def test_separators_that_straddle_reads_are_found(tmp_path):
    separator = "<|endoftext|>"
    pieces = [("x" * n) for n in (1_048_570, 3, 2_500_000, 1, 1_048_576)]
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(separator.join(pieces).encode()))
    assert read(path, split_on=separator) == pieces


def test_bad_text_is_named_by_its_first_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n--\ntwo\n\xff\n--\nthree\n")
    first, bad, last = read(path, split_on="--\n")
    assert (first, last) == ("one\n", "three\n")
    assert bad.where == f"{path}:3"
    assert "is not UTF-8" in bad.reason


def test_bad_members_of_an_archive_are_named(tmp_path):
    path = tmp_path / "a.tar.xz"
    inner = tar({"1.txt": b"good", "2.txt": b"\xff", "3.txt": b"good too"}, "w:xz")
    damaged = inner[: len(inner) // 2]
    members = {"a.xz": inner, "b.xz": damaged, "picture.png": b"\x89PNG", "c.txt": b"plain"}
    path.write_bytes(lzma.compress(tar(members)))
    good, bad, also_good, broken, picture, plain = read(path)
    assert (good, also_good, plain) == ("good", "good too", "plain")
    assert bad.where == f"{path}!a.xz!2.txt"
    assert broken.where.startswith(f"{path}!b.xz")
    assert "damaged" in broken.reason
    assert picture.where == f"{path}!picture.png"


def test_folders_and_globs_are_sorted_and_given_order_is_kept(tmp_path, caplog):
    for name in ("b/2.jsonl", "b/10.jsonl", "a/x.txt", "a.jsonl", ".hidden/h.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')

    def names(*sources) -> list[str]:
        groups = open_sources([str(tmp_path / source) for source in sources])
        files = [file for group in groups.values() for file in group]
        return [file.name.removeprefix(f"{tmp_path}/") for file in files]

    assert names(".") == ["a/x.txt", "a.jsonl", "b/10.jsonl", "b/2.jsonl"]
    assert "ignored 1 files" in caplog.text
    assert "README.md" in caplog.text
    assert names("b/*.jsonl", "a") == ["b/10.jsonl", "b/2.jsonl", "a/x.txt"]
    assert names("**/*.txt") == ["a/x.txt"]


@pytest.mark.parametrize(
    ("sources", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "at least one file"),
        ("a.jsonl", {}, ValueError, "must be a list"),
        (["missing.jsonl"], {}, FileNotFoundError, "got 'missing.jsonl', which has none"),
        (["*.parquet"], {}, FileNotFoundError, "which has none"),
        (["notes.docx"], {}, ValueError, "must be jsonl, parquet, txt"),
        (["s3://bucket/a.jsonl"], {}, ValueError, "copy it to this machine"),
        (["a.jsonl", "a.jsonl"], {}, ValueError, "'a.jsonl' twice"),
        (["a.jsonl", "*.jsonl"], {}, ValueError, "found twice"),
        (["a.jsonl"], {"split_on": "\n"}, ValueError, "no txt file"),
        (["a.jsonl"], {"split_on": ""}, ValueError, "must not be empty"),
        (["hf://openwebtext"], {}, ValueError, "hf://OWNER/NAME"),
        (["hf://owner/name"], {}, ConnectionError, "HF_HUB_OFFLINE"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(
    tmp_path, monkeypatch, sources, arguments, error, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(error, match=message):
        open_sources(sources, **arguments)


def test_fingerprint_changes_with_content_and_not_with_time(tmp_path):
    path = tmp_path / "a.txt"

    def fingerprint() -> str:
        ((file,),) = open_sources([str(path)]).values()
        return file.fingerprint()

    for size in (10, 100_000, 1_048_576, 3_000_000):
        path.write_bytes(b"x" * size)
        before = fingerprint()
        path.write_bytes(b"x" * size)
        assert fingerprint() == before
        for changed in (b"y" + b"x" * (size - 1), b"x" * (size - 1) + b"y", b"x" * (size + 1)):
            path.write_bytes(changed)
            assert fingerprint() != before


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as reading two small data sets takes."""

    protocol_version = "HTTP/1.1"
    commit = "c0ffee" + "0" * 34
    files: dict[str, dict[str, bytes]]  # of each data set

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: object) -> None:
        self.answer(json.dumps(content).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        api = r"(?:/api)?/datasets/(owner/\w+)"
        if match := re.fullmatch(rf"{api}(/revision/\w+)?", path):
            siblings = [{"rfilename": name} for name in self.files[match[1]]]
            self.answer_json({"id": match[1], "sha": self.commit, "siblings": siblings})
        elif match := re.fullmatch(rf"{api}/tree/{self.commit}(/data)?", path):
            entries = [{"type": "directory", "oid": "1", "path": "data"}]
            if match[2]:
                entries = [
                    {"type": "file", "oid": "1", "size": len(content), "path": name}
                    for name, content in self.files[match[1]].items()
                    if name.startswith("data/")
                ]
            self.answer_json(entries)
        elif match := re.fullmatch(rf"{api}/resolve/{self.commit}/(.+)", path):
            content = self.files[match[1]].get(match[2])
            if content is None:
                self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
                return
            headers = {"ETag": f'"{match[2]}"', "X_Repo_Commit": self.commit}
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if span:
                content = content[int(span[1]) : int(span[2]) + 1]
            self.answer(content, 206 if span else 200, **headers)
        else:
            self.answer(b"{}", 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        name = "/".join(self.path.split("/")[3:5])
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        infos = []
        for path in urllib.parse.parse_qs(body)["paths"]:
            if path in self.files[name]:
                size = len(self.files[name][path])
                infos.append({"type": "file", "oid": "1", "size": size, "path": path})
            else:
                infos.append({"type": "directory", "oid": "1", "path": path})
        self.answer_json(infos)

    def log_message(self, *arguments) -> None:
        pass


def test_data_sets_of_the_hub_are_streamed_shard_by_shard(tmp_path):
    def parquet(texts: list[str]) -> bytes:
        file = io.BytesIO()
        pq.write_table(pa.table({"text": texts, "id": range(len(texts))}), file)
        return file.getvalue()

    files = {
        "data/train-00000-of-00002.parquet": parquet(["one", "two", "three"]),
        "data/train-00001-of-00002.parquet": parquet(["four", "five"]),
        "README.md": b"---\nlicense: mit\n---\n",
    }
    Hub.files = {"owner/corpus": files, "owner/scripted": {"scripted.py": b"raise SystemExit"}}
    program = """
        import json
        from composer_gpt2.data.corpora import open_sources

        (shards,) = open_sources(["hf://owner/corpus"]).values()
        texts = [list(shard.documents(start)) for shard in shards for start in (0, 1)]
        errors = []
        for source, field in (("corpus", "body"), ("scripted", "text"), ("missing", "text")):
            try:
                open_sources([f"hf://owner/{source}"], text_field=field)
            except (ValueError, ConnectionError) as error:
                errors.append(str(error))
        print(json.dumps([[shard.fingerprint() for shard in shards], texts, errors]))
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | online,
        capture_output=True,
        text=True,
        timeout=120,
    )
    server.shutdown()
    server.server_close()
    assert result.returncode == 0, result.stderr
    fingerprints, texts, errors = json.loads(result.stdout.splitlines()[-1])
    assert fingerprints == [f"hf://owner/corpus@{Hub.commit}#{i}" for i in range(2)]
    assert texts == [["one", "two", "three"], ["two", "three"], ["four", "five"], ["five"]]
    no_column, scripted, missing = errors
    assert "must have a column 'body', got text, id" in no_column
    assert "hf://owner/scripted@refs/convert/parquet" in scripted
    assert "hf://owner/missing cannot be opened" in missing
