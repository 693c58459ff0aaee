"""The real Prometheus with our configuration, our rules and our metrics; every query of the dashboard is asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.monitoring.grafana import dashboard
from deploy.running_service import free_port
from dualpath_ray.telemetry.exposition import merge
from dualpath_ray.telemetry.metrics import Metrics

MONITORING = Path(__file__).parents[3] / "deploy" / "monitoring"
PROMETHEUS = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason="no Prometheus on this machine (Debian: apt-get install prometheus)")
TRACE = "ab" * 16


class Service:
    """A process that has every metric, growing with each scrape."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.scrapes = 0

    def exposition(self, accept: str) -> tuple[str, str]:
        self.scrapes += 1
        metrics = self.metrics
        for spec in metrics.specs:
            collector = metrics.registry._names_to_collectors[spec.name]
            values = [[value.strip() for value in text.replace(" or ", ", ").split(",")] for text in spec.labels.values()]
            rows = max((len(v) for v in values), default=1)
            for labels in ([v[row % len(v)] for v in values] for row in range(rows)):
                child = collector.labels(*labels) if labels else collector
                if spec.kind == "counter":
                    child.inc(3)
                elif spec.kind == "gauge":
                    child.set(2)
                else:
                    child.observe(0.3, {"trace_id": TRACE})
        made = merge([({"service": "gateway", "instance": "p0"}, metrics.render())], accept)
        return made.text, made.content_type


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text, content_type = service.exposition(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    target = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=target.serve_forever)
    thread.start()
    directory = tmp_path_factory.mktemp("prometheus")
    shutil.copy(MONITORING / "alerts.yaml", directory)
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}  # the test is in a hurry
    (scrape,) = [job for job in config["scrape_configs"] if job["job_name"] == "dualpath"]
    scrape["static_configs"] = [{"targets": [f"127.0.0.1:{target.server_port}"]}]
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port("127.0.0.1")
    command = [str(PROMETHEUS), f"--config.file={directory}/prometheus.yaml", f"--storage.tsdb.path={directory}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage"]
    with (directory / "log").open("w") as log, subprocess.Popen(command, stderr=log, stdout=log) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30) as client:
                _wait(client, service, directory / "log")
                yield client
        finally:
            process.terminate()
            process.wait(30)
            target.shutdown()
            thread.join()
            target.server_close()


def _wait(client: httpx.Client, service: Service, log: Path) -> None:
    """Until some scrapes have been made and all rules been evaluated on them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if service.scrapes > 5 and ask(client, "dualpath:snic_read:max_over_mean"):
                return
        except (httpx.HTTPError, ValueError):
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def ask(client: httpx.Client, expression: str) -> list[Any]:
    answer = client.get("/query", params={"query": expression}).json()
    assert answer["status"] == "success", f"{expression}: {answer}"
    result: list[Any] = answer["data"]["result"]
    return result


@needs_prometheus
def test_all_metrics_are_scraped_and_all_rules_are_healthy(prometheus: httpx.Client) -> None:
    names = set(prometheus.get("/label/__name__/values").json()["data"])
    for spec in Metrics().specs:
        assert (f"{spec.name}_bucket" if spec.kind == "histogram" else spec.name) in names
    rules = [rule for group in prometheus.get("/rules").json()["data"]["groups"] for rule in group["rules"]]
    assert len(rules) == 15
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    assert ask(prometheus, 'up{job="dualpath"} == 1')


@needs_prometheus
def test_every_panel_shows_something(prometheus: httpx.Client) -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            assert ask(prometheus, target["expr"].replace("$__rate_interval", "30s")), f"{panel['title']}: {target['expr']}"


@needs_prometheus
def test_exemplars_lead_to_traces(prometheus: httpx.Client) -> None:
    now = time.time()
    query = {"query": "dualpath_ttft_seconds_bucket", "start": now - 60, "end": now + 60}
    found = prometheus.get("/query_exemplars", params=query).json()["data"]
    assert {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]} == {TRACE}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on this machine (Debian: apt-get install prometheus)")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    tests = (Path(__file__).parent / "alerts_test.yaml").read_text().replace("ALERTS", str(MONITORING / "alerts.yaml"))
    (tmp_path / "tests.yaml").write_text(tests)
    result = subprocess.run(["promtool", "test", "rules", str(tmp_path / "tests.yaml")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_dashboard_is_up_to_date() -> None:
    assert json.loads((MONITORING / "grafana.json").read_text()) == dashboard(), "run `make docs`"
