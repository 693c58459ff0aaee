"""What the system tells about itself."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dualpath_ray.config.section import Section, Share, UserPath, Word


class TelemetrySettings(Section):
    """The `telemetry` section."""

    traces: Annotated[Literal["off", "file", "otlp"], Word] = Field(
        default="off",
        description="off: no spans are made; file: JSON lines, one file per process, under trace_path; otlp: sent to endpoint over HTTP.",
    )
    trace_path: UserPath = Field(
        default="traces",  # type: ignore[assignment]  # validated into a Path like a given value
        description="Directory of the trace files.",
    )
    trace_ratio: Share = Field(default=1.0, description="Share of requests that are traced (whole requests, by trace id).")
    endpoint: str | None = Field(
        default=None, pattern=r"^https?://", description="OTLP collector for traces: otlp, e.g. http://collector:4318/v1/traces."
    )
    metrics: bool = Field(default=True, description="Serve metrics at /metrics.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least severe log records that are written."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="text: key=value lines; json: one object per line.")

    @model_validator(mode="after")
    def _otlp_has_endpoint(self) -> Self:
        if self.traces == "otlp" and self.endpoint is None:
            raise ValueError("traces: otlp needs endpoint, the URL of the collector")
        return self
