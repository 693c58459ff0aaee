from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from dualpath_ray.config import TelemetrySettings
from dualpath_ray.errors import ConfigError, TransferError
from dualpath_ray.telemetry import chrome_trace, tracing
from dualpath_ray.telemetry.span_file import SpanRecord, read_spans


@pytest.fixture(autouse=True)
def off_afterwards() -> Iterator[None]:
    yield
    tracing.shutdown()


def on(directory: Path, **settings: object) -> None:
    tracing.setup(TelemetrySettings(traces="file", trace_path=directory, **settings), "gateway", "p0")


def spans(directory: Path) -> dict[str, SpanRecord]:
    tracing.shutdown()
    return {span.name: span for span in read_spans(directory)}


def test_children_hang_on_the_carrier_they_are_given(tmp_path: Path) -> None:
    on(tmp_path)
    with tracing.span("request", tenant="a") as root:
        child = tracing.span("read", root.carrier(), blocks=3)
        child.event("first layer", layer=0)
        child.set(bytes=17)
        with tracing.span("unrelated"):
            pass
        child.end()
    found = spans(tmp_path)
    assert found["request"].parent_id == ""
    assert (found["read"].trace_id, found["read"].parent_id) == (found["request"].trace_id, found["request"].span_id)
    assert found["read"].attributes == {"blocks": 3, "bytes": 17}
    assert found["read"].events[0]["name"] == "first layer" and found["read"].events[0]["layer"] == 0
    assert (found["read"].service, found["read"].instance) == ("dualpath-gateway", "p0")
    assert found["request"].start_ns <= found["read"].start_ns <= found["read"].end_ns <= found["request"].end_ns
    assert found["unrelated"].trace_id != found["request"].trace_id


def test_a_carrier_from_elsewhere_is_continued(tmp_path: Path) -> None:
    on(tmp_path)
    tracing.span("here", {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}).end()
    tracing.span("garbage", {"traceparent": "nonsense"}).end()
    found = spans(tmp_path)
    assert (found["here"].trace_id, found["here"].parent_id) == ("ab" * 16, "cd" * 8)
    assert found["garbage"].parent_id == ""


def test_an_exception_is_recorded_and_goes_on(tmp_path: Path) -> None:
    on(tmp_path)
    with pytest.raises(TransferError), tracing.span("push"):
        raise TransferError("peer died")
    assert spans(tmp_path)["push"].error == "TransferError: peer died"


def test_a_span_can_be_added_afterwards(tmp_path: Path) -> None:
    on(tmp_path)
    now, wall = time.monotonic(), time.time_ns()
    tracing.record("layer", {}, now - 2.0, now - 1.5, layer=3)
    layer = spans(tmp_path)["layer"]
    assert layer.end_ns - layer.start_ns == pytest.approx(0.5e9, abs=1e3)
    assert wall - layer.start_ns == pytest.approx(2e9, abs=0.5e9)
    assert layer.attributes == {"layer": 3}


def test_sampling_decides_for_whole_requests(tmp_path: Path) -> None:
    on(tmp_path, trace_ratio=0.0)
    with tracing.span("request") as root:
        carrier = root.carrier()
        tracing.span("read", carrier).end()
    assert not int(carrier["traceparent"][-2:], 16) & 1, "the sampled flag must tell other processes"
    tracing.shutdown()
    assert list(read_spans(tmp_path)) == []


def test_off_makes_no_object_per_span(tmp_path: Path) -> None:
    assert not tracing.enabled()
    first = tracing.span("a", {}, x=1)
    with first as entered:
        assert entered is tracing.span("b") is first
        entered.set(y=2)
        entered.event("z")
        assert entered.carrier() == {}
    tracing.record("c", {}, 0.0, 1.0)

    def loop() -> None:
        for _ in range(1000):
            with tracing.span("hot", blocks=3):
                pass

    loop()
    before = sys.getallocatedblocks()
    loop()
    assert sys.getallocatedblocks() - before < 50


def test_setup_with_off_stops_tracing(tmp_path: Path) -> None:
    on(tmp_path)
    assert tracing.enabled()
    tracing.setup(TelemetrySettings(), "gateway", "p0")
    assert not tracing.enabled()


def test_a_trace_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"telemetry.trace_path"):
        on(tmp_path / "file")


def test_a_line_cut_off_by_a_kill_is_skipped(tmp_path: Path) -> None:
    on(tmp_path)
    tracing.span("whole").end()
    tracing.shutdown()
    file = next(tmp_path.glob("*.jsonl"))
    with file.open("a") as handle:
        handle.write('{"name": "hal')
    assert [span.name for span in read_spans(tmp_path)] == ["whole"]


def span_record(name: str, start: int, end: int, instance: str = "0") -> SpanRecord:
    return SpanRecord(name, "t" * 32, name, "", "prefill", instance, start, end)


def test_chrome_trace_rows_hold_properly_nested_spans() -> None:
    spans = [
        span_record("a", 0, 100),
        span_record("inner", 10, 20),
        span_record("overlaps", 50, 150),
        span_record("later", 100, 110),
        span_record("other", 0, 1, "1"),
    ]
    events = {event["name"]: event for event in chrome_trace.chrome_trace(spans)["traceEvents"] if event["ph"] == "X"}
    assert events["a"]["tid"] == events["inner"]["tid"] == events["later"]["tid"] != events["overlaps"]["tid"]
    assert events["a"]["pid"] != events["other"]["pid"]
    assert (events["inner"]["ts"], events["inner"]["dur"]) == (0.01, 0.01)


def test_the_command_converts_a_directory(tmp_path: Path) -> None:
    on(tmp_path)
    with tracing.span("request") as span:
        span.event("moment")
    tracing.shutdown()
    result = CliRunner().invoke(chrome_trace.command, [str(tmp_path)])
    names = [event["name"] for event in json.loads(result.output)["traceEvents"]]
    assert names == ["request", "moment", "process_name", "thread_name"]
    with pytest.raises(ConfigError, match=r"telemetry\.traces=file"):
        list(read_spans(tmp_path / "empty"))
