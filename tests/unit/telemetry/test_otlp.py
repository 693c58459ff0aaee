from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from dualpath_ray.config import TelemetrySettings
from dualpath_ray.telemetry import tracing


class Collector(HTTPServer):
    """A real HTTP server that keeps what is sent to it."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    tracing.shutdown()
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_reach_an_otlp_collector(collector: Collector) -> None:
    url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    tracing.setup(TelemetrySettings(traces="otlp", endpoint=url), "decode", "d0/0")
    tracing.span("decode", blocks=2).end()
    tracing.shutdown()
    ((path, request),) = collector.requests
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    assert {item.key: item.value.string_value for item in resource.resource.attributes}["service.instance.id"] == "d0/0"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["decode"]
