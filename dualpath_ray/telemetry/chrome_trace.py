"""`dualpath trace`: turn trace files into one that chrome://tracing and Perfetto open."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from dualpath_ray.telemetry.span_file import SpanRecord, read_spans


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def command(directory: Path) -> None:
    """Convert the trace files in DIRECTORY to Chrome's trace format, on standard output."""
    click.echo(json.dumps(chrome_trace(read_spans(directory))))


def chrome_trace(spans: Iterable[SpanRecord]) -> dict[str, Any]:
    """One process per service instance; within it one row per request, and more where spans of a request overlap."""
    processes: dict[tuple[str, str], int] = {}
    rows: dict[tuple[int, str], list[list[int]]] = {}  # per process and trace: for each row the stack of open spans' ends
    numbers: dict[tuple[int, str, int], int] = {}
    events: list[dict[str, Any]] = []
    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
        process = processes.setdefault((span.service, span.instance), len(processes) + 1)
        row = _row(rows.setdefault((process, span.trace_id), []), span)
        thread = numbers.setdefault((process, span.trace_id, row), len(numbers) + 1)
        arguments = {**span.attributes, "trace": span.trace_id, **({"error": span.error} if span.error else {})}
        place = {"pid": process, "tid": thread, "cat": span.service}
        duration = (span.end_ns - span.start_ns) / 1e3
        events.append({"ph": "X", "name": span.name, "ts": span.start_ns / 1e3, "dur": duration, "args": arguments, **place})
        for event in span.events:
            events.append({"ph": "i", "s": "t", "name": event["name"], "ts": event["time_ns"] / 1e3, "args": dict(event), **place})
    for (service, instance), process in processes.items():
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": f"{service} {instance}"}})
    for (process, trace, row), thread in numbers.items():
        events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": f"{trace[:8]}.{row}"}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _row(rows: list[list[int]], span: SpanRecord) -> int:
    """The first row where the span is inside the innermost open one, or after all; viewers draw only proper nesting."""
    for index, ends in enumerate(rows):
        while ends and ends[-1] <= span.start_ns:
            ends.pop()
        if not ends or span.end_ns <= ends[-1]:
            ends.append(span.end_ns)
            return index
    rows.append([span.end_ns])
    return len(rows) - 1
