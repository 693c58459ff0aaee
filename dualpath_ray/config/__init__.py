"""Everything a deployment can set. `Settings` is the whole; each section is a class of its own module."""

from __future__ import annotations

from dualpath_ray.config.autoscaling import AutoscalingSettings
from dualpath_ray.config.cluster import ClusterSettings
from dualpath_ray.config.engines import DecodeSettings, PrefillSettings
from dualpath_ray.config.model import ModelSettings
from dualpath_ray.config.scheduling import SchedulingSettings
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.config.settings import Settings
from dualpath_ray.config.storage import EmulationSettings, StagingSettings, StorageSettings
from dualpath_ray.config.telemetry import TelemetrySettings
from dualpath_ray.config.transfer import TransferSettings

__all__ = [
    "AutoscalingSettings",
    "ClusterSettings",
    "DecodeSettings",
    "EmulationSettings",
    "ModelSettings",
    "PrefillSettings",
    "SchedulingSettings",
    "ServingSettings",
    "Settings",
    "StagingSettings",
    "StorageSettings",
    "TelemetrySettings",
    "TransferSettings",
]
