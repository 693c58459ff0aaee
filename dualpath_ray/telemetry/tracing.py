"""Spans of one request across processes. The context travels by hand, in a carrier `{"traceparent": ...}` that is part of messages.

    with tracing.span("gateway.read", request.trace, blocks=8) as span:
        await peer.read(trace=span.carrier())

No context variables: what runs in which thread or task does not matter, and Ray's own tracing hook (which breaks streaming actor
methods) is not needed. While tracing is off, `span` returns one shared object that does nothing.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dualpath_ray.config.telemetry import TelemetrySettings
from dualpath_ray.errors import ConfigError
from dualpath_ray.telemetry.span_file import SpanFileExporter

Attribute = str | bool | int | float | Sequence[str]
Carrier = Mapping[str, str]

EXPORT_INTERVAL_MS = 500  # spans of a killed process that are younger than this are lost
MAX_WAITING = 65_536  # further spans are dropped (the SDK says so in the log); one takes about 2 KB

_w3c = TraceContextTextMapPropagator()
_provider: TracerProvider | None = None
_tracer: Tracer | None = None  # None: tracing is off


class Span:
    """A stretch of work of this process. Ends with its `with` block (an exception is recorded and goes on) or by `end()`."""

    __slots__ = ("_span",)

    def __init__(self, span: OtelSpan) -> None:
        self._span = span

    def carrier(self) -> dict[str, str]:
        """Context for the work that this span causes, here or elsewhere."""
        carrier: dict[str, str] = {}
        _w3c.inject(carrier, set_span_in_context(self._span))
        return carrier

    def trace_id(self) -> str:
        """The trace's id in hexadecimal; empty if the trace is not recorded."""
        context = self._span.get_span_context()
        return f"{context.trace_id:032x}" if context.trace_flags.sampled else ""

    def set(self, **attributes: Attribute) -> None:
        """Add facts that became known during the work."""
        self._span.set_attributes(attributes)

    def event(self, name: str, **attributes: Attribute) -> None:
        """Mark a moment in the span."""
        self._span.add_event(name, attributes)

    def end(self) -> None:
        self._span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self._span.set_status(StatusCode.ERROR, f"{type(error).__name__}: {error}")
        self._span.end()


class _Off(Span):
    """What `span` returns while tracing is off: one object for all."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    def carrier(self) -> dict[str, str]:
        return {}

    def trace_id(self) -> str:
        return ""

    def set(self, **attributes: Attribute) -> None:
        pass

    def event(self, name: str, **attributes: Attribute) -> None:
        pass

    def end(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        pass


_OFF = _Off()


def setup(settings: TelemetrySettings, service: str, instance: str) -> None:
    """Start tracing in this process as `service` (gateway, prefill, ...) number or name `instance`; with traces: off, stop it.

    Raises ConfigError when the trace directory cannot be written or the OTLP exporter is not installed.
    """
    global _provider, _tracer
    shutdown()
    if settings.traces == "off":
        return
    exporter = _exporter(settings, service, instance)
    resource = Resource.create({"service.name": f"dualpath-{service}", "service.instance.id": instance, "process.pid": os.getpid()})
    _provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(settings.trace_ratio)), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_WAITING, schedule_delay_millis=EXPORT_INTERVAL_MS))
    _tracer = _provider.get_tracer("dualpath_ray")


def shutdown() -> None:
    """Write out what is pending and turn tracing off. Idempotent; also done at exit."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.shutdown()


atexit.register(shutdown)


def enabled() -> bool:
    """Whether spans are made; ask before computing an expensive attribute."""
    return _tracer is not None


def span(name: str, carrier: Carrier = {}, **attributes: Attribute) -> Span:  # noqa: B006  # only read
    """Start a span under the carrier's (an empty carrier starts a new trace)."""
    if _tracer is None:
        return _OFF
    return Span(_tracer.start_span(name, _w3c.extract(carrier), attributes=attributes))


def record(name: str, carrier: Carrier, start: float, end: float, **attributes: Attribute) -> None:
    """Add a span afterwards, from two readings of `time.monotonic()`: hot loops measure first and report when there is time."""
    if _tracer is None:
        return
    epoch = time.time_ns() - time.monotonic_ns()
    span = _tracer.start_span(name, _w3c.extract(carrier), attributes=attributes, start_time=epoch + int(start * 1e9))
    span.end(epoch + int(end * 1e9))


def _exporter(settings: TelemetrySettings, service: str, instance: str) -> SpanExporter:
    if settings.traces == "file":
        return SpanFileExporter(settings.trace_path / f"{service}-{instance}-{os.getpid()}.jsonl")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise ConfigError("telemetry.traces: otlp needs an extra package: pip install 'dualpath-ray[otlp]'") from error
    return OTLPSpanExporter(endpoint=settings.endpoint)
