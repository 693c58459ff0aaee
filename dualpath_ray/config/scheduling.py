"""The scheduler's settings: the policies' own, and how often it hears from the engines."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dualpath_ray.config.section import Seconds
from policies.settings import SchedulingSettings as PolicySettings


class SchedulingSettings(PolicySettings):
    """The `scheduling` section. The fields of the policies are documented where the policies are (`policies/settings.py`)."""

    report_interval_s: Seconds = Field(
        default=0.1,
        description="Engines and gateways push a load report on change and at least this often; more rarely if there are over 20.",
    )

    @model_validator(mode="after")
    def _timeout_spans_several_reports(self) -> Self:
        if self.report_timeout_s < 3 * self.report_interval_s:
            raise ValueError("report_timeout_s must be at least three times report_interval_s, or every late report drops an engine")
        return self
