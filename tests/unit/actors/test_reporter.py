"""What a process has to tell reaches the scheduler, whatever is lost on the way and however often the scheduler is restarted."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from actors import reporter as module
from actors.calls import SCHEDULER
from actors.reporter import Reporter
from actors.supervisor import Supervisor
from dualpath_ray.errors import StoreError
from tests.unit.actors.emulation import FACTS, DirectCalls, load, make_scheduler, registration, stop

CHAIN = [(b"%d" % n, b"%d" % (n - 1)) for n in range(1, 6)]


class Process:
    """A gateway's reporter, its storage, and the scheduler it talks to."""

    def __init__(self) -> None:
        self.stored: list[tuple[bytes, bytes]] = []
        self.scan_error: Exception | None = None
        self.readable = asyncio.Event()
        self.readable.set()
        self.calls = DirectCalls()
        self.ended = asyncio.Event()
        self.reporter = Reporter(
            self.calls,  # type: ignore[arg-type]
            registration("p0", "p0", None),
            lambda: load("p0", "p0", None),
            interval_s=0.005,
            scan=self.scan,
            health_timeout_s=0.1,
            end=lambda: self.ended.set(),
        )

    async def scan(self) -> list[tuple[bytes, bytes]]:
        error, self.scan_error = self.scan_error, None
        if error is not None:
            raise error
        found = list(self.stored)
        await self.readable.wait()
        return found

    async def new_scheduler(self) -> None:
        if self.calls.scheduler is not None:
            await stop(self.calls.scheduler)
        self.calls.scheduler = make_scheduler()[0]

    @property
    def known(self) -> set[bytes]:
        assert self.calls.scheduler is not None
        return set(self.calls.scheduler._index._parents)

    def heard(self, field: str) -> list[object]:
        return [item for method, (message,) in self.calls.called if method == "report" for item in getattr(message, field)]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)


@pytest.fixture
async def process(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Process]:
    monkeypatch.setattr(module, "INDEX_PAUSE_S", 0.01)
    made = Process()
    await made.new_scheduler()
    yield made
    await made.reporter.close()
    assert made.calls.scheduler is not None
    await stop(made.calls.scheduler)


