"""Where blocks are kept: the block store, and the staging memory of each gateway."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ByteSize, Field, model_validator

from dualpath_ray.config.section import Count, Delay, Section, UserPath
from dualpath_ray.errors import ConfigError

DEFAULT_STAGING_BYTES = 1 << 30


class EmulationSettings(Section):
    """The `storage.emulation` section: a slower device than the real one, for tests and experiments on one machine."""

    latency_s: Delay = Field(default=0.0, description="Added to every read and write.")
    read_bandwidth: ByteSize | None = Field(
        default=None, gt=0, description="Bytes per second that one gateway reads at most; none: no limit."
    )
    write_bandwidth: ByteSize | None = Field(
        default=None, gt=0, description="Bytes per second that one gateway writes at most; none: no limit."
    )

    @property
    def active(self) -> bool:
        """Whether anything is emulated at all."""
        return bool(self.latency_s or self.read_bandwidth or self.write_bandwidth)


class StorageSettings(Section):
    """The `storage` section: the block store that all gateways share."""

    kind: Literal["directory"] = Field(default="directory", description="directory: one file per Full Block under path.")
    path: UserPath = Field(
        default="~/.cache/dualpath-ray/blocks",  # type: ignore[assignment]  # validated into a Path like a given value
        description="Directory of the blocks: local disk, NFS or 3FS mount; the same for all gateways.",
    )
    layer_groups: Count | None = Field(
        default=None,
        description="Layer ranges that a read is cut into, so that the first layers arrive early; default: the store's choice.",
    )
    durability: Literal["fsync", "none"] = Field(
        default="fsync",
        description="fsync: a block is visible only when it would survive a power failure; none: when it would survive a crash of ours.",
    )
    io_threads: Count = Field(default=4, description="Threads for files per gateway.")
    emulation: EmulationSettings = Field(default=EmulationSettings(), description="Emulate a slower device.")


class StagingSettings(Section):
    """The `staging` section: DRAM of each gateway, an array of Full-Block slots registered for transfers once."""

    slots: Count | None = Field(default=None, description="Full-Block slots per gateway; default: from bytes.")
    bytes: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Memory per gateway, e.g. 8GiB; default: 1GiB, but at least room for two requests of the longest context.",
    )

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.slots is not None and self.bytes is not None:
            raise ValueError("slots and bytes are two ways to say the same: give one of them")
        return self

    def slot_count(self, full_block_bytes: int, blocks_per_context: int) -> int:
        """Slots of one gateway. Raises ConfigError when a request of the longest context (`blocks_per_context`) cannot fit."""
        if self.slots is None and self.bytes is None:
            return max(DEFAULT_STAGING_BYTES // full_block_bytes, 2 * blocks_per_context)
        slots = self.slots if self.slots is not None else (self.bytes or 0) // full_block_bytes
        if slots < blocks_per_context:
            raise ConfigError(
                f"staging holds {slots} blocks of {full_block_bytes} bytes, but a request of the longest context needs "
                f"{blocks_per_context}: raise staging.slots or staging.bytes, or lower model.max_context"
            )
        return slots
