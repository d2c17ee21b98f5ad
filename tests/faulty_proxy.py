"""A proxy in front of an S3 server that fails on demand: real connections, real faults.

In a test::

    with FaultyProxy(server.endpoint_url) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        proxy.set("status", status=503, times=2)  # the next two requests
        proxy.set("corrupt", path=r"shard\\.00003", probability=0.5)
        proxy.clear()

As a program it prints its own address and that of its control, and serves until stdin closes::

    python tests/faulty_proxy.py http://127.0.0.1:9000

``ProxyControl(control_url)`` has the same ``set``, ``clear`` and ``hits``, for another process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import select
import socket
import struct
import sys
import threading
import time
import urllib.request
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

__all__ = ["Fault", "FaultyProxy", "ProxyControl"]

KINDS = ("down", "status", "deny", "stall", "slow", "reset", "truncate", "shorten", "corrupt")
_CODES = {403: "AccessDenied", 404: "NoSuchKey", 429: "SlowDown", 500: "InternalError"}


@dataclass
class Fault:
    """What goes wrong, and with which requests.

    Attributes:
        kind: ``down`` refuses connections (of all requests: the other filters do not apply);
            ``status`` answers with that status; ``deny`` is status 403; ``stall`` accepts and sends
            nothing; ``slow`` takes `seconds` for the answer; ``reset`` closes by RST in mid-body,
            of an upload or a download; ``truncate`` ends a download in mid-body, ``shorten`` also
            says so in Content-Length; ``corrupt`` flips bits of a download.
        status: HTTP status of ``status``.
        method: Regular expression for the methods it concerns.
        path: Regular expression, searched in the path with its query.
        times: How many requests it hits before it ends; None for all.
        probability: Of being hit, for a request that it concerns.
        seconds: Of ``slow`` and ``stall``; a stall also ends when the fault is cleared.
    """

    kind: str
    status: int = 503
    method: str = ""
    path: str = ""
    times: int | None = None
    probability: float = 1.0
    seconds: float = 3600.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"The kind of a fault must be one of {KINDS}, got {self.kind!r}.")


class FaultyProxy:
    """The proxy, in threads of this process, from ``with`` or ``start`` to ``stop``.

    Attributes:
        url: What clients take for the endpoint; the same through all faults.
    """

    def __init__(self, upstream: str, seed: int = 17) -> None:
        self.upstream = urlparse(upstream).netloc
        self._faults: list[Fault] = []
        self._hits: dict[str, int] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._socket = _bound_socket(0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def set(self, kind: str, **options: Any) -> None:
        """Switch a fault on, beside those that are on; `options` are the fields of Fault."""
        fault = Fault(kind, **options)
        with self._lock:
            self._faults.append(fault)
        if kind == "down":
            self._listen(False)

    def clear(self) -> None:
        """Switch all faults off."""
        with self._lock:
            was_down = any(fault.kind == "down" for fault in self._faults)
            self._faults.clear()
        if was_down:
            self._listen(True)

    def hits(self) -> dict[str, int]:
        """How many requests each kind of fault has hit so far; "none" counts the others."""
        with self._lock:
            return dict(self._hits)

    def start(self) -> None:
        """Serve."""
        self._socket.listen(128)
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections for good."""
        self._stopped.set()
        self._socket.close()

    def __enter__(self) -> FaultyProxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def pick(self, method: str, path: str) -> Fault | None:
        """The fault that hits this request, if any."""
        with self._lock:
            for fault in self._faults:
                if (
                    re.fullmatch(fault.method or ".*", method)
                    and re.search(fault.path, path)
                    and self._random.random() < fault.probability
                ):
                    if fault.times is not None:
                        fault.times -= 1
                        if fault.times == 0:
                            self._faults.remove(fault)
                    self._hits[fault.kind] = self._hits.get(fault.kind, 0) + 1
                    return fault
            self._hits["none"] = self._hits.get("none", 0) + 1
            return None

    def is_on(self, fault: Fault) -> bool:
        """Whether a stalled request must go on waiting."""
        return any(other is fault for other in self._faults) and not self._stopped.is_set()

    def _listen(self, yes: bool) -> None:
        """A socket that is bound keeps its port; unless it listens, the kernel refuses."""
        self._socket.close()
        deadline = time.monotonic() + 5
        while True:
            try:
                self._socket = _bound_socket(self.port)
                break
            except OSError:  # until poll() in the other thread has let go of the old one
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if yes:
            self._socket.listen(128)

    def _accept(self) -> None:
        while not self._stopped.is_set():
            listening = self._socket
            try:
                # With a timeout: to close a socket does not end a poll() for it. No select(): it
                # ends at file descriptor 1,023, and the process of the tests has more at times.
                waiting = select.poll()
                waiting.register(listening, select.POLLIN)
                if waiting.poll(50):
                    connection, address = listening.accept()
                    threading.Thread(
                        target=self._serve, args=(connection, address), daemon=True
                    ).start()
            except (OSError, ValueError):  # closed, or bound only: it is down
                time.sleep(0.01)

    def _serve(self, connection: socket.socket, address: Any) -> None:
        with contextlib.suppress(OSError), connection:  # the client may go at any time
            _Handler(connection, address, self)  # type: ignore[arg-type]


