"""The whole configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from dualpath_ray.config import sources
from dualpath_ray.config.autoscaling import AutoscalingSettings
from dualpath_ray.config.cluster import ClusterSettings
from dualpath_ray.config.engines import DecodeSettings, PrefillSettings
from dualpath_ray.config.model import ModelSettings
from dualpath_ray.config.scheduling import SchedulingSettings
from dualpath_ray.config.section import Section
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.config.storage import StagingSettings, StorageSettings
from dualpath_ray.config.telemetry import TelemetrySettings
from dualpath_ray.config.traffic import TrafficSettings
from dualpath_ray.config.transfer import TransferSettings
from dualpath_ray.errors import ConfigError


class Settings(Section):
    """A deployment. Plain values all through: it can be pickled, sent to actors and compared."""

    model: ModelSettings = Field(default=ModelSettings(), description="Which model is served, and how it is computed.")
    cluster: ClusterSettings = Field(default=ClusterSettings(), description="How many engines there are, and where Ray puts them.")
    autoscaling: AutoscalingSettings = Field(
        default=AutoscalingSettings(), description="When nodes are added, removed, or change their role."
    )
    storage: StorageSettings = Field(default=StorageSettings(), description="The block store that all gateways share.")
    staging: StagingSettings = Field(default=StagingSettings(), description="DRAM of each gateway.")
    prefill: PrefillSettings = Field(default=PrefillSettings(), description="How much a prefill engine takes on at once.")
    decode: DecodeSettings = Field(default=DecodeSettings(), description="How much a decode engine takes on at once.")
    transfer: TransferSettings = Field(default=TransferSettings(), description="How bytes move between processes.")
    traffic: TrafficSettings = Field(default=TrafficSettings(), description="Traffic classes: how flows are marked and weighed.")
    scheduling: SchedulingSettings = Field(default=SchedulingSettings(), description="How engines and read paths are chosen.")
    serving: ServingSettings = Field(default=ServingSettings(), description="The HTTP service and the limits of its API.")
    telemetry: TelemetrySettings = Field(default=TelemetrySettings(), description="What the system tells about itself.")

    @model_validator(mode="after")
    def _chunks_are_whole_blocks(self) -> Self:
        if self.prefill.max_batch_tokens % self.model.block_tokens:
            raise ValueError(f"prefill.max_batch_tokens must be a multiple of model.block_tokens ({self.model.block_tokens})")
        return self

    @model_validator(mode="after")
    def _window_holds_a_batch(self) -> Self:
        if self.prefill.window_tokens is not None and self.prefill.window_tokens < self.prefill.max_batch_tokens:
            raise ValueError("prefill.window_tokens must be at least prefill.max_batch_tokens")
        return self

    @model_validator(mode="after")
    def _window_holds_the_longest_context(self) -> Self:
        window, context = self.prefill.window_tokens, self.model.max_context
        if window is not None and context is not None and window < context:
            raise ValueError("prefill.window_tokens must be at least model.max_context: attention needs the whole history of a layer")
        return self

    @model_validator(mode="after")
    def _machines_can_be_asked_for(self) -> Self:
        spread = self.autoscaling.enabled and self.cluster.placement == "spread"
        if spread and not (self.cluster.prefill_resources and self.cluster.decode_resources):
            raise ValueError(
                "autoscaling with cluster.placement=spread needs cluster.prefill_resources and cluster.decode_resources: a custom resource "
                "of which each machine has one, e.g. {dp_prefill: 1} and {dp_decode: 1}"
            )
        return self

    @classmethod
    def load(cls, path: Path | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Self:
        """Settings from, in rising precedence: defaults, the YAML file `path`, `DUALPATH__SECTION__FIELD` variables of `environ`
        (default: the process's), and `overrides` like `prefill.window_layers=2`.

        Raises ConfigError: one line that names the field, where its value came from, and what it may be.
        """
        merged = sources.merge(path, os.environ if environ is None else environ, overrides)
        try:
            return cls.model_validate(merged.values)
        except ValidationError as error:
            raise ConfigError(sources.explain(error, merged, cls)) from error
