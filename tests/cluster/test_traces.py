"""One trace from HTTP to the transfers, at a real OTLP receiver."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from ray import serve

from deploy.app import application
from deploy.running_service import free_port
from tests.cluster.conftest import RunningCluster
from tests.unit.telemetry.test_otlp import Collector, collector  # noqa: F401

TRACE = "5b" * 16
EXPECTED = {
    "request": "http",
    "schedule": "http",
    "scheduler.assign": "scheduler",
    "decode.arm": "decode",
    "prefill": "decode",
    "prefill.queue": "prefill",
    "prefill.layer": "prefill",
    "gateway.read": "gateway",
    "gateway.deliver": "gateway",
    "decode.allocate": "decode",
    "decode": "decode",
}


@pytest.fixture
def traced(collector: Collector, start_cluster: Callable[..., RunningCluster], tiny_llama: Path) -> Iterator[str]:  # noqa: F811
    url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    running = start_cluster(f"model.spec={tiny_llama}", "telemetry.traces=otlp", f"telemetry.endpoint={url}")
    port = free_port("127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING", "enable_access_log": False})
    serve.run(application(running.cluster.settings, start_engines=False), name="traced", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_one_trace_leads_from_http_to_the_transfers(traced: str, collector: Collector) -> None:  # noqa: F811
    with httpx.Client(base_url=traced, timeout=120) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        body = {"model": model, "prompt": "one trace " * 40, "max_tokens": 4, "ignore_eos": True}
        http.post("/v1/completions", json=body).raise_for_status()
        time.sleep(1.0)  # what the first one computed becomes durable
        http.post("/v1/completions", json=body, headers={"traceparent": f"00-{TRACE}-{'1c' * 8}-01"}).raise_for_status()
    deadline = time.monotonic() + 20
    while (found := spans(collector)).keys() != EXPECTED.keys() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found == EXPECTED


def spans(collector: Collector) -> dict[str, str]:  # noqa: F811
    """Services by name of the trace's spans."""
    return {
        span.name: next(item.value.string_value for item in part.resource.attributes if item.key == "service.name").removeprefix(
            "dualpath-"
        )
        for _, request in collector.requests
        for part in request.resource_spans
        for scope in part.scope_spans
        for span in scope.spans
        if span.trace_id.hex() == TRACE
    }
