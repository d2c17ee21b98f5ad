"""Downloads over real connections that break, change and lie."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from typer.testing import CliRunner

from composer_gpt2.checkpoints import CheckpointError
from composer_gpt2.checkpoints.manifest import FileRecord, Manifest
from composer_gpt2.cli import app
from composer_gpt2.data import resumable
from composer_gpt2.published import OPENAI, download_published

CONTENT = bytes(range(256)) * 20_000  # 5 MB
HASH = hashlib.sha256(CONTENT).hexdigest()


class Web(http.server.BaseHTTPRequestHandler):
    """Serves ``files``, with ranges; the first ``n_breaks`` answers end in the middle."""

    files: dict[str, bytes]
    n_breaks = 0
    resumes = True
    tag = '"1"'
    asked: list[str | None]

    def do_GET(self) -> None:
        content = self.files.get(self.path)
        self.asked.append(self.headers.get("Range"))
        if content is None:
            self.send_error(404)
            return
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        whole = span is None or not self.resumes or self.headers["If-Range"] != self.tag
        start = 0 if whole or span is None else int(span[1])
        self.send_response(200 if whole else 206)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", self.tag)
        if not whole:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        rest = content[start:]
        if type(self).n_breaks:
            type(self).n_breaks -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def web(monkeypatch):
    class Site(Web):
        pass

    Site.files, Site.asked = {"/model.safetensors": CONTENT}, []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Site.url = f"http://127.0.0.1:{server.server_port}"
    yield Site
    server.shutdown()
    server.server_close()


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_connection_that_breaks_goes_on_where_it_was(web, tmp_path):
    web.n_breaks = 3
    downloaded = download_published(f"{web.url}/model.safetensors", tmp_path, sha256=HASH)
    assert downloaded.use_as.read_bytes() == CONTENT
    assert (downloaded.n_checked, downloaded.unchecked) == (1, ())
    half = len(CONTENT) // 2
    assert web.asked == [None, f"bytes={half}-", f"bytes={half * 3 // 2}-", "bytes=4480000-"]
    assert files_in(tmp_path) == {"model.safetensors"}
    # It is here and right: nothing is asked for.
    download_published(f"{web.url}/model.safetensors", tmp_path, sha256=HASH)
    assert len(web.asked) == 4


def test_a_killed_download_goes_on_in_another_process(web, tmp_path, monkeypatch):
    web.n_breaks = 1

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    # The first attempt breaks, and the process dies while it waits.
    right = resumable.call_with_retries
    monkeypatch.setattr(resumable, "call_with_retries", lambda call, *a, **o: call() or killed())
    with pytest.raises(KeyboardInterrupt):
        download_published(f"{web.url}/model.safetensors", tmp_path)
    assert files_in(tmp_path) == {".model.safetensors.part", ".model.safetensors.part.json"}
    monkeypatch.setattr(resumable, "call_with_retries", right)
    downloaded = download_published(f"{web.url}/model.safetensors", tmp_path)
    assert web.asked == [None, f"bytes={len(CONTENT) // 2}-"]
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT
    assert downloaded.unchecked == ("model.safetensors",)


@pytest.mark.parametrize("change", ["content", "no ranges"])
def test_a_part_of_something_else_is_not_gone_on_with(web, tmp_path, monkeypatch, change):
    web.n_breaks = 1
    monkeypatch.setattr(resumable, "call_with_retries", lambda call, *a, **o: call() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        download_published(f"{web.url}/model.safetensors", tmp_path)
    monkeypatch.undo()
    content = CONTENT
    if change == "content":
        content = CONTENT[::-1]
        web.files, web.tag = {"/model.safetensors": content}, '"2"'
    else:
        web.resumes = False
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    download_published(f"{web.url}/model.safetensors", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_damaged_bytes_are_fetched_again_and_never_kept(web, tmp_path):
    damaged = b"?" + CONTENT[1:]
    web.files["/model.safetensors"] = damaged
    with pytest.raises(CheckpointError, match=r"SHA-256.*also when it was fetched again"):
        download_published(f"{web.url}/model.safetensors", tmp_path, sha256=HASH)
    assert web.asked == [None, None]
    assert files_in(tmp_path) == set()
    # A damaged file of that name is replaced.
    (tmp_path / "model.safetensors").write_bytes(damaged)
    web.files["/model.safetensors"] = CONTENT
    download_published(f"{web.url}/model.safetensors", tmp_path, sha256=HASH)
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT


def test_what_is_not_there_is_said_at_once(web, tmp_path):
    with pytest.raises(FileNotFoundError, match="check the address"):
        download_published(f"{web.url}/other.safetensors", tmp_path)
    assert len(web.asked) == 1


def a_checkpoint(batch: int) -> dict[str, bytes]:
    """Files of a checkpoint: state, weights, manifest."""
    name = f"ep0-ba{batch}"
    files = {f"{name}-rank0.pt": CONTENT * 2, f"{name}-rank0.safetensors": CONTENT[: 1 << batch]}
    records = {
        file: FileRecord(len(content), hashlib.sha256(content).hexdigest())
        for file, content in files.items()
    }
    times = {"ba": batch, "ep": 0, "sp": 0, "tok": 0}
    manifest = Manifest(name, times, records, recipe={})
    return {**files, manifest.file: manifest.to_json().encode()}


def test_a_manifest_on_the_web(web, tmp_path):
    files = a_checkpoint(9)
    web.files |= {f"/run/{name}": content for name, content in files.items()}
    address = f"{web.url}/run/ep0-ba9-rank0.json"
    weights = download_published(address, tmp_path / "weights", weights_only=True)
    assert weights.use_as == tmp_path / "weights" / "ep0-ba9-rank0.safetensors"
    assert files_in(tmp_path / "weights") == {"ep0-ba9-rank0.safetensors"}
    whole = download_published(address, tmp_path / "whole")
    assert {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()} == files
    assert whole.use_as.name == "ep0-ba9-rank0.pt"
    assert (whole.n_checked, whole.unchecked) == (2, ("ep0-ba9-rank0.json",))
    web.files["/run/ep0-ba9-rank0.pt"] = CONTENT
    with pytest.raises(CheckpointError, match="5,120,000 bytes instead of 10,240,000"):
        download_published(address, tmp_path / "damaged")
    assert files_in(tmp_path / "damaged") == set()


def test_a_hash_holds_for_the_weights_of_a_manifest(web, tmp_path):
    files = a_checkpoint(9)
    web.files |= {f"/run/{name}": content for name, content in files.items()}
    address = f"{web.url}/run/ep0-ba9-rank0.json"
    with pytest.raises(CheckpointError, match=f"SHA-256 {HASH}, got one that is published as"):
        download_published(address, tmp_path / "other", sha256=HASH, weights_only=True)
    assert not (tmp_path / "other").exists()
    right = hashlib.sha256(files["ep0-ba9-rank0.safetensors"]).hexdigest().upper()
    download_published(address, tmp_path / "right", sha256=right, weights_only=True)
    with pytest.raises(ValueError, match="which is 3 files"):
        download_published(address, tmp_path / "whole", sha256=HASH)


def test_a_folder_in_an_object_store_through_a_bad_network(
    s3_bucket, s3_server, tmp_path, monkeypatch
):
    client = s3_server.client()
    for batch in (8, 10):
        for name, content in a_checkpoint(batch).items():
            client.put_object(Bucket=s3_bucket, Key=f"runs/gpt2-1.3b/{name}", Body=content)
    with FaultyProxy(s3_server.endpoint_url) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        proxy.set("reset", method="GET", path=r"ba10-rank0\.pt", times=2)
        downloaded = download_published(f"s3://{s3_bucket}/runs/gpt2-1.3b", tmp_path / "out")
        assert proxy.hits()["reset"] == 2
        with pytest.raises(FileNotFoundError, match="must hold a checkpoint with its manifest"):
            download_published(f"s3://{s3_bucket}/other", tmp_path / "none")
        weights = f"s3://{s3_bucket}/runs/gpt2-1.3b/ep0-ba8-rank0.safetensors"
        assert download_published(weights, tmp_path / "one").use_as.stat().st_size == 1 << 8
    assert downloaded.use_as.name == "ep0-ba10-rank0.pt"
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == a_checkpoint(10)


@pytest.fixture
def publish(web, monkeypatch):
    """Puts a model on a hub: its files, and the hashes of those that have one."""
    import huggingface_hub.constants
    from huggingface_hub.utils import reset_sessions

    def publish(name: str, files: dict[str, bytes], hashes: dict[str, str]) -> None:
        siblings: list[dict] = [{"rfilename": f, "size": len(files[f])} for f in files]
        for sibling in siblings:
            if sha256 := hashes.get(sibling["rfilename"]):
                sibling["lfs"] = {"sha256": sha256, "size": sibling["size"], "pointerSize": 100}
        commit = "a" * 40
        info = {"id": name, "sha": commit, "siblings": siblings}
        web.files[f"/api/models/{name}?blobs=True"] = json.dumps(info).encode()
        web.files |= {f"/{name}/resolve/{commit}/{f}": files[f] for f in files}

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", web.url)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        reset_sessions()
        yield publish
    reset_sessions()


CONFIG = b'{"model_type": "gpt2"}'


def test_a_model_of_the_hub_with_its_hashes(publish, tmp_path):
    files = {"config.json": CONFIG, "tf_model.h5": b"12345", "model.safetensors": CONTENT}
    publish(OPENAI["gpt2"], files, {"model.safetensors": HASH})
    downloaded = download_published("gpt2", tmp_path / "gpt2")
    with pytest.raises(FileNotFoundError, match="HF_TOKEN if it is private"):
        download_published("owner/missing", tmp_path / "missing")
    assert downloaded.unchecked == ("config.json",)
    assert files_in(tmp_path / "gpt2") == {"config.json", "model.safetensors"}
    assert (tmp_path / "gpt2" / "model.safetensors").read_bytes() == CONTENT


def test_a_model_of_the_hub_has_its_weights(publish, tmp_path):
    index = "pytorch_model.bin.index.json"
    old = {"config.json": CONFIG, index: b"{}", "training_args.bin": b"1"}
    old |= {f"pytorch_model-0000{i}-of-00002.bin": CONTENT[:i] for i in (1, 2)}
    publish("owner/old", old, {})
    download_published("owner/old", tmp_path / "old")
    assert files_in(tmp_path / "old") == set(old) - {"training_args.bin"}
    publish("owner/both", {"pytorch_model.bin": CONTENT, "model.safetensors": b"1"}, {})
    download_published("owner/both", tmp_path / "both")
    assert files_in(tmp_path / "both") == {"model.safetensors"}
    publish("owner/none", {"config.json": CONFIG, "tf_model.h5": b"1"}, {})
    with pytest.raises(FileNotFoundError, match="got none among its 2 files"):
        download_published("owner/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_hash_holds_for_the_one_file_of_the_hub(publish, tmp_path):
    publish("owner/small", {"model.safetensors": CONTENT}, {})
    downloaded = download_published("owner/small", tmp_path / "right", sha256=HASH)
    assert downloaded.n_checked == 1
    with pytest.raises(CheckpointError, match="SHA-256"):
        download_published("owner/small", tmp_path / "wrong", sha256="0" * 64)


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("no such thing", {}, "must be an address"),
        ("https://example.org/run", {}, "nothing can be listed"),
        ("https://example.org/a.pt", {"weights_only": True}, "for a manifest or a folder"),
        ("owner/name", {"sha256": "12"}, "64 hexadecimal digits"),
    ],
)
def test_what_cannot_be_is_refused_before_work(name, options, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        download_published(name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_to_use(web, tmp_path):
    arguments = ["download", f"{web.url}/model.safetensors", str(tmp_path), "--sha256", HASH]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/model.safetensors: 1 files with" in result.stdout
    result = CliRunner().invoke(app, [*arguments[:-1], "0" * 64])
    assert result.exit_code == 1
