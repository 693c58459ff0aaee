"""Where blocks are kept: the block store, and the staging memory of each gateway."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ByteSize, Field, model_validator

from dualpath_ray.config.section import Count, Delay, Seconds, Section, Share, UserPath, Word
from dualpath_ray.errors import ConfigError

DEFAULT_STAGING_BYTES = 1 << 30


class EmulationSettings(Section):
    """The `storage.emulation` section: a slower or faulty device than the real one, for tests and experiments on one machine.

    Field names are those of `dualpath_ray.stores.emulated.EmulationSettings`.
    """

    read_bandwidth: ByteSize = Field(
        default=ByteSize(0), ge=0, description="Bytes per second that one gateway reads at most, e.g. 1GB; 0: as fast as it can."
    )
    write_bandwidth: ByteSize = Field(
        default=ByteSize(0), ge=0, description="Bytes per second that one gateway writes at most; 0: as fast as it can."
    )
    latency_s: Delay = Field(default=0.0, description="Added to every call.")
    jitter_s: Delay = Field(default=0.0, description="Added to every call, up to this much at random.")
    delay_layer: dict[int, Delay] = Field(default={}, description="Seconds by which reads of a layer come later, e.g. {3: 0.5}.")
    error_rate: Share = Field(default=0.0, description="Probability that a call fails as a device does.")
    corrupt_rate: Share = Field(default=0.0, description="Probability that a read returns a damaged block.")
    stall_rate: Share = Field(default=0.0, description="Probability that a call is held back for stall_s.")
    stall_s: Seconds = Field(default=60.0, description="How long a stalled call is held back.")
    seed: int = Field(default=0, description="Fixes the sequence of random choices.")

    @property
    def active(self) -> bool:
        """Whether anything is emulated at all."""
        return self != EmulationSettings()


class S3Settings(Section):
    """The `storage.s3` section: a bucket of any S3 service.

    Credentials come from the environment (AWS_ACCESS_KEY_ID, ...) of the gateways.
    """

    bucket: str = Field(default="", description="Bucket of the blocks; it must exist.")
    endpoint: str = Field(
        default="", pattern=r"^(https?://.+)?$", description="URL of the S3 service, e.g. http://storage:8333; default: AWS."
    )
    prefix: str = Field(default="blocks", description="Folder within the bucket.")
    region: str = Field(default="us-east-1", description="Region of the bucket.")
    anonymous: bool = Field(default=False, description="Send requests unsigned, for services without access control.")
    request_timeout_s: Seconds = Field(default=30.0, description="A request that takes longer, with its repetitions, has failed.")


class StorageSettings(Section):
    """The `storage` section: the block store that all gateways share."""

    kind: Literal["directory", "s3"] = Field(
        default="directory", description="directory: one file per Full Block under path; s3: one object per Full Block in s3.bucket."
    )
    s3: S3Settings = Field(default=S3Settings(), description="The bucket, for kind s3.")
    path: UserPath = Field(
        default="~/.cache/dualpath-ray/blocks",  # type: ignore[assignment]  # validated into a Path like a given value
        description="Directory of the blocks: local disk, NFS or 3FS mount; the same for all gateways.",
    )
    io: Literal["auto", "nixl", "plain", "hf3fs", "gds"] = Field(
        default="auto",
        description="How files are read and written: by NIXL's POSIX backend, by plain system calls, or auto, the best that works there; "
        "or by NIXL's backend for 3FS or GPUDirect Storage, whose plug-in must be installed.",
    )
    direct: Annotated[Literal["auto", "on", "off"], Word] = Field(
        default="auto", description="Whether to go around the page cache (O_DIRECT)."
    )
    sync: bool = Field(
        default=True,
        description="Whether a block counts as stored only when it survives a loss of power. false: when it survives the process, which is "
        "faster; blocks that a loss of power takes or damages are misses then.",
    )
    layer_groups: Count = Field(
        default=4,
        description="Layer ranges that a read is cut into at most, so that the first layers arrive early; small blocks are read whole.",
    )
    read_threads: Count = Field(default=8, description="Reads that one gateway has under way at once.")
    write_threads: Count = Field(default=2, description="Writes that one gateway has under way at once.")
    capacity_bytes: ByteSize | None = Field(
        default=None,
        ge=1 << 20,
        description="What the directory, or the bucket below s3.prefix, may hold, e.g. 2TiB; what has not been used "
        "for longest is removed in the background. Default: no bound.",
    )
    gc_interval_s: Seconds = Field(default=30.0, description="How often each gateway looks whether room must be made.")
    orphan_age_s: Seconds = Field(
        default=3600.0, description="Blocks whose parent is missing, and files of crashed writers, are removed when unused for this long."
    )
    hedge_factor: Delay = Field(
        default=4.0,
        description="A node's part of a request's reads that takes this many times as long as usual is given up and read by the other "
        "node. 0: never. Needs staging.resident_share, so that what has been read already is not read again.",
    )
    hedge_min_wait_s: Delay = Field(default=1.0, description="Reads are never given up before this time.")
    hedge_share: Share = Field(default=0.1, description="Bytes that may be read twice for this, as a share of all bytes read.")
    emulation: EmulationSettings = Field(default=EmulationSettings(), description="Emulate a slower device.")

    @model_validator(mode="after")
    def _bucket_is_named(self) -> Self:
        if self.kind == "s3" and not self.s3.bucket:
            raise ValueError("kind s3 needs s3.bucket")
        return self


class StagingSettings(Section):
    """The `staging` section: DRAM of each gateway, an array of Full-Block slots registered for transfers once."""

    slots: Count | None = Field(default=None, description="Full-Block slots per gateway; default: from bytes.")
    bytes: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Memory per gateway, e.g. 8GiB; default: 1GiB, but at least room for two requests of the longest context.",
    )
    huge_pages: Annotated[Literal["transparent", "reserved", "off"], Word] = Field(
        default="transparent",
        description="Pages of the arena: transparent asks the kernel for huge ones (madvise), reserved takes them from the pool that the "
        "operator has set aside (MAP_HUGETLB; falls back to transparent with a log line), off uses small ones.",
    )
    numa_node: Literal["auto"] | Annotated[int, Field(ge=0)] | None = Field(
        default="auto",
        description="NUMA node that the arena's memory comes from while it has any. auto: that of the storage NIC, if it is an RDMA "
        "device; null: the kernel's choice. Without effect on a machine with one node.",
    )
    resident_share: Share = Field(
        default=1.0,
        description="Share of the slots that may keep blocks in memory after a request has used them, for later requests; such a slot is "
        "given up when a request needs it. 0: nothing is kept.",
    )

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.slots is not None and self.bytes is not None:
            raise ValueError("slots and bytes are two ways to say the same: give one of them")
        return self

    def slot_count(self, slot_bytes: int, blocks_per_context: int) -> int:
        """Slots of `slot_bytes` (a Full Block in whole pages) of one gateway, so that they take `bytes` at most.

        Raises ConfigError when a request of the longest context (`blocks_per_context`) cannot fit.
        """
        if self.slots is None and self.bytes is None:
            return max(DEFAULT_STAGING_BYTES // slot_bytes, 2 * blocks_per_context)
        slots = self.slots if self.slots is not None else (self.bytes or 0) // slot_bytes
        if slots < blocks_per_context:
            raise ConfigError(
                f"staging holds {slots} blocks of {slot_bytes} bytes, but a request of the longest context needs "
                f"{blocks_per_context}: raise staging.slots or staging.bytes, or lower model.max_context"
            )
        return slots
