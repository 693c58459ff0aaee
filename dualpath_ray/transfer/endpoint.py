"""A process's end of the data plane: its NIXL agent, its registered regions, and the one thread that uses them.

Bytes move by *push*: the process that owns them writes them into memory that its peer has granted. Three reasons (all
measured, see docs/design.md): over TCP a one-sided read makes the owner's process die when its memory is gone or its reader is
killed, a write does not; a write is two to three times faster there; and on RDMA the data of a write travels in the
initiator's traffic class, so who decides on the class also sends the bytes.

NIXL itself has no time-outs, no protection of reused memory and no locking; all three are kept here: pushes have deadlines,
pushes under a lease are refused once that lease is closed, and only this module's thread touches the agent.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from dualpath_ray.errors import DualPathError, StaleEpochError, TransferError
from dualpath_ray.transfer import messages, nixl_api
from dualpath_ray.transfer.memory import PeerInfo, Region
from dualpath_ray.transfer.messages import Message, Quiesce, WriterDone

log = logging.getLogger(__name__)

Blocks = npt.NDArray[np.int32]
Done = Callable[[DualPathError | None], None]
M = TypeVar("M", bound=Message)

PRIORITY_LAYERS, PRIORITY_POOL, PRIORITY_PERSIST = 0, 1, 2
CLOSED_LEASES_KEPT = 65_536
DEAD_AGENTS_KEPT = 4096


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """`tls`, `net_devices` and `error_handling` reach UCX through the environment of the process (see Settings.transfer)."""

    progress_thread_delay_us: int = 1000
    busy_poll_s: float = 0.00001  # pause between looks while pushes are under way or messages are expected
    idle_poll_s: float = 0.002  # pause between looks when nothing has happened for `linger_s`
    linger_s: float = 0.02
    push_timeout_s: float = 30.0
    max_post_bytes: int = 8 << 20  # longer pushes go out in pieces, so that urgent ones need not wait behind them


@dataclass(slots=True, eq=False)
class Push:
    """Copy Layer Blocks `local_blocks` of our region `local` to blocks `remote_blocks` of `peer`'s region `remote`.

    `on_done(error)` is called once, on the endpoint's thread, when no byte of it is under way any more; `message` is sent to the peer
    behind the data if all went well. A push that outlasts `push_timeout_s` has failed, but is not done before NIXL says so or the peer is
    known to be dead; whoever waits for it has a deadline of its own.
    A push under a `lease` fails with StaleEpochError once that lease of the peer's is closed.
    """

    peer: str
    local: str
    local_blocks: Blocks
    remote: str
    remote_blocks: Blocks
    on_done: Done
    message: Message | None = None
    lease: int | None = None
    priority: int = PRIORITY_LAYERS
    before: Callable[[], None] | None = None  # e.g. wait for a CUDA event; called right before the first byte is posted
    pieces_left: int = field(default=0, init=False)
    attached: bool = field(default=False, init=False)  # NIXL sends `message` itself, behind the one piece
    error: DualPathError | None = field(default=None, init=False)
    deadline: float = field(default=0.0, init=False)


@dataclass(slots=True, eq=False)
class _Posted:
    push: Push
    handle: Any
    nbytes: int


@dataclass(slots=True)
class _ClosedLease:
    error: str | None
    acknowledged: bool = False


@dataclass(slots=True)
class EndpointStats:
    """Counters since start. `push_seconds` is the time the thread spent inside NIXL's posting and checking calls, `busy_seconds` the time
    in which at least one push waited or was under way (up to the end of the last such stretch; see `Endpoint.busy_seconds`)."""

    pushed_bytes: Counter[str] = field(default_factory=Counter)  # by "local->remote" region
    pushes: Counter[str] = field(default_factory=Counter)
    push_seconds: float = 0.0
    busy_seconds: float = 0.0
    failed_pushes: int = 0
    refused_pushes: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    bad_messages: int = 0


class Endpoint:
    """See the module's docstring. Public methods may be called from any thread; handlers and `on_done` run on the endpoint's."""

    def __init__(self, engine_id: str, regions: tuple[Region, ...], settings: EndpointSettings | None = None) -> None:
        self.settings = settings or EndpointSettings()
        self.agent_name = f"{engine_id}-{uuid.uuid4().hex[:12]}"
        self.stats = EndpointStats()
        self._regions = {region.name: region for region in regions}
        self._handlers: dict[type, Callable[[str, Any], None]] = {Quiesce: self._on_quiesce}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._waiting: list[tuple[int, int, Push, Blocks, Blocks]] = []  # heap of pieces by (priority, arrival)
        self._arrival = itertools.count()
        self._posted: list[_Posted] = []
        self._peers: dict[str, PeerInfo] = {}
        self._met: set[str] = set()  # agents that NIXL knows only so that we could answer them
        self._dead: OrderedDict[str, None] = OrderedDict()
        self._local_lists: dict[str, Any] = {}
        self._remote_lists: dict[tuple[str, str], Any] = {}
        self._lease_pushes: Counter[tuple[str, int]] = Counter()  # pushes under way
        self._closed_leases: OrderedDict[tuple[str, int], _ClosedLease] = OrderedDict()
        self._stopping = self._ended = False
        self._last_event = 0.0
        self._outstanding = 0  # pushes that wait or are under way
        self._busy_since = 0.0
        self._started: threading.Event = threading.Event()
        self._failure: BaseException | None = None
        self.info: PeerInfo
        self._thread = threading.Thread(target=self._main, args=(engine_id,), name=f"endpoint-{engine_id}", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise TransferError(f"NIXL agent of {engine_id} could not start: {self._failure}") from self._failure

    # ---- any thread

    def on(self, kind: type[M], handler: Callable[[str, M], None]) -> None:
        """Call `handler(sender, message)` for messages of this kind. Set handlers before telling anyone about this endpoint."""
        self._handlers[kind] = handler

    def connect(self, peer: PeerInfo) -> None:
        """Make `peer` known. Cheap when it is already. A peer that has been forgotten stays so."""
        if peer.agent not in self._peers and peer.agent not in self._dead:
            self.call(lambda: self._connect(peer))

    def forget(self, agent: str) -> None:
        """A peer is known to be dead: drop what belongs to it. Its name is never used again, so this is for ever."""
        self._dead[agent] = None
        if len(self._dead) > DEAD_AGENTS_KEPT:
            self._dead.popitem(last=False)
        self.call(lambda: self._disconnect(agent))

    def is_dead(self, agent: str) -> bool:
        """Whether `agent` has been forgotten: work that names it came too late."""
        return agent in self._dead

    def push(self, push: Push) -> None:
        self.call(lambda: self._enqueue(push))

    def send(self, agent: str, message: Message) -> None:
        """Send without acknowledgement; a failure is logged (the waits that depend on it have deadlines)."""
        self.call(lambda: self._send(agent, message))

    def finish_writes(self, agent: str, lease: int, error: str | None = None) -> None:
        """We shall not push to this lease again: tell its owner so, as soon as nothing is under way.

        `error` tells the owner that what we were to write there is not complete.
        """
        self.call(lambda: self._close_lease(agent, lease, error))

    def busy_seconds(self) -> float:
        """Seconds since start in which something was to be pushed: over time, the utilisation of this process's end of the network."""
        since = self._busy_since
        return self.stats.busy_seconds + (time.monotonic() - since if since else 0.0)

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
            self._agent = nixl_api.make_agent(
                self.agent_name, progress_thread_delay_us=self.settings.progress_thread_delay_us, backends=("UCX",)
            )
            for region in self._regions.values():
                self._agent.register_memory([(region.base, region.nbytes, region.device, "")], region.kind)
                self._local_lists[region.name] = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", region.descriptors(), region.kind)
            self.info = PeerInfo(engine_id, self.agent_name, self._agent.get_agent_metadata(), tuple(self._regions.values()))
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._started.set()
        while not self._stopping:
            self._wake.clear()
            arrived = self._agent.get_new_notifs()  # before the commands: what was asked of us before a message was sent is done before it
            if self._run_commands() + self._receive(arrived) + self._post() + self._check():
                self._last_event = time.monotonic()
            else:
                self._wake.wait(self._pause())
        self._shut_down()

    def _pause(self) -> float:
        recent = time.monotonic() - self._last_event < self.settings.linger_s
        return self.settings.busy_poll_s if self._posted or recent else self.settings.idle_poll_s

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
                    message = messages.decode(payload)
                except (msgspec.MsgspecError, RecursionError):
                    self.stats.bad_messages += 1
                    continue
                handler = self._handlers.get(type(message))
                if handler is None:
                    self.stats.bad_messages += 1
                    continue
                self.stats.messages_received += 1
                self._guard(handler, sender, message)
        return count

    def _connect(self, peer: PeerInfo) -> None:
        if peer.agent in self._peers or peer.agent in self._dead:
            return
        try:
            self._agent.add_remote_agent(peer.metadata)
            for region in peer.regions:
                self._remote_lists[peer.agent, region.name] = self._agent.prep_xfer_dlist(peer.agent, region.descriptors(), region.kind)
        except Exception as error:  # NIXL's own exception types differ from wheel to wheel
            log.warning("endpoint %s: cannot connect to %s: %s", self.agent_name, peer.agent, error)
            return
        self._peers[peer.agent] = peer

    def _disconnect(self, agent: str) -> None:
        if self._peers.pop(agent, None) is None and agent not in self._met:
            return
        self._met.discard(agent)
        for name in [key for key in self._remote_lists if key[0] == agent]:
            self._release(self._remote_lists.pop(name))
        try:
            self._agent.remove_remote_agent(agent)
        except Exception as error:
            log.debug("endpoint %s: removing %s: %s", self.agent_name, agent, error)

    def _send(self, agent: str, message: Message) -> None:
        try:
            self._agent.send_notif(agent, messages.encode(message))
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
        now = time.monotonic()
        push.deadline = now + self.settings.push_timeout_s
        if not self._outstanding:
            self._busy_since = now
        self._outstanding += 1
        per_piece = max(1, self.settings.max_post_bytes // self._regions[push.local].block_bytes)
        starts = range(0, len(push.local_blocks), per_piece)
        push.pieces_left = len(starts)
        push.attached = len(starts) == 1
        if not push.pieces_left:
            self._finish(push)
        for start in starts:
            piece = slice(start, start + per_piece)
            entry = (push.priority, next(self._arrival), push, push.local_blocks[piece], push.remote_blocks[piece])
            heapq.heappush(self._waiting, entry)

    def _refusal(self, push: Push) -> DualPathError | None:
        if self._stopping:
            return TransferError("the endpoint is closing")
        if push.local not in self._regions:
            return TransferError(f"there is no region {push.local!r} to push from")
        if push.lease is not None and (push.peer, push.lease) in self._closed_leases:
            return StaleEpochError(f"lease {push.lease} of {push.peer} is closed")
        return None

    def _post(self) -> int:
        """Post the most urgent piece, if any; one at a time, since a same-host push copies its bytes inside the call."""
        if not self._waiting:
            return 0
        _, _, push, local_blocks, remote_blocks = heapq.heappop(self._waiting)
        if push.error is None and time.monotonic() > push.deadline:
            push.error = self._overdue(push)
        if push.error is not None:
            self._piece_ended(push, push.error)
            return 1
        start = time.perf_counter()
        handle = None
        try:
            if push.before is not None:
                push.before()
                push.before = None
                start = time.perf_counter()
            remote = self._remote_lists.get((push.peer, push.remote))
            if remote is None:
                raise TransferError(f"{push.peer} is not connected")
            notice = messages.encode(push.message) if push.attached and push.message is not None else b""
            handle = self._agent.make_prepped_xfer("WRITE", self._local_lists[push.local], local_blocks, remote, remote_blocks, notice)
            state = self._agent.transfer(handle)
        except Exception as error:
            if handle is not None:
                self._release(handle)
            self._piece_ended(push, self._peer_failed(push.peer, error))
            return 1
        finally:
            self.stats.push_seconds += time.perf_counter() - start
        posted = _Posted(push, handle, len(local_blocks) * self._regions[push.local].block_bytes)
        if state == "DONE":
            self._piece_landed(posted)
        else:
            self._posted.append(posted)
        return 1

    def _check(self) -> int:
        """Look after posted pieces; returns how many ended."""
        ended = 0
        now = time.monotonic() if self._posted else 0.0
        for posted in list(self._posted):
            if posted.push.peer in self._dead:
                self._posted.remove(posted)
                self._release(posted.handle)
                self._piece_ended(posted.push, TransferError(f"{posted.push.peer} died"))
                ended += 1
                continue
            try:
                state = self._agent.check_xfer_state(posted.handle)
            except Exception as error:
                self._posted.remove(posted)
                self._release(posted.handle)
                self._piece_ended(posted.push, self._peer_failed(posted.push.peer, error))
                ended += 1
                continue
            if state == "DONE":
                self._posted.remove(posted)
                self._piece_landed(posted)
                ended += 1
            elif now > posted.push.deadline and posted.push.error is None:
                # It cannot be taken back: bytes may land until NIXL says that it has ended, or the peer is known to be dead.
                posted.push.error = self._overdue(posted.push)
                log.warning("endpoint %s: %s", self.agent_name, posted.push.error)
        return ended

    def _overdue(self, push: Push) -> TransferError:
        return TransferError(f"a push to {push.peer} did not end within {self.settings.push_timeout_s} s")

    def _peer_failed(self, agent: str, error: Exception) -> DualPathError:
        """After a disconnect NIXL refuses everything to that agent until it is removed and added again."""
        peer = self._peers.get(agent)
        if peer is not None and "Disconnect" in type(error).__name__:
            self._disconnect(agent)
            self._connect(peer)
        return error if isinstance(error, DualPathError) else TransferError(f"push to {agent} failed: {error or type(error).__name__}")

    def _piece_landed(self, posted: _Posted) -> None:
        self._release(posted.handle)
        kind = f"{posted.push.local}->{posted.push.remote}"
        self.stats.pushed_bytes[kind] += posted.nbytes
        self._piece_ended(posted.push, None)

    def _piece_ended(self, push: Push, error: DualPathError | None) -> None:
        push.error = push.error or error
        push.pieces_left -= 1
        if push.pieces_left == 0:
            self._finish(push)

    def _finish(self, push: Push) -> None:
        self._outstanding -= 1
        if not self._outstanding:
            self.stats.busy_seconds += time.monotonic() - self._busy_since
            self._busy_since = 0.0
        if push.error is None:
            self.stats.pushes[f"{push.local}->{push.remote}"] += 1
            if push.message is not None and not push.attached:
                self._send(push.peer, push.message)
            self.stats.messages_sent += push.attached and push.message is not None
        else:
            self.stats.failed_pushes += 1
        self._guard(push.on_done, push.error)
        if push.lease is not None:
            key = (push.peer, push.lease)
            self._lease_pushes[key] -= 1
            if not self._lease_pushes[key]:
                del self._lease_pushes[key]
            self._acknowledge_lease(key)

    def _release(self, handle: Any) -> None:
        try:
            handle.release()
        except Exception as error:
            log.debug("endpoint %s: release: %s", self.agent_name, error)

    # ---- leases of others that we write under

    def _on_quiesce(self, sender: str, message: Quiesce) -> None:
        if sender not in self._peers:
            self._agent.add_remote_agent(message.metadata)  # to answer; for pushes there is `connect`
            self._met.add(sender)
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
            self._send(key[0], WriterDone(key[1], closed.error))

    def _shut_down(self) -> None:
        self._run_commands()
        error = TransferError("the endpoint is closing")
        for _, _, push, _, _ in self._waiting:
            self._piece_ended(push, error)
        for posted in self._posted:
            self._release(posted.handle)
            self._piece_ended(posted.push, error)
        self._waiting.clear()
        self._posted.clear()
        for agent in list(self._peers):
            self._disconnect(agent)
        for handle in self._local_lists.values():
            self._release(handle)
        self._local_lists.clear()
        del self._agent
        self._ended = True
        self._run_commands()
