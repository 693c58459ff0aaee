"""Keeps the scheduler informed about one process: registration, load reports, and what has happened to requests and blocks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping

from actors.calls import SCHEDULER, ActorCalls
from actors.messages import BlockPairs, Heard, Registration, Report, Welcome
from dualpath_ray.errors import ConfigError, DualPathError
from dualpath_ray.kv.residency import ResidencyChanges
from policies.vocabulary import EngineLoad, NodeLoad

log = logging.getLogger(__name__)

RESIDENT_PART = 5_000  # blocks per report that have come into memory, or left it
INDEX_PART = 20_000  # blocks per message when the whole index is sent
CALL_TIMEOUT_S = 5.0
INDEX_PAUSE_S = 1.0  # after storage could not be listed
REFUSED_PAUSE_S = 5.0
MIN_PAUSE_S = 0.005  # changes within this time go out in one report; the scheduler may ask for a longer one


def end_process() -> None:
    os._exit(1)


class Reporter:
    """Pushes a report when `changed` is called and at least every `interval_s`. Restarts of the scheduler are noticed and healed.

    A scheduler that has not answered for `health_timeout_s` is restarted. `end` ends this process.
    """

    def __init__(
        self,
        calls: ActorCalls,
        registration: Registration,
        load: Callable[[], EngineLoad | NodeLoad],
        interval_s: float,
        active: Callable[[], frozenset[str]] = frozenset,
        scan: Callable[[], Awaitable[list[tuple[bytes, bytes]]]] | None = None,
        figures: Callable[[], Mapping[str, float]] = dict,
        residency: ResidencyChanges | None = None,
        health_timeout_s: float = math.inf,
        end: Callable[[], None] = end_process,
    ) -> None:
        self._calls, self._registration, self._load, self._interval_s = calls, registration, load, interval_s
        self._active, self._scan, self._figures = active, scan, figures
        self._residency = ResidencyChanges() if residency is None else residency  # an empty one is false
        self._health_timeout_s, self._end = health_timeout_s, end
        self._wake = asyncio.Event()
        self._read: list[str] = []
        self._prefilled: list[str] = []
        self._finished: list[str] = []
        self._added: list[tuple[bytes, bytes]] = []
        self._removed: list[bytes] = []
        self._removed_meanwhile: set[bytes] = set()  # since the index that is being sent was begun to be listed
        self._told: list[asyncio.Future[None]] = []
        self._scheduler = ""
        self._scheduler_pid = 0
        self._pause_s = MIN_PAUSE_S
        self._reported_at = 0.0
        self._answered_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._indexing: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        for task in (self._task, self._indexing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def changed(self) -> None:
        """The load is not what was reported last."""
        self._wake.set()

    def read(self, request_id: str) -> None:
        """This node's storage reads of the attempt have ended."""
        self._read.append(request_id)
        self._wake.set()

    def prefilled(self, request_id: str) -> None:
        self._prefilled.append(request_id)
        self._wake.set()

    def finished(self, request_id: str) -> None:
        self._finished.append(request_id)
        self._wake.set()

    def index(self, added: list[tuple[bytes, bytes]], removed: list[bytes]) -> None:
        """Blocks became durable, or must not be used any more."""
        self._added += added
        self._removed += removed
        if self._indexing is not None and not self._indexing.done():
            self._removed_meanwhile.update(removed)
        self._wake.set()

    async def told(self, timeout_s: float) -> bool:
        """Wait until the scheduler has taken everything said so far; false when the time was up before."""
        taken = asyncio.get_running_loop().create_future()
        self._told.append(taken)
        self._wake.set()
        try:
            await asyncio.wait_for(taken, timeout_s)
        except TimeoutError:
            return False
        return True

    async def _run(self) -> None:
        while True:
            try:
                if not self._scheduler:
                    await self._register()
                await self._report()
                self._answered_at = time.monotonic()
            except ConfigError as error:
                log.error("%s: the scheduler refuses this process: %s", self._registration.engine_id, error)
                await asyncio.sleep(REFUSED_PAUSE_S)
                continue
            except DualPathError as error:
                await self._look_after_the_scheduler()
                level = logging.DEBUG if error.retryable else logging.ERROR
                log.log(level, "%s could not report to the scheduler: %s", self._registration.engine_id, error)
                await asyncio.sleep(self._interval_s)
                continue
            except Exception:  # without reports this process would be taken for a hung one and be ended
                log.exception("%s could not report to the scheduler", self._registration.engine_id)
                await asyncio.sleep(self._interval_s)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(self._interval_s, self._pause_s))
                await asyncio.sleep(max(MIN_PAUSE_S, self._reported_at + self._pause_s - time.monotonic()))

    async def _look_after_the_scheduler(self) -> None:
        """Who watches over all hangs itself: the same process has not answered for too long. Ray starts another one."""
        if time.monotonic() - self._answered_at < self._health_timeout_s:
            return
        try:
            process = await self._calls.process(SCHEDULER)
            if process is not None and process[0] == self._scheduler_pid:
                log.error("the scheduler has not answered for %.0f s: restarting it", time.monotonic() - self._answered_at)
                self._calls.kill(SCHEDULER)
        except DualPathError as error:
            log.warning("the scheduler cannot be looked after: %s", error)
        self._answered_at = time.monotonic()

    async def _register(self) -> None:
        welcome: Welcome = await self._calls.call(SCHEDULER, "register", self._registration, timeout_s=CALL_TIMEOUT_S)
        if welcome.given_up:
            log.critical("%s was taken for dead and ends: others may have its memory's place by now", self._registration.peer.agent)
            self._end()
        self._scheduler_pid = welcome.pid
        self._answered_at = time.monotonic()
        self._residency.restart()
        self._scheduler = welcome.scheduler
        if welcome.send_index and self._scan is not None:
            if self._indexing is not None:
                self._indexing.cancel()
            self._indexing = asyncio.get_running_loop().create_task(self._send_index(welcome.scheduler, self._scan))

    async def _send_index(self, scheduler: str, scan: Callable[[], Awaitable[list[tuple[bytes, bytes]]]]) -> None:
        """Tell a scheduler which blocks are stored. Beside the reports, because storage may be slow to list them, or be down."""
        while self._scheduler == scheduler:
            self._removed_meanwhile.clear()
            try:
                blocks = await scan()
                for start in range(0, len(blocks), INDEX_PART):
                    part = tuple(pair for pair in blocks[start : start + INDEX_PART] if pair[0] not in self._removed_meanwhile)
                    await self._send(self._make(added=part))
                await self._send(self._make(index_complete=True))
                return
            except DualPathError as error:
                log.warning("%s could not tell the scheduler what is stored: %s", self._registration.engine_id, error)
            except Exception:
                log.exception("%s could not tell the scheduler what is stored", self._registration.engine_id)
            await asyncio.sleep(INDEX_PAUSE_S)

    async def _report(self) -> None:
        self._wake.clear()
        told = len(self._told)
        came, gone = self._residency.take(RESIDENT_PART)
        sent = self._make(
            tuple(self._read), tuple(self._prefilled), tuple(self._finished), tuple(self._added), tuple(self._removed), came, gone
        )
        self._reported_at = time.monotonic()
        heard = await self._send(sent)
        self._pause_s = max(MIN_PAUSE_S, heard.pause_s)
        if heard.scheduler != self._scheduler:
            self._scheduler = ""  # it was restarted: introduce ourselves and say all again
            return
        del self._read[: len(sent.read)]
        del self._prefilled[: len(sent.prefilled)]
        del self._finished[: len(sent.finished)]
        del self._added[: len(sent.added)]
        del self._removed[: len(sent.removed)]
        for taken in self._told[:told]:
            if not taken.done():
                taken.set_result(None)
        del self._told[:told]
        self._residency.confirm(came, gone)
        if self._residency:
            self._wake.set()

    def _make(
        self,
        read: tuple[str, ...] = (),
        prefilled: tuple[str, ...] = (),
        finished: tuple[str, ...] = (),
        added: BlockPairs = (),
        removed: tuple[bytes, ...] = (),
        came: tuple[bytes, ...] = (),
        gone: tuple[bytes, ...] = (),
        index_complete: bool = False,
    ) -> Report:
        identity = self._registration
        return Report(
            engine_id=identity.engine_id,
            agent=identity.peer.agent,
            load=self._load(),
            active=self._active(),
            read=read,
            prefilled=prefilled,
            finished=finished,
            added=added,
            removed=removed,
            figures=self._figures(),
            came=came,
            gone=gone,
            index_complete=index_complete,
        )

    async def _send(self, report: Report) -> Heard:
        heard: Heard = await self._calls.call(SCHEDULER, "report", report, timeout_s=CALL_TIMEOUT_S)
        return heard
