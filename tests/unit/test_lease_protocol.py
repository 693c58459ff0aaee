"""The lease protocol under all interleavings: grants, writes, reads, deliveries, aborts, deaths, time-outs, late arrivals, residents.

A real gateway with a real staging buffer. Its endpoint, its store and its peers are emulated here, so that hypothesis decides when each
message, read, write and push ends. Every block's bytes follow from its key, and a writer that has not acknowledged may write garbage at
any time to any slot it was ever told; so a slot that is reused, shared or kept too early shows as wrong bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dualpath_ray.errors import BlockMissingError, DualPathError, StoreError
from dualpath_ray.gateway import POOL, Gateway
from dualpath_ray.gateway_settings import GatewaySettings
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.messages import BlockLoad, Delivery, LeaseGrant, LeaseRequest, PersistBlock
from dualpath_ray.stores.base import BlockBuffer
from dualpath_ray.transfer.endpoint_settings import EndpointStats
from dualpath_ray.transfer.memory import PeerInfo, Region
from dualpath_ray.transfer.messages import WriterDone
from dualpath_ray.transfer.push import Push

GEOMETRY = KVGeometry(layers=2, kv_heads=1, head_dim=8, block_tokens=4)
SLOTS = 6
KEYS = [bytes([number]) * 16 for number in range(8)]
WRITERS = ("w0", "w1")


def content(key: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.shake_128(key).digest(GEOMETRY.full_block_bytes), dtype=np.uint8)


class EmulatedClock(asyncio.SelectorEventLoop):
    """Emulates time: it passes only while everybody waits, and then at once. So a run depends on nothing but hypothesis's choices."""

    def __init__(self) -> None:
        super().__init__()
        self._passed = 0.0
        self._select, self._selector.select = self._selector.select, self._pass_time  # type: ignore[attr-defined,has-type]

    def time(self) -> float:
        return self._passed

    def _pass_time(self, timeout: float | None = None) -> Any:
        if timeout:
            self._passed += timeout
        return self._select(timeout if timeout is None else 0)


class EmulatedEndpoint:
    """Emulates `Endpoint`: pushes end when the test says so, messages are forgotten (each of them is repeated until it is answered)."""

    def __init__(self, engine_id: str, regions: tuple[Region, ...], settings: object = None) -> None:
        self.agent_name, self.stats = f"{engine_id}-1", EndpointStats()
        self.info = PeerInfo(engine_id, self.agent_name, b"", regions)
        self.handlers: dict[type, Callable[[str, Any], None]] = {}
        self.pushes: list[Push] = []
        self.dead: set[str] = set()

    def on(self, kind: type, handler: Callable[[str, Any], None]) -> None:
        self.handlers[kind] = handler

    def call(self, function: Callable[[], None]) -> None:
        function()

    def push(self, push: Push) -> None:
        self.pushes.append(push)

    def is_dead(self, agent: str) -> bool:
        return agent in self.dead

    def forget(self, agent: str) -> None:
        self.dead.add(agent)

    def connect(self, peer: PeerInfo) -> None: ...
    def send(self, agent: str, message: object) -> None: ...
    def finish_writes(self, agent: str, lease: int, error: str | None = None) -> None: ...
    def close(self) -> None: ...


class EmulatedStore:
    """Emulates a store: reads and writes end when the test says so. It refuses bytes that are not the key's."""

    def __init__(self) -> None:
        self.reads: list[tuple[Future[None], Sequence[BlockBuffer]]] = []
        self.writes: list[tuple[Future[list[Exception | None]], Sequence[BlockBuffer]]] = []

    def register(self, arena: np.ndarray) -> None: ...
    def touch(self, keys: Sequence[bytes]) -> None: ...
    def close(self) -> None: ...

    def layer_groups(self) -> int:
        return 1

    def open(self, blocks: Sequence[BlockBuffer]) -> Future[object]:
        opened: Future[object] = Future()
        opened.set_result(EmulatedReader(self, blocks))
        return opened

    def write(self, blocks: Sequence[BlockBuffer]) -> Future[list[Exception | None]]:
        written: Future[list[Exception | None]] = Future()
        self.writes.append((written, blocks))
        return written


@dataclass
class EmulatedReader:
    store: EmulatedStore
    blocks: Sequence[BlockBuffer]

    def read(self, first: int, stop: int) -> Future[None]:
        read: Future[None] = Future()
        self.store.reads.append((read, self.blocks))
        return read

    def close(self) -> None: ...


