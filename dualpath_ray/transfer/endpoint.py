"""A process's end of the data plane: its NIXL agent, its registered regions, and the one thread that uses them.

Bytes move by *push*: the process that owns them writes them into memory that its peer has granted. Three reasons (all
measured, see docs/design.md): over TCP a one-sided read makes the owner's process die when its memory is gone or its reader is
killed, a write does not; a write is two to three times faster there; and on RDMA the data of a write travels in the
initiator's traffic class, so who decides on the class also sends the bytes.

NIXL itself has no time-outs, no protection of reused memory and no locking; all three are kept here: pushes have deadlines,
pushes under a lease are refused once that lease is closed, and only this module's thread touches the agent.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from dualpath_ray.busy_clock import BusyClock
from dualpath_ray.errors import ConfigError, DualPathError, StaleEpochError, TransferError
from dualpath_ray.rdma.readiness import MemoryLimit, rdma_problems
from dualpath_ray.rdma.sysfs import read_machine
from dualpath_ray.traffic.classes import TrafficClass
from dualpath_ray.transfer import messages
from dualpath_ray.transfer.endpoint_settings import EndpointSettings, EndpointStats
from dualpath_ray.transfer.lanes import Lanes
from dualpath_ray.transfer.memory import PeerInfo, Region
from dualpath_ray.transfer.messages import Message, Quiesce, Verified, Verify, WriterDone
from dualpath_ray.transfer.push import Push
from dualpath_ray.transfer.push_queue import PushQueue
from dualpath_ray.transfer.verification import Verification

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

CLOSED_LEASES_KEPT = 65_536
LOOKS_PER_SILENCE = 128


@dataclass(slots=True)
class _ClosedLease:
    error: str | None
    acknowledged: bool = False


class Endpoint:
    """See the module's docstring. Public methods may be called from any thread; handlers and `on_done` run on the endpoint's."""

    def __init__(self, engine_id: str, regions: tuple[Region, ...], settings: EndpointSettings | None = None) -> None:
        self.settings = settings or EndpointSettings()
        self.agent_name = f"{engine_id}-{uuid.uuid4().hex[:12]}"
        self.stats = EndpointStats()
        self._regions = {region.name: region for region in regions}
        self._handlers: dict[type, Callable[[str, Any], None]] = {Quiesce: self._on_quiesce, Verify: self._on_verify}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._lease_pushes: Counter[tuple[str, int]] = Counter()  # pushes under way
        self._closed_leases: OrderedDict[tuple[str, int], _ClosedLease] = OrderedDict()
        self._stopping = self._ended = False
        self._last_event = 0.0
        self._outstanding = BusyClock()  # pushes that wait or are under way
        self._started: threading.Event = threading.Event()
        self._failure: BaseException | None = None
        self._lanes: Lanes
        self._lease_classes: dict[tuple[str, int], TrafficClass] = {}  # what we pushed in, under leases that we have not closed
        self._pushes: PushQueue
        self._verification: Verification
        self.info: PeerInfo
        self._thread = threading.Thread(target=self._main, args=(engine_id,), name=f"endpoint-{engine_id}", daemon=True)
        self._thread.start()
        self._started.wait()
        if isinstance(self._failure, ConfigError):
            raise self._failure
        if self._failure is not None:
            raise TransferError(f"NIXL agent of {engine_id} could not start: {self._failure}") from self._failure

    # ---- any thread

    def on(self, kind: type[M], handler: Callable[[str, M], None]) -> None:
        """Call `handler(sender, message)` for messages of this kind. Set handlers before telling anyone about this endpoint."""
        self._handlers[kind] = handler

    def connect(self, peer: PeerInfo) -> None:
        """Make `peer` known. Cheap when it is already. A peer that has been forgotten stays so."""
        if not self._lanes.knows(peer.agent):
            self.call(lambda: self._lanes.connect(peer))

    def forget(self, agent: str) -> None:
        """A peer is known to be dead: drop what belongs to it. Its name is never used again, so this is for ever."""
        self._lanes.bury(agent)
        self.call(lambda: self._disconnect(agent))

    def is_dead(self, agent: str) -> bool:
        """Whether `agent` has been forgotten: work that names it came too late."""
        return self._lanes.first.is_dead(agent)

    def push(self, push: Push) -> None:
        self.call(lambda: self._enqueue(push))

    def send(self, agent: str, message: Message) -> None:
        """Send without acknowledgement. A failure is logged: who waits for an answer asks again (`LayerSink.refresh`)."""
        self.call(lambda: self._send(agent, message))

    def finish_writes(self, agent: str, lease: int, error: str | None = None) -> None:
        """We shall not push to this lease again: tell its owner so, as soon as nothing is under way.

        `error` tells the owner that what we were to write there is not complete; so does a push that fails after this call.
        """
        self.call(lambda: self._close_lease(agent, lease, error))

    def busy_seconds(self) -> float:
        """Seconds since start in which something was to be pushed: over time, the utilisation of this process's end of the network."""
        return self._outstanding.seconds()

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the endpoint's thread soon."""
        self._commands.append(function)
        self._wake.set()
        if self._ended:
            self._run_commands()  # nobody else would: pushes must fail, not be forgotten

    def poke(self) -> None:
        """Somebody waits for a message: look more often for a while."""
        self._last_event = time.monotonic()
        self._wake.set()

    def close(self) -> None:
        """Stop the thread; pushes not yet posted fail. Idempotent."""
        self._stopping = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)

    # ---- the endpoint's thread

    def _main(self, engine_id: str) -> None:
        try:
            self._check_rdma()
            self._lanes = Lanes(self.agent_name, self._regions.values(), self.settings)
            self._agent = self._lanes.first.agent
            self._verification = Verification(self._regions, self.stats, self._send, lambda push: self._pushes.add(push), self._push_ended)
            self._handlers[Verified] = self._verification.answered
            self._pushes = PushQueue(self._lanes, self._regions, self.settings, self.stats, self._verification.landed)
            self.info = PeerInfo(engine_id, self.agent_name, self._agent.get_agent_metadata(), tuple(self._regions.values()))
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._started.set()
        while not self._stopping:
            self._wake.clear()
            arrived = self._agent.get_new_notifs()  # before the commands: what was asked of us before a message was sent is done before it
            self._verification.expire()
            if self._run_commands() + self._receive(arrived) + self._pushes.post() + self._pushes.check():
                self._last_event = time.monotonic()
            else:
                self._wake.wait(self._pause())
        self._shut_down()

    def _check_rdma(self) -> None:
        """UCX would not say why it cannot use RDMA."""
        ports = self.settings.rdma_ports
        if ports is None:
            return
        nbytes = sum(region.nbytes for region in self._regions.values() if region.kind == "DRAM")
        problems = rdma_problems(read_machine(), ports, nbytes, MemoryLimit.of_this_process())
        if problems:
            raise ConfigError("RDMA cannot be used: " + "; ".join(str(problem) for problem in problems))

    def _pause(self) -> float:
        """The longer nothing has happened, the longer until the next look: so looking late adds little to what took long anyway."""
        silence = time.monotonic() - self._last_event
        return min(max(self.settings.busy_poll_s, silence / LOOKS_PER_SILENCE), self.settings.idle_poll_s)

    def _run_commands(self) -> int:
        count = 0
        while self._commands:
            self._guard(self._commands.popleft())
            count += 1
        return count

    def _guard(self, function: Callable[..., None], *arguments: Any) -> None:
        """A handler's bug must not end the thread that everyone depends on."""
        try:
            function(*arguments)
        except Exception:
            log.exception("endpoint %s: a handler failed", self.agent_name)

    def _receive(self, arrived: dict[str, list[bytes]]) -> int:
        count = 0
        for sender, payloads in arrived.items():
            for payload in payloads:
                count += 1
                try:
                    self._handle(sender, messages.decode(payload))
                except (msgspec.MsgspecError, RecursionError):
                    self.stats.bad_messages += 1
        return count

    def _handle(self, sender: str, message: Message) -> None:
        handler = self._handlers.get(type(message))
        if handler is None:
            self.stats.bad_messages += 1
            return
        self.stats.messages_received += 1
        self._guard(handler, sender, message)

    def _on_verify(self, sender: str, question: Verify) -> None:
        try:
            message = self._verification.compare(sender, question)
        except (KeyError, IndexError, ValueError, msgspec.MsgspecError):
            self.stats.bad_messages += 1
            return
        if message is not None:
            self._handle(sender, message)

    def _disconnect(self, agent: str) -> None:
        self._lanes.disconnect(agent)
        self._verification.peer_died(agent)
        for key in [key for key in self._lease_classes if key[0] == agent]:
            del self._lease_classes[key]

    def _send(self, agent: str, message: Message, traffic: TrafficClass = TrafficClass.KV_READ) -> None:
        """Messages that follow data must leave by the agent that pushed it: what two agents send may arrive in any order."""
        try:
            self._lanes.notify(agent, messages.encode(message), traffic)
            self.stats.messages_sent += 1
        except Exception as error:
            level = logging.DEBUG if self._stopping else logging.WARNING
            log.log(level, "endpoint %s: cannot send %s to %s: %s", self.agent_name, type(message).__name__, agent, error)

    def _enqueue(self, push: Push) -> None:
        refusal = self._refusal(push)
        if refusal is not None:
            self.stats.refused_pushes += 1
            self._guard(push.on_done, refusal)
            return
        if push.lease is not None:
            self._lease_pushes[push.peer, push.lease] += 1
            self._lease_classes[push.peer, push.lease] = push.traffic
        self._outstanding.add(1)
        self._pushes.add(push)

    def _refusal(self, push: Push) -> DualPathError | None:
        if self._stopping:
            return TransferError("the endpoint is closing")
        if push.local not in self._regions:
            return TransferError(f"there is no region {push.local!r} to push from")
        if push.lease is not None and (push.peer, push.lease) in self._closed_leases:
            return StaleEpochError(f"lease {push.lease} of {push.peer} is closed")
        return None

    def _push_ended(self, push: Push) -> None:
        self._outstanding.take(1)
        if push.error is None:
            self.stats.pushes[push.kind] += 1
            carried = push.attached or push.digest is not None  # by NIXL, or by the question about its bytes
            if push.message is not None and not carried:
                self._send(push.peer, push.message, push.traffic)
            self.stats.messages_sent += carried and push.message is not None
        else:
            self.stats.failed_pushes += 1
        self._guard(push.on_done, push.error)
        if push.lease is not None:
            key = (push.peer, push.lease)
            self._lease_pushes[key] -= 1
            if not self._lease_pushes[key]:
                del self._lease_pushes[key]
            closed = self._closed_leases.get(key)
            if closed is not None and push.error is not None:
                closed.error = closed.error or str(push.error)  # whoever called `finish_writes` before could not know
            self._acknowledge_lease(key)

    # ---- leases of others that we write under

    def _on_quiesce(self, sender: str, message: Quiesce) -> None:
        self._lanes.first.meet(sender, message.metadata)
        closed = self._closed_leases.get((sender, message.lease))
        if closed is not None:
            closed.acknowledged = False  # the acknowledgement may have been lost: say it again
        self._close_lease(sender, message.lease, "withdrawn by its owner")

    def _close_lease(self, agent: str, lease: int, error: str | None) -> None:
        key = (agent, lease)
        if key not in self._closed_leases:
            self._closed_leases[key] = _ClosedLease(error)
            if len(self._closed_leases) > CLOSED_LEASES_KEPT:
                self._closed_leases.popitem(last=False)
        self._acknowledge_lease(key)

    def _acknowledge_lease(self, key: tuple[str, int]) -> None:
        closed = self._closed_leases.get(key)
        if closed is not None and not closed.acknowledged and key not in self._lease_pushes:
            closed.acknowledged = True
            self._send(key[0], WriterDone(key[1], closed.error), self._lease_classes.pop(key, TrafficClass.KV_READ))

    def _shut_down(self) -> None:
        self._run_commands()
        self._pushes.abandon(TransferError("the endpoint is closing"))
        self._verification.close()
        self._lanes.close()
        del self._agent
        self._ended = True
        self._run_commands()