class ProxyControl:
    """Controls a proxy that runs in another process, as FaultyProxy does its own."""

    def __init__(self, control_url: str) -> None:
        self.control_url = control_url
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def set(self, kind: str, **options: Any) -> None:
        """As FaultyProxy.set."""
        self._ask("set", asdict(Fault(kind, **options)))

    def clear(self) -> None:
        """As FaultyProxy.clear."""
        self._ask("clear", {})

    def hits(self) -> dict[str, int]:
        """As FaultyProxy.hits."""
        return self._ask("hits", {})

    def _ask(self, what: str, data: dict[str, Any]) -> Any:
        url, body = f"{self.control_url}/{what}", json.dumps(data).encode()
        with self._opener.open(url, body, timeout=10) as answer:
            return json.load(answer)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy  # type: ignore[assignment]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _handle(self) -> None:
        self.close_connection = True
        fault = self.server.pick(self.command, self.path)
        kind = fault.kind if fault else ""
        if kind == "reset" and self.command in ("PUT", "POST"):
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self._reset()
        body = self._read_body()
        if fault and kind in ("stall", "slow"):
            # A slow answer is a fault of its own even when `times` has just ended the fault.
            end = time.monotonic() + fault.seconds
            while time.monotonic() < end and (kind == "slow" or self.server.is_on(fault)):
                time.sleep(0.02)
            if kind == "stall":
                return
        if fault and kind in ("status", "deny"):
            self._refuse(403 if kind == "deny" else fault.status)
            return
        status, reason, headers, answer = self._forward(body)
        length = len(answer)
        sent = answer
        if self.command == "GET" and status < 300:
            if kind in ("reset", "truncate", "shorten"):
                sent = answer[: length // 2]
            if kind == "shorten":
                length = len(sent)
            if kind == "corrupt":
                middle = len(answer) // 2
                sent = answer[:middle] + bytes([answer[middle] ^ 0x55]) + answer[middle + 1 :]
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        if self.command == "HEAD":
            length = int(dict(headers).get("Content-Length", 0))
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if kind == "reset":
            self._reset()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _forward(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        with contextlib.closing(upstream):
            # The client's own Host header is passed on: it is part of what it has signed.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in (
                    *("connection", "expect", "content-length"),
                    "transfer-encoding",
                ):
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer.status, answer.reason, answer.getheaders(), answer.read()

    def _refuse(self, status: int) -> None:
        code = _CODES.get(status, "ServiceUnavailable")
        body = f"<Error><Code>{code}</Code><Message>a fault of the test</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        time.sleep(0.05)  # what was sent shall arrive before the RST, which discards it
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        raise ConnectionResetError  # ends the handler; the socket is closed on the way


def _bound_socket(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(("127.0.0.1", port))
    except OSError:
        bound.close()
        raise
    return bound


def _control_server(proxy: FaultyProxy) -> HTTPServer:
    class Control(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            result = getattr(proxy, self.path.strip("/"))(**data)
            body = json.dumps(result).encode()
            self.send_response_only(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return ThreadingHTTPServer(("127.0.0.1", 0), Control)


if __name__ == "__main__":
    with FaultyProxy(sys.argv[1]) as faulty:
        control = _control_server(faulty)
        threading.Thread(target=control.serve_forever, daemon=True).start()
        print(faulty.url, f"http://127.0.0.1:{control.server_port}", flush=True)
        sys.stdin.read()  # ends also when our parent is killed