@dataclass(eq=False)
class Out:
    """A lease as its owner and its writers know it: `keys[i]` is the block at position i, the first `loaded` positions are loads."""

    request_id: str
    keys: list[bytes]
    loaded: int
    unfinished: set[str]
    filled: bool
    asked: asyncio.Task[LeaseGrant]
    grant: LeaseGrant | None = None
    released: bool = False
    failed: bool = False
    delivery: asyncio.Task[Any] | None = field(default=None)

    def writable(self) -> list[tuple[int, bytes]]:
        """(slot, key) as a writer knows them."""
        assert self.grant is not None
        return [(int(slot), key) for slot, key in zip(self.grant.slots, self.keys, strict=True) if slot >= 0]


class LeaseProtocol(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = EmulatedClock()
        self.store, self.names, self.incarnations = EmulatedStore(), itertools.count(), itertools.count()
        with mock.patch("dualpath_ray.gateway.Endpoint", EmulatedEndpoint):
            self.gateway = Gateway("n0", GEOMETRY, self.store, SLOTS, GatewaySettings(resident_share=1.0))  # type: ignore[arg-type]
        self.endpoint: EmulatedEndpoint = self.gateway.endpoint  # type: ignore[assignment]
        self.loop.run_until_complete(self.gateway.start(lambda added, removed: None))
        self.writers = {name: f"{name}-0" for name in WRITERS}
        self.out: list[Out] = []

    def run(self) -> None:
        """Let everything happen that can, until nothing does for a while (longer than a hurried lease waits)."""
        self.loop.run_until_complete(asyncio.sleep(0.005))
        for out in self.out:
            if out.grant is None and out.asked.done() and not out.failed:
                out.failed = out.asked.cancelled() or out.asked.exception() is not None
                out.grant = None if out.failed else out.asked.result()

    def granted(self) -> list[Out]:
        return [out for out in self.out if out.grant is not None]

    # ---- what owners do

    @rule(
        loads=st.lists(st.sampled_from(KEYS), max_size=2, unique=True),
        new=st.lists(st.sampled_from(KEYS), max_size=2, unique=True),
        writers=st.sampled_from([("w0",), ("w1",), WRITERS, ()]),
        hurried=st.integers(0, 4).map(lambda number: number == 4),
        draining=st.booleans(),
    )
    def lease(self, loads: list[bytes], new: list[bytes], writers: tuple[str, ...], hurried: bool, draining: bool) -> None:
        keys = [*loads, *(key for key in new if key not in loads)]
        agents = {self.writers[name] for name in writers} if len(keys) > len(loads) else set()
        request = LeaseRequest(
            f"r{next(self.names)}",
            "owner",
            len(keys),
            tuple(BlockLoad(position, key, b"") for position, key in enumerate(loads)),
            frozenset(agents),
            timeout_s=0.001 if hurried else 1000.0,
            draining=draining,
        )
        filled = bool(agents) or len(keys) == len(loads) > 0
        asked = self.loop.create_task(self.gateway.lease(request))
        self.out.append(Out(request.request_id, keys, len(loads), set(agents), filled, asked))
        self.run()

    @precondition(lambda self: self.gateway.staging.available_slots and not len(self.gateway._slots))
    @rule(data=st.data(), used=st.booleans())
    def prepare(self, data: st.DataObject, used: bool) -> None:
        """A lease whose blocks are read at once, so that there is something resident to share and to evict; `used`: it is kept for now.

        Chance alone seldom comes to a memory that is full of resident blocks of which some are in use.
        """
        keys = data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=min(3, self.gateway.staging.available_slots), unique=True))
        loads = tuple(BlockLoad(position, key, b"") for position, key in enumerate(keys))
        request = LeaseRequest(f"r{next(self.names)}", "owner", len(keys), loads, frozenset(), timeout_s=1000.0)
        out = Out(request.request_id, keys, len(keys), set(), True, self.loop.create_task(self.gateway.lease(request)))
        waiting = len(self.store.reads)
        self.out.append(out)
        self.run()
        for read, blocks in self.store.reads[waiting:]:
            for block in blocks:
                block.data[:] = content(block.key)
            read.set_result(None)
        del self.store.reads[waiting:]
        self.run()
        if out.grant is not None and not used:
            self.loop.run_until_complete(self.gateway.release(out.grant.lease_id))
            out.released = True
            self.run()

    @precondition(lambda self: any(out.grant is None for out in self.out))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        out = data.draw(st.sampled_from([out for out in self.out if out.grant is None]))
        self.loop.run_until_complete(self.gateway.withdraw(out.request_id))
        self.run()

    @precondition(lambda self: self.granted())
    @rule(data=st.data(), persist=st.booleans())
    def release(self, data: st.DataObject, persist: bool) -> None:
        """Also a second time. Only an owner whose writers have succeeded would persist; what they abort must not be stored."""
        out = data.draw(st.sampled_from(self.granted()))
        assert out.grant is not None
        blocks = [PersistBlock(i, key, b"") for i, key in enumerate(out.keys) if i >= out.loaded] if persist and not out.released else []
        if not out.unfinished and not out.failed:
            blocks = blocks if all((self.gateway.staging.slot(slot) == content(key)).all() for slot, key in out.writable()) else []
        self.loop.run_until_complete(self.gateway.release(out.grant.lease_id, blocks))
        out.released = True
        self.run()

    @precondition(lambda self: any(out.unfinished and not out.released for out in self.granted()))
    @rule(data=st.data(), persist=st.booleans())
    def abandon(self, data: st.DataObject, persist: bool) -> None:
        """Release what is still being written."""
        out = data.draw(st.sampled_from([out for out in self.granted() if out.unfinished and not out.released]))
        assert out.grant is not None
        blocks = [PersistBlock(i, key, b"") for i, key in enumerate(out.keys) if i >= out.loaded and persist]
        self.loop.run_until_complete(self.gateway.release(out.grant.lease_id, blocks))
        out.released = True
        self.run()

    def deliverable(self) -> list[Out]:
        """Those whose every block is loaded or written by someone."""
        return [out for out in self.granted() if out.filled and not out.released and out.delivery is None]

    @precondition(lambda self: self.deliverable())
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        out = data.draw(st.sampled_from(self.deliverable()))
        assert out.grant is not None
        pool = Region(POOL, 0, GEOMETRY.layer_block_bytes, 2 * SLOTS, 2 * SLOTS * GEOMETRY.layer_block_bytes)
        peer = PeerInfo("decode", "owner", b"", (pool,))
        wanted = Delivery(out.grant.lease_id, peer, np.arange(len(out.keys), dtype=np.int32), timeout_s=1000.0)
        out.delivery = self.loop.create_task(self.gateway.deliver(wanted))
        self.run()

    # ---- what writers do

    def unfinished(self) -> list[tuple[Out, str]]:
        return [(out, agent) for out in self.granted() for agent in sorted(out.unfinished)]

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data())
    def write_garbage(self, data: st.DataObject) -> None:
        """A part of a write, or one that arrives after everybody has given up the request."""
        out, _ = data.draw(st.sampled_from(self.unfinished()))
        for slot, _ in out.writable():
            self.gateway.staging.slot(slot)[:] = 0xEE

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data(), well=st.booleans())
    def writer_is_done(self, data: st.DataObject, well: bool) -> None:
        out, agent = data.draw(st.sampled_from(self.unfinished()))
        assert out.grant is not None
        if well:
            for slot, key in out.writable():
                self.gateway.staging.slot(slot)[:] = content(key)
        out.unfinished.discard(agent)
        self.endpoint.handlers[WriterDone](agent, WriterDone(out.grant.lease_id, None if well else "aborted"))
        out.failed |= not well
        self.run()

    @precondition(lambda self: self.granted())
    @rule(data=st.data(), agent=st.sampled_from(["w0-0", "w1-0", "stranger"]))
    def an_acknowledgement_comes_again(self, data: st.DataObject, agent: str) -> None:
        out = data.draw(st.sampled_from(self.granted()))
        assert out.grant is not None
        if agent not in out.unfinished:
            self.endpoint.handlers[WriterDone](agent, WriterDone(out.grant.lease_id, "late"))
            self.run()

    @rule(name=st.sampled_from(WRITERS))
    def writer_dies(self, name: str) -> None:
        agent, self.writers[name] = self.writers[name], f"{name}-{next(self.incarnations) + 1}"
        for out in self.out:
            out.failed |= agent in out.unfinished and out.grant is not None
            out.unfinished.discard(agent)
        self.gateway.peer_died(agent)
        self.run()

    # ---- what storage and the network do

    @precondition(lambda self: self.store.reads)
    @rule(data=st.data(), well=st.booleans())
    def a_read_ends(self, data: st.DataObject, well: bool) -> None:
        read, blocks = self.store.reads.pop(data.draw(st.integers(0, len(self.store.reads) - 1)))
        for block in blocks:
            block.data[:] = content(block.key) if well else 0xDD
        if well:
            read.set_result(None)
        else:
            read.set_exception(BlockMissingError(blocks[0].key, "emulated"))
        self.run()

    @precondition(lambda self: self.store.writes)
    @rule(data=st.data(), well=st.booleans())
    def a_write_ends(self, data: st.DataObject, well: bool) -> None:
        written, blocks = self.store.writes.pop(data.draw(st.integers(0, len(self.store.writes) - 1)))
        for block in blocks:
            assert (block.data == content(block.key)).all(), "wrong bytes are being stored"
        written.set_result([None if well else StoreError("emulated")] * len(blocks))
        self.run()

    @precondition(lambda self: self.endpoint.pushes)
    @rule(data=st.data())
    def a_push_ends(self, data: st.DataObject) -> None:
        push = self.endpoint.pushes.pop(data.draw(st.integers(0, len(self.endpoint.pushes) - 1)))
        slots = np.unique(push.local_blocks // GEOMETRY.layers)
        known = {content(key).tobytes() for key in KEYS}
        for slot in slots.tolist():
            assert self.gateway.staging.slot(slot).tobytes() in known, "what a delivery reads is no block any more"
        push.on_done(None)
        self.run()

    # ---- what must hold at every moment

    @invariant()
    def books_balance(self) -> None:
        self.gateway.check_integrity()

    @invariant()
    def resident_blocks_hold_their_bytes(self) -> None:
        for key, slot in self.gateway.staging.residents.slots().items():
            assert (self.gateway.staging.slot(slot) == content(key)).all(), "a resident block has been written to"

    @invariant()
    def nobody_else_uses_what_a_writer_may_still_write_to(self) -> None:
        staging = self.gateway.staging
        private = {slot for lease in staging.leases for i, slot in enumerate(lease.slots.tolist()) if i not in lease.shared}
        taken: set[int] = set()
        for out in self.granted():
            if out.unfinished:
                slots = {slot for slot, _ in out.writable()}
                assert slots <= private, "a slot is free or resident while a writer may write to it"
                assert not slots & taken, "a slot is lent to two requests"
                taken |= slots

    def teardown(self) -> None:
        async def idle() -> None:
            async with asyncio.timeout(10):
                while not self.gateway.idle:
                    self.end_everything()
                    await asyncio.sleep(0.001)

        try:
            try:
                self.loop.run_until_complete(idle())
            except TimeoutError:
                raise AssertionError(f"everything has ended, but {self.what_is_left()}") from None
            self.gateway.check_integrity()
            assert self.gateway.staging.available_slots == SLOTS, "slots have leaked"
        finally:
            self.loop.run_until_complete(self.gateway.close())
            self.loop.run_until_complete(self.cancel_everything())
            for out in self.out:
                for ended in (out.asked, out.delivery):
                    if ended is not None and not ended.cancelled() and ended.exception() is not None:
                        assert isinstance(ended.exception(), DualPathError)
            self.loop.close()

    def what_is_left(self) -> str:
        """Why the gateway is not idle, for people."""
        left = [
            f"lease {lease.lease_id} of {lease.request_id} keeps {len(lease.slots)} slots: "
            f"{'' if lease.released else 'not '}released, {lease.holds} holds, writers {sorted(lease.writers)}"
            for lease in self.gateway.staging.leases
        ]
        left += [f"{len(self.gateway._work)} leases are not released", f"{len(self.gateway._slots)} requests wait for slots"]
        left += [f"{self.gateway.persisting_blocks} blocks are counted as being stored"]
        return "; ".join(each for each in left if not each.startswith("0 "))

    async def cancel_everything(self) -> None:
        tasks = asyncio.all_tasks(self.loop) - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def end_everything(self) -> None:
        for out in self.out:
            if out.grant is None and out.asked.done() and not out.asked.cancelled() and out.asked.exception() is None:
                out.grant = out.asked.result()
            if out.grant is not None and not out.released:
                out.released = True
                self.loop.create_task(self.gateway.release(out.grant.lease_id))
        for name in WRITERS:
            self.gateway.peer_died(self.writers[name])
            self.writers[name] = f"{name}-{next(self.incarnations) + 1}"
        for read, _ in self.store.reads:
            read.set_exception(StoreError("emulated"))
        for written, blocks in self.store.writes:
            written.set_result([None] * len(blocks))
        for push in self.endpoint.pushes:
            push.on_done(None)
        self.store.reads, self.store.writes, self.endpoint.pushes = [], [], []


LeaseProtocol.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLeaseProtocol = LeaseProtocol.TestCase
