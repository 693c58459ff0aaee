"""Traffic classes, and what marks each of them on InfiniBand, RoCE and TCP (paper section 5).

The model's own communication (collectives) comes first; KV takes what it leaves. The bytes of a push travel in the class of the process
that sends them, so a process that sends in two classes needs a NIXL agent for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

ECT0 = 0b10  # ECN-capable transport: without it RoCE switches cannot signal congestion. UCX's own default, 106, has it too.


class TrafficClass(StrEnum):
    """One per flow."""

    MODEL = "model"  # collectives of the engines: not ours to send, but everything here is arranged around it
    CONTROL = "control"  # calls between actors, HTTP
    KV_READ = "kv_read"  # foreground: KV that a request waits for, with the messages that pace it
    KV_WRITE = "kv_write"  # background: completed blocks on their way to storage


KV_CLASSES = (TrafficClass.KV_READ, TrafficClass.KV_WRITE)


@dataclass(frozen=True, slots=True)
class Marking:
    """How the packets of a class are marked: InfiniBand service level (0..15), DSCP (0..63) in RoCE and TCP packets."""

    sl: int
    dscp: int

    @property
    def traffic_class(self) -> int:
        """The IP header's byte: DSCP and the ECN bits. It is the traffic class of a RoCE address vector and the TOS of a TCP socket."""
        return self.dscp << 2 | ECT0

    @property
    def priority(self) -> int:
        """802.1p priority 0..7: the upper three bits of the DSCP, as network cards map it by default."""
        return self.dscp >> 3

    def ucx(self) -> dict[str, str]:
        """UCX settings (names without UCX_) of an agent that sends in this class. InfiniBand ignores the traffic class within a subnet."""
        return {"IB_SL": str(self.sl), "IB_TRAFFIC_CLASS": str(self.traffic_class)}

    def collectives(self) -> dict[str, str]:
        """The same for NCCL's and NVSHMEM's InfiniBand and RoCE transports, as environment variables."""
        return {
            "NCCL_IB_SL": str(self.sl),
            "NCCL_IB_TC": str(self.traffic_class),
            "NVSHMEM_IB_SL": str(self.sl),
            "NVSHMEM_IB_TRAFFIC_CLASS": str(self.traffic_class),
        }