async def test_the_index_goes_out_in_parts(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INDEX_PART", 2)
    process.stored = CHAIN
    process.reporter.start()
    await process.until(lambda: len(process.known) == len(CHAIN))
    assert [len(m.added) for method, (m,) in process.calls.called if method == "report" and m.added] == [2, 2, 1]


async def test_events_arrive_in_order_and_once(process: Process) -> None:
    process.reporter.start()
    process.reporter.read("a/0")
    process.reporter.prefilled("a/0")
    process.reporter.finished("a/0")
    process.reporter.finished("b/0")
    process.reporter.index(CHAIN[:2], [])
    process.reporter.index([], [CHAIN[0][0]])
    await process.until(lambda: process.known == {CHAIN[1][0]})
    await process.until(lambda: len(process.calls.called) > 6)
    assert process.heard("read") == ["a/0"]
    assert (process.heard("prefilled"), process.heard("finished")) == (["a/0"], ["a/0", "b/0"])


async def test_reports_are_as_rare_as_the_scheduler_wants_and_lose_nothing(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Supervisor, "report_pause_s", 0.2)
    process.reporter.start()
    await process.until(lambda: process.calls.scheduler is not None and process.calls.scheduler._index_complete)
    begun, before = time.monotonic(), len(process.calls.called)
    for number in range(100):
        process.reporter.finished(f"{number}/0")
        await asyncio.sleep(0.005)
    await process.until(lambda: len(process.heard("finished")) == 100)
    assert len(process.calls.called) - before <= 2 + (time.monotonic() - begun) / 0.2
    assert process.heard("finished") == [f"{number}/0" for number in range(100)]
    begun, before = time.monotonic(), len(process.calls.called)
    await asyncio.sleep(0.5)  # nothing to say
    assert 1 <= len(process.calls.called) - before <= 2 + (time.monotonic() - begun) / 0.2


@pytest.mark.parametrize("lost", ["call", "answer"])
async def test_events_of_a_lost_report_are_told_again(process: Process, lost: str) -> None:
    process.reporter.start()
    await process.until(lambda: bool(process.calls.called))
    setattr(process.calls, f"lose_{lost}", "report")
    process.reporter.finished("a/0")
    process.reporter.index(CHAIN, [])
    await process.until(lambda: not getattr(process.calls, f"lose_{lost}"))
    process.reporter.finished("b/0")
    await process.until(lambda: "b/0" in process.heard("finished"))
    assert [item for item in process.heard("finished") if item == "a/0"] == ["a/0"] * (2 if lost == "answer" else 1)
    assert len(process.known) == len(CHAIN)


@pytest.mark.parametrize("trouble", ["call", "answer", "storage", "bug"])
async def test_the_index_is_sent_in_spite_of(process: Process, trouble: str) -> None:
    process.stored = CHAIN
    if trouble == "storage":
        process.scan_error = StoreError("the disk is busy")
    elif trouble == "bug":
        process.scan_error = OSError("nobody expected this")
    else:
        setattr(process.calls, f"lose_{trouble}", "register")
    process.reporter.start()
    await process.until(lambda: len(process.known) == len(CHAIN))


async def test_storage_that_cannot_be_listed_holds_up_nothing_else(process: Process) -> None:
    """Least of all may a scheduler be restarted for it. What is removed before the list is there is not in the index."""
    process.stored = CHAIN
    process.readable.clear()
    process.calls.pids[SCHEDULER] = os.getpid()
    process.reporter.start()
    process.reporter.finished("a/0")
    await process.until(lambda: "a/0" in process.heard("finished"))
    await asyncio.sleep(0.3)
    process.reporter.index([], [CHAIN[4][0]])
    assert not process.calls.killed
    assert not process.known
    process.readable.set()
    await process.until(lambda: process.known == {key for key, _ in CHAIN[:4]})


async def test_a_new_scheduler_is_told_everything(process: Process) -> None:
    process.stored = CHAIN[:3]
    process.reporter.start()
    await process.until(lambda: len(process.known) == 3)
    process.stored = CHAIN  # what became durable is found by the next scan, too
    process.reporter.index(CHAIN[3:], [])
    process.reporter.finished("a/0")
    await process.new_scheduler()
    await process.until(lambda: len(process.known) == len(CHAIN) and "a/0" in process.heard("finished"))
    assert [method for method, _ in process.calls.called].count("register") == 2


async def test_events_while_there_is_no_scheduler_are_kept(process: Process) -> None:
    scheduler, process.calls.scheduler = process.calls.scheduler, None
    process.reporter.start()
    for name in ("a/0", "b/0"):
        process.reporter.finished(name)
        await asyncio.sleep(0.01)
    process.calls.scheduler = scheduler
    await process.until(lambda: process.heard("finished") == ["a/0", "b/0"])


async def test_a_process_with_another_model_says_so_aloud(process: Process, caplog: pytest.LogCaptureFixture) -> None:
    assert process.calls.scheduler is not None
    await process.calls.scheduler.register(registration("d0", "d0", None, facts=replace(FACTS, fingerprint="other")))
    with caplog.at_level(logging.ERROR, logger=module.__name__):
        process.reporter.start()
        await process.until(lambda: any("another model" in record.getMessage() for record in caplog.records))


async def test_events_that_happen_while_a_report_is_under_way_go_out_with_the_next(process: Process) -> None:
    process.calls.meanwhile = lambda: (process.reporter.finished("b/0"), process.reporter.index(CHAIN[1:], []))[0]
    process.reporter.finished("a/0")
    process.reporter.index(CHAIN[:1], [])
    process.reporter.start()
    await process.until(lambda: process.heard("finished") == ["a/0", "b/0"] and len(process.known) == len(CHAIN))


@pytest.mark.parametrize("same_process", [True, False])
async def test_a_scheduler_that_does_not_answer_is_restarted_unless_that_has_happened(process: Process, same_process: bool) -> None:
    process.reporter.start()
    await process.until(lambda: bool(process.calls.called))
    process.calls.pids[SCHEDULER] = os.getpid() if same_process else 1
    scheduler, process.calls.scheduler = process.calls.scheduler, None
    await asyncio.sleep(0.3)
    assert bool(process.calls.killed) == same_process
    process.calls.scheduler = scheduler


async def test_a_process_that_was_taken_for_dead_ends_itself(process: Process) -> None:
    assert process.calls.scheduler is not None
    supervisor = process.calls.scheduler._supervisor
    process.reporter.start()
    await process.until(lambda: "p0" in supervisor.current)
    incarnation = supervisor.current.pop("p0")
    supervisor._end(incarnation)
    await asyncio.wait_for(process.ended.wait(), 5)
