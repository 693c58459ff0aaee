"""Spans as JSON lines, one file per process: readable with a text editor, and convertible for a trace viewer (`chrome_trace.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from dualpath_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One finished span; times in nanoseconds since the epoch, ids in hexadecimal, `parent_id` empty for a trace's root."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    service: str
    instance: str
    start_ns: int
    end_ns: int
    error: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()


class SpanFileExporter(SpanExporter):
    """Appends to `path`, which is made with its directory. Raises ConfigError when that is not possible."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"trace file {path} cannot be written ({error.strerror}); set telemetry.trace_path") from error

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            self._file.writelines(json.dumps(asdict(_record(span))) + "\n" for span in spans)
            self._file.flush()
        except OSError:  # a full disk must not stop the service; the SDK logs the failure
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._file.close()


def read_spans(directory: Path) -> Iterator[SpanRecord]:
    """All spans of all trace files in `directory`. A last line that a killed process left incomplete is skipped.

    Raises ConfigError when there is no trace file.
    """
    files = sorted(directory.glob("*.jsonl"))
    if not files:
        raise ConfigError(f"there are no trace files (*.jsonl) in {directory}; run with telemetry.traces=file first")
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield SpanRecord(**json.loads(line))


def _record(span: ReadableSpan) -> SpanRecord:
    context, parent = span.get_span_context(), span.parent
    assert context is not None  # a span that was started has one
    resource = span.resource.attributes
    return SpanRecord(
        name=span.name,
        trace_id=f"{context.trace_id:032x}",
        span_id=f"{context.span_id:016x}",
        parent_id="" if parent is None else f"{parent.span_id:016x}",
        service=str(resource["service.name"]),
        instance=str(resource["service.instance.id"]),
        start_ns=span.start_time or 0,
        end_ns=span.end_time or 0,
        error=span.status.description or "",
        attributes=dict(span.attributes or {}),
        events=[{"name": event.name, "time_ns": event.timestamp, **(event.attributes or {})} for event in span.events],
    )
