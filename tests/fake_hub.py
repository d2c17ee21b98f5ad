"""A Hugging Face hub for models on this machine, as far as an upload of a folder asks it."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import reset_sessions

__all__ = ["FakeHub", "fake_hub"]

TOKEN = "hf_right"


class FakeHub:
    """What has been made and uploaded."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}  # name to how it was asked for
        self.files: dict[str, bytes] = {}  # OWNER/NAME/PATH to content
        self.large: dict[str, bytes] = {}  # SHA-256 to content


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub that huggingface_hub asks in this process, until the ``with`` ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content: object, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def is_refused(self) -> bool:
            refused = self.headers.get("Authorization") != f"Bearer {TOKEN}"
            if refused:
                self.answer({"error": "Invalid credentials"}, 401)
            return refused

        def do_GET(self) -> None:
            if not self.is_refused():
                name = "/".join(self.path.split("/")[3:5])
                self.answer({"name": "owner", "auth": {"type": "access_token"}, "id": name})

        def do_PUT(self) -> None:
            hub.large[self.path.rsplit("/", 1)[1]] = self.body()
            self.answer({})

        def do_POST(self) -> None:
            body = self.body()
            if self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif self.is_refused():
                return
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization', 'owner')}/{asked['name']}"
                hub.repositories[name] = asked
                self.answer({"url": f"{self.server_address()}/{name}"})
            elif "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                self.answer(
                    {
                        "files": [
                            {
                                "path": path,
                                "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                                "shouldIgnore": False,
                            }
                            for path in paths
                        ]
                    }
                )
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                for each in objects:
                    href = f"{self.server_address()}/lfs/{each['oid']}"
                    each["actions"] = {"upload": {"href": href, "header": {}}}
                self.answer({"transfer": "basic", "objects": objects})
            elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
                for line in body.splitlines():
                    entry = json.loads(line)
                    file = entry["value"]
                    if entry["key"] == "file":
                        content = base64.b64decode(file["content"])
                        hub.files[f"{match[1]}/{file['path']}"] = content
                    elif entry["key"] == "lfsFile":
                        hub.files[f"{match[1]}/{file['path']}"] = hub.large[file["oid"]]
                url = f"{self.server_address()}/{match[1]}/commit/1"
                self.answer({"success": True, "commitOid": "1", "commitUrl": url})
            else:
                self.answer({"error": self.path}, 404)

        def server_address(self) -> str:
            return f"http://127.0.0.1:{server.server_port}"

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    reset_sessions()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        monkeypatch.undo()
        reset_sessions()
