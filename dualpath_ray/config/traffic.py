"""Traffic classes: how each flow is marked, and how the fabric divides its bandwidth between them."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from dualpath_ray.config.section import Section
from dualpath_ray.traffic.classes import KV_CLASSES, Marking, TrafficClass

ServiceLevel = Annotated[int, Field(ge=0, le=15, description="InfiniBand service level, and the virtual lane it maps to.")]
Dscp = Annotated[int, Field(ge=0, le=63, description="DSCP of RoCE and TCP packets; its upper three bits are the 802.1p priority.")]
Weight = Annotated[int, Field(ge=1, le=255, description="Weight of the lane in the low-priority table, relative to the other lanes'.")]


class ClassSettings(Section):
    """One traffic class: each has its own defaults."""

    sl: ServiceLevel
    dscp: Dscp
    weight: Weight

    @property
    def marking(self) -> Marking:
        return Marking(self.sl, self.dscp)


class ModelClass(ClassSettings):
    """The `traffic.model` section."""

    sl: ServiceLevel = 0
    dscp: Dscp = 26
    weight: Weight = 192


class ControlClass(ClassSettings):
    """The `traffic.control` section."""

    sl: ServiceLevel = 1
    dscp: Dscp = 34
    weight: Weight = 192


class KVReadClass(ClassSettings):
    """The `traffic.kv_read` section."""

    sl: ServiceLevel = 2
    dscp: Dscp = 18
    weight: Weight = 64


class KVWriteClass(ClassSettings):
    """The `traffic.kv_write` section."""

    sl: ServiceLevel = 2
    dscp: Dscp = 10
    weight: Weight = 64


class TrafficSettings(Section):
    """The `traffic` section. Defaults are the paper's four lanes: KV in lane 2, below everything else."""

    enabled: bool = Field(
        default=False,
        description="Mark KV transfers by class. Off by default: on a RoCE fabric whose switches do not know the classes (see dualpath qos "
        "render), marked packets may land in a lossy queue.",
    )
    lanes: int = Field(default=4, ge=2, le=8, description="Virtual lanes (InfiniBand) or lossless traffic classes (RoCE) in use.")
    high_limit: int = Field(
        default=240,
        ge=1,
        le=254,
        description="Bytes, in units of 4 KiB, that high-priority lanes may send before a low-priority packet gets its turn. (255 would "
        "shut KV out while the model sends.)",
    )
    high_weight: int = Field(
        default=192, ge=1, le=255, description="Weight of each lane of the high-priority table. KV lanes are not in it."
    )
    model: ModelClass = Field(
        default=ModelClass(),
        description="The model's own communication: NCCL, NVSHMEM and the like mark it, not we; see dualpath qos render.",
    )
    control: ControlClass = Field(default=ControlClass(), description="Calls between actors, HTTP.")
    kv_read: KVReadClass = Field(default=KVReadClass(), description="KV that a request waits for.")
    kv_write: KVWriteClass = Field(default=KVWriteClass(), description="Completed blocks on their way to storage, in the background.")

    def of(self, traffic: TrafficClass) -> ClassSettings:
        settings: ClassSettings = getattr(self, traffic.value)
        return settings

    @model_validator(mode="after")
    def _kv_is_apart(self) -> Self:
        for kv in KV_CLASSES:
            for other in (TrafficClass.MODEL, TrafficClass.CONTROL):
                ours, theirs = self.of(kv).marking, self.of(other).marking
                for mark in ("sl", "dscp", "priority"):
                    if getattr(ours, mark) == getattr(theirs, mark):
                        raise ValueError(f"{kv} and {other} have the same {mark}: KV would compete with it as an equal; give them two")
        return self

    @model_validator(mode="after")
    def _service_levels_have_lanes(self) -> Self:
        for traffic in TrafficClass:
            if self.of(traffic).sl >= self.lanes:
                raise ValueError(f"{traffic}.sl is {self.of(traffic).sl}, but there are lanes 0 to {self.lanes - 1}: raise traffic.lanes")
        return self
