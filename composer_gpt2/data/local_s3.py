"""A real S3 server on this machine, for `make train` and for the tests.

It is moto's server: the S3 protocol over HTTP on the loopback interface, objects in memory. Nothing
outside this machine can reach it, and it is gone when the process that started it ends.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["LocalS3", "local_s3_server"]

_ACCESS_KEY = "local"
_SECRET_KEY = "local-secret"
_REGION = "us-east-1"
_STARTUP_SECONDS = 60.0  # importing moto takes about 3 s on an idle machine
_STOP_SECONDS = 10.0


@contextmanager
def local_s3_server(port: int = 0) -> Iterator[LocalS3]:
    """Run an S3 server in a child process for as long as the ``with`` block lasts.

    Example:
        >>> with local_s3_server() as server:
        ...     server.create_bucket("corpus")
        ...     subprocess.run(command, env={**os.environ, **server.environment})

    Args:
        port: TCP port on 127.0.0.1; 0 lets the system choose a free one.

    Yields:
        The server, which answers already.

    Raises:
        RuntimeError: The server did not start; its own error is on stderr.
    """
    # Run this file as a script and isolated (-I): the child needs moto only, neither the package
    # nor Composer, and must not find our `streaming.py` where it looks for modules. moto may be
    # where only we look: PYTHONPATH, the user's own site-packages.
    process = subprocess.Popen(
        [sys.executable, "-I", os.path.abspath(__file__), str(port), *filter(None, sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    server = LocalS3("", process)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if selector.select(_STARTUP_SECONDS):
                server.endpoint_url = process.stdout.readline().strip()
        if not server.endpoint_url:
            raise RuntimeError(
                "The local S3 server must answer before it is used, but it did not start on port "
                f"{port or '0 (any free port)'}; its error is printed above. It needs the package "
                "`moto[server,s3]` and a free port."
            )
        yield server
    finally:
        server.stop()
        process.stdin.close()
        process.stdout.close()


@dataclass
class LocalS3:
    """A running S3 server.

    Attributes:
        endpoint_url: Where it answers, ``http://127.0.0.1:PORT``.
    """

    endpoint_url: str
    _process: subprocess.Popen[str] = field(repr=False)

    @property
    def environment(self) -> dict[str, str]:
        """What a process must have in its environment to use this server as its S3.

        Composer, streaming and this package read ``S3_ENDPOINT_URL``; boto3 reads the others.
        """
        no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        no_proxy = f"{no_proxy},127.0.0.1" if no_proxy else "127.0.0.1"
        return {
            "S3_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
            "AWS_DEFAULT_REGION": _REGION,
            # A proxy of the user cannot reach the loopback interface of this machine.
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def create_bucket(self, name: str) -> None:
        """Create an empty bucket.

        Args:
            name: 3 to 63 lower-case letters, digits and hyphens.
        """
        self.client().create_bucket(Bucket=name)

    def client(self):  # boto3 makes its client classes at run time: there is no type to name
        """A boto3 S3 client for this server that ignores the environment."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=_ACCESS_KEY,
            aws_secret_access_key=_SECRET_KEY,
            region_name=_REGION,
            config=Config(proxies={}),
        )

    def stop(self) -> None:
        """Stop the server; its objects are lost. Does nothing when it is stopped already."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _serve(port: int) -> None:
    """Serve until stdin closes, which happens also when our parent is killed."""
    import logging
    import threading

    from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # otherwise one line for each request
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server(
        "127.0.0.1", port, application, threaded=True, request_handler=MotoRequestHandler
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    sys.path.extend(sys.argv[2:])
    _serve(int(sys.argv[1]))
