"""Log records as one line each, key=value or JSON, with the request they belong to. Prompts and generated text are never logged."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime

from dualpath_ray.config.telemetry import TelemetrySettings

LOGGERS = ("dualpath_ray", "policies", "actors", "deploy", "load_tests")  # ours; other libraries' logging is left alone
_request_id: ContextVar[str] = ContextVar("request_id", default="")


@contextlib.contextmanager
def request(request_id: str) -> Iterator[None]:
    """Log records made inside (also by tasks that start inside) carry this request id."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def bind(request_id: str) -> None:
    """The same for the rest of this task; for asynchronous generators, which may not leave a context that they entered elsewhere."""
    _request_id.set(request_id)


def setup(settings: TelemetrySettings, service: str, instance: str) -> None:
    """Send this process's log records to standard error. May be called again; the last call counts."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(service, instance, settings.log_format == "json"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(settings.log_level)
        logger.propagate = False


class LineFormatter(logging.Formatter):
    """One record, one line: time (UTC), level, logger, service, instance, request if any, message, error if any."""

    def __init__(self, service: str, instance: str, as_json: bool) -> None:
        super().__init__()
        self._process = {"service": service, "instance": instance}
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            **self._process,
        }
        if request_id := getattr(record, "request_id", "") or _request_id.get():
            fields["request_id"] = request_id
        fields["message"] = record.getMessage()
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        if self._as_json:
            return json.dumps(fields)
        return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())


def _quoted(value: str) -> str:
    """What is not printable is escaped: no value ends its line, or writes to a terminal as another."""
    if not value.isprintable():
        return json.dumps(value)
    return value if value and not any(character in value for character in ' "=') else json.dumps(value, ensure_ascii=False)
