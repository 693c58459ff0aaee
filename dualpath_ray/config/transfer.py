"""How bytes move between processes (NIXL over UCX)."""

from __future__ import annotations

from typing import Literal

from pydantic import ByteSize, Field

from dualpath_ray.config.section import Count, Delay, Seconds, Section


class TransferSettings(Section):
    """The `transfer` section."""

    backend: Literal["UCX"] = Field(default="UCX", description="NIXL backend for transfers between processes.")
    fabric: Literal["auto", "rdma", "tcp"] = Field(
        default="auto",
        description="auto: RDMA on machines with an active port, unless all nodes are on this one, else TCP; "
        "rdma: RDMA, or the process refuses to start; tcp: never RDMA.",
    )
    local_copies: Literal["memory", "cnic"] = Field(
        default="memory",
        description="How KV moves between processes of one machine when the fabric is RDMA. memory: shared memory and copy engines; "
        "cnic: looped through the compute NIC, in KV's traffic class, so that it cannot get in the way of collectives on the PCIe bus.",
    )
    tls: str | None = Field(
        default=None,
        description="UCX transports (UCX_TLS), e.g. sysv,cma,tcp,self on one machine, tcp between hosts, rc,cuda,self with RDMA; "
        "default: as fabric says.",
    )
    net_devices: str | None = Field(
        default=None,
        description="Network devices UCX may use (UCX_NET_DEVICES), e.g. eth1 or mlx5_0:1; default: with RDMA the compute NIC "
        "nearest to the GPU, else all.",
    )
    error_handling: Literal["peer", "none"] = Field(
        default="peer", description="peer: the death of a peer is reported; none: it is not, but any shared-memory transport may be used."
    )
    ucx: dict[str, str] = Field(
        default={}, description="Further UCX settings by name without the UCX_ prefix, e.g. {TCP_TX_SEG_SIZE: 256K}."
    )
    progress_thread_delay_us: Count = Field(
        default=1000, description="How long NIXL's progress thread sleeps when nothing arrives (microseconds). Small values burn a core."
    )
    copy_threads: int | None = Field(
        default=None,
        ge=0,
        description="Threads of a process that copy large pushes to others on its machine, while its own goes on; default: 1 if all "
        "nodes are on one machine, else 0 (network cards need none).",
    )
    busy_poll_s: Delay = Field(
        default=0.0001,
        description="Shortest pause between looks for what has arrived or landed. Each look takes Python's interpreter from the thread "
        "that computes: shorter pauses make prefill slower and transfers no faster.",
    )
    idle_poll_s: Seconds = Field(default=0.002, description="Longest such pause: it grows with the time in which nothing has happened.")
    push_timeout_s: Seconds = Field(default=30.0, description="A push that takes longer has failed; the request is planned again.")
    verify: bool = Field(
        default=False,
        description="Compare pushed bytes where they have landed with those that were sent, and push them again when they differ. Costs "
        "a hash on either side and a round trip per push. Memory of GPUs is not checked.",
    )
    late_write_s: Delay = Field(
        default=1.0,
        description="Bytes that a process had handed to the network may arrive for this long after its death: memory it could write to is "
        "reused only then. On TCP between hosts longer than UCX_TCP_USER_TIMEOUT, which bounds how long the kernel goes on sending.",
    )
    max_post_bytes: ByteSize = Field(
        default=ByteSize(8 << 20),
        gt=0,
        description="Longer pushes are posted in pieces of this size, so that urgent ones need not wait behind them.",
    )

    def environment(self) -> dict[str, str]:
        """Environment variables that UCX must see in every process before NIXL is loaded."""
        variables = {f"UCX_{name}": value for name, value in self.ucx.items()}
        if self.tls is not None:
            variables["UCX_TLS"] = self.tls
        if self.net_devices is not None:
            variables["UCX_NET_DEVICES"] = self.net_devices
        if self.error_handling == "peer":
            # These transports do not offer error handling by default, and UCX would not use them for anything that needs it.
            variables |= {"UCX_SYSV_ERROR_HANDLING": "y", "UCX_POSIX_ERROR_HANDLING": "y"}
        return variables
