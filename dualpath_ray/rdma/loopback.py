"""Copies within one machine as RDMA through its own network card (paper section 5): the card moves the bytes over PCIe, in its order of
traffic classes, instead of a copy engine that knows none.

Many small copies are posted as one chain of work requests: the card is told once (one "doorbell") for all of them, and reports the end of
the last one only, since a reliable connection completes in order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dualpath_ray.errors import ConfigError, TransferError
from dualpath_ray.rdma import verbs
from dualpath_ray.rdma.device import Port
from dualpath_ray.traffic.classes import Marking

MAX_CHAIN = 1024
ACCESS = ("IBV_ACCESS_LOCAL_WRITE", "IBV_ACCESS_REMOTE_READ", "IBV_ACCESS_REMOTE_WRITE")


@dataclass(frozen=True, slots=True)
class Copy:
    """`nbytes` from address `source` to address `target`, both in the registered memory."""

    source: int
    target: int
    nbytes: int


class LoopbackCopier:
    """A connection of a port with itself (or with `to`, another port of this machine). Used by one thread.

    `memory` is one range (address, bytes), registered for as long as the copier lives. Raises ConfigError without pyverbs or an address,
    TransferError when the card refuses.
    """

    def __init__(self, port: Port, memory: tuple[int, int], marking: Marking, to: Port | None = None) -> None:
        self._verbs = verbs.load()
        try:
            self._near = _End(self._verbs, port, memory)
            self._far = self._near if to is None else _End(self._verbs, to, memory)
            self._source = self._near.queue_pair()
            self._sink = self._far.queue_pair()
            self._near.join(self._source, self._sink, self._far, marking)
            self._far.join(self._sink, self._source, self._near, marking)
        except self._verbs.PyverbsError as error:
            raise TransferError(f"no loop-back connection over {port.ucx_name}: {error}") from error

    def prepare(self, copies: Sequence[Copy], read: bool = False) -> list[Any]:
        """A chain of work requests for up to MAX_CHAIN copies; it can be posted many times. `read`: pull instead of push."""
        if not 0 < len(copies) <= MAX_CHAIN:
            raise ValueError(f"a chain holds 1 to {MAX_CHAIN} copies")
        opcode = self._verbs.flags("IBV_WR_RDMA_READ" if read else "IBV_WR_RDMA_WRITE")
        requests: list[Any] = []  # last first; pyverbs links them by bare pointers, so all must live until they are posted
        for copy in reversed(copies):
            local, remote = (copy.target, copy.source) if read else (copy.source, copy.target)
            piece = self._verbs.SGE(local, copy.nbytes, self._near.region.lkey)
            following = requests[-1] if requests else None
            signaled = 0 if requests else self._verbs.flags("IBV_SEND_SIGNALED")
            request = self._verbs.SendWR(opcode=opcode, num_sge=1, sg=[piece], send_flags=signaled, next_wr=following)
            request.set_wr_rdma(self._far.region.rkey, remote)
            requests.append(request)
        return requests

    def post(self, chain: list[Any]) -> None:
        """Hand a chain to the card. Wait for it before the next one."""
        try:
            self._source.post_send(chain[-1])
        except self._verbs.PyverbsError as error:
            raise TransferError(f"the card refused to copy: {error}") from error

    def wait(self, timeout_s: float = 30.0, pause_s: float = 0.0) -> None:
        """Until all copies of the posted chain have landed, with pauses between looks. Raises TransferError."""
        deadline = time.monotonic() + timeout_s
        while True:
            count, completions = self._near.completions.poll(1)
            if count:
                break
            if time.monotonic() > deadline:
                raise TransferError(f"copies through {self._near.port.ucx_name} did not end within {timeout_s:.0f} s")
            if pause_s:
                time.sleep(pause_s)
        if completions[0].status:
            raise TransferError(f"copies through {self._near.port.ucx_name} failed with status {completions[0].status}")

    def copy(self, copies: Sequence[Copy], read: bool = False) -> None:
        """Prepare, post and wait."""
        for start in range(0, len(copies), MAX_CHAIN):
            self.post(self.prepare(copies[start : start + MAX_CHAIN], read))
            self.wait()

    def marking_in_force(self) -> tuple[int, int]:
        """Service level and traffic class that the connection really has."""
        attributes, _ = self._source.query(self._verbs.flags("IBV_QP_AV"))
        words = dict(
            line.split(":", 1) for line in str(attributes.ah_attr).replace("traffic_class", "\ntraffic_class").splitlines() if ":" in line
        )
        values = {name.strip(): value.strip() for name, value in words.items()}
        return int(values.get("sl", "0")), int(values.get("traffic_class", "0"))

    def close(self) -> None:
        for part in (self._source, self._sink, self._near, self._far):
            part.close()


class _End:
    """One port's context, protection domain, completion queue and registered memory."""

    def __init__(self, names: verbs.Verbs, port: Port, memory: tuple[int, int]) -> None:
        self._verbs, self.port = names, port
        self._context = names.Context(name=port.device)
        self._domain = names.PD(self._context)
        self.completions = names.CQ(self._context, MAX_CHAIN)
        address, nbytes = memory
        self.region = names.MR(self._domain, nbytes, names.flags(*ACCESS), address=address)
        gid = port.gid
        if gid is None:
            raise ConfigError(f"{port.ucx_name} has no address: give its interface an IP address (RoCE), or start the subnet manager")
        self.gid_index = gid.index
        self.gid = gid.value
        self._attributes = self._context.query_port(port.number)

    def queue_pair(self) -> Any:
        names = self._verbs
        # It goes to INIT in its constructor; access rights that come later are ignored.
        attributes = names.QPAttr(port_num=self.port.number)
        attributes.qp_access_flags = names.flags(*ACCESS)
        room = names.QPCap(max_send_wr=MAX_CHAIN, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        kind = names.flags("IBV_QPT_RC")
        # pyverbs has every request report its end unless told otherwise.
        options = names.QPInitAttr(qp_type=kind, scq=self.completions, rcq=self.completions, cap=room, sq_sig_all=0)
        return names.QP(self._domain, options, attributes)

    def join(self, own: Any, other: Any, far: _End, marking: Marking) -> None:
        """Connect a queue pair of ours with one of `far`'s."""
        names = self._verbs
        attributes = names.QPAttr(port_num=self.port.number)
        attributes.qp_access_flags = names.flags(*ACCESS)
        attributes.path_mtu = min(self._attributes.active_mtu, far._attributes.active_mtu)
        attributes.dest_qp_num = other.qp_num
        attributes.rq_psn = attributes.sq_psn = 0
        attributes.max_dest_rd_atomic = attributes.max_rd_atomic = 16
        attributes.min_rnr_timer, attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = 12, 14, 7, 7
        if self.port.link_layer == "Ethernet":
            route = names.GlobalRoute(dgid=names.GID(far.gid), sgid_index=self.gid_index)
            route.traffic_class, route.hop_limit = marking.traffic_class, 64
            attributes.ah_attr = names.AHAttr(gr=route, is_global=1, port_num=self.port.number, sl=marking.sl)
        else:
            attributes.ah_attr = names.AHAttr(is_global=0, port_num=self.port.number, sl=marking.sl, dlid=far.port.lid)
        own.to_rts(attributes)

    def close(self) -> None:
        for part in (self.region, self.completions, self._domain, self._context):
            part.close()
