"""Answers of a decode engine on their way to its clients: outbox, letters, inbox. The engine and Ray between them are emulated."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from actors import outbox as outbox_module
from actors.inbox import Inbox
from actors.messages import attempt_name
from actors.outbox import Letter, Outbox
from dualpath_ray.errors import CancelledError, DeadlineExceededError, DualPathError, OverloadedError, TransferError, UnansweredError
from dualpath_ray.messages import DecodeTask, Route
from dualpath_ray.requests import GenerationDelta, GenerationRequest, GenerationUsage, TokenLogprobs

USAGE = GenerationUsage(3, 2, 1)


def task(name: str, tokens: int = 3) -> DecodeTask:
    route = Route(name, 0, "prefill-0", "decode-0", "p0", "d0", 0, (), {})
    return DecodeTask(GenerationRequest(name, (1,), tokens), route, (), b"root")


class EmulatedEngine:
    """Emulates `actors.calls.ActorCalls` and, behind it, a decode engine that generates a token whenever its loop comes by."""

    def __init__(self) -> None:
        self.name = "one"
        self.outbox = Outbox()
        self.begun = 0
        self.letters_sent: list[Letter] = []
        self.streams = 0
        self.refuses: DualPathError | None = None
        self.breaks: Exception | None = None  # what a stream is to fail with next
        self.hold = asyncio.Event()  # no attempt gets its second token before
        self.hold.set()
        self.opens = asyncio.Event()  # no stream opens before
        self.opens.set()
        self.serving: set[asyncio.Task[None]] = set()

    async def call(self, name: str, method: str, *arguments: Any, timeout_s: float = 1.0) -> Any:
        assert (name, method) == ("decode-0", "begin")
        if self.refuses is not None:
            raise self.refuses
        self.begun += 1
        request = arguments[1].request
        attempt = attempt_name(request.request_id, arguments[1].route.epoch)
        self.outbox.open(attempt, self.begun)
        serving = asyncio.create_task(self._serve(self.outbox, attempt, request.max_new_tokens))
        self.serving.add(serving)
        serving.add_done_callback(self.serving.discard)
        return self.name, self.begun

    async def stream(self, name: str, method: str, *arguments: Any, timeout_s: float) -> AsyncGenerator[Letter, None]:
        assert (name, method) == ("decode-0", "letters")
        self.streams += 1
        await self.opens.wait()
        async with aclosing(self.outbox.letters(self.name)) as letters:
            async for letter in letters:
                if self.breaks is not None:
                    error, self.breaks = self.breaks, None
                    raise error
                self.letters_sent.append(letter)
                yield letter

    def restart(self) -> None:
        """Another incarnation, which knows nothing of the attempts before. The open stream ends without a word."""
        before, self.outbox = self.outbox, Outbox()
        self.name, self.begun = "two", 0
        before._streams += 1
        before._changed.set()

    async def _serve(self, outbox: Outbox, attempt: str, tokens: int) -> None:
        last: DualPathError | GenerationDelta = GenerationDelta((tokens - 1,), "length", USAGE)
        try:
            for token in range(tokens - 1):
                outbox.put(attempt, GenerationDelta((token,), usage=USAGE if token == 0 else None))
                await self.hold.wait()
                await asyncio.sleep(0.001 * random.random())
        except DualPathError as error:
            last = error
        if attempt in outbox._under_way:
            await outbox.close(attempt, last)


@pytest.fixture
async def engine() -> AsyncIterator[EmulatedEngine]:
    engine = EmulatedEngine()
    yield engine
    for serving in engine.serving:
        serving.cancel()


@pytest.fixture
async def inbox(engine: EmulatedEngine) -> AsyncIterator[Inbox]:
    inbox = Inbox(engine, "decode-0", "client")  # type: ignore[arg-type]
    yield inbox
    await inbox.aclose()


async def tokens_of(inbox: Inbox, name: str, count: int, timeout_s: float = 5.0) -> list[int]:
    async with aclosing(inbox.generate(task(name, count), timeout_s)) as deltas:
        return [token async for delta in deltas for token in delta.tokens]


async def test_each_request_gets_its_own_tokens_in_order(engine: EmulatedEngine, inbox: Inbox) -> None:
    counts = {f"r{number}": 1 + number % 9 for number in range(60)}
    answers = await asyncio.gather(*(tokens_of(inbox, name, count) for name, count in counts.items()))
    assert answers == [list(range(count)) for count in counts.values()]
    assert not inbox._readers and not len(engine.outbox.attempts)
    assert engine.streams == 1
    assert len(engine.letters_sent) < sum(counts.values()) / 3  # one letter holds what many have generated


async def test_a_later_request_uses_the_stream_that_is_open_and_opens_another_when_that_has_ended(
    engine: EmulatedEngine, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "STREAM_S", 0.1)
    assert await tokens_of(inbox, "a", 2) == await tokens_of(inbox, "b", 2) == [0, 1]
    assert engine.streams == 1
    assert inbox._reading is not None
    await asyncio.wait_for(inbox._reading, 5)  # nobody waits, so no other one is opened
    assert engine.streams == 1 and not engine.outbox.in_use
    engine.hold.clear()
    waiting = asyncio.create_task(tokens_of(inbox, "c", 4))
    while engine.streams < 4:
        await asyncio.sleep(0.01)
    engine.hold.set()
    assert await waiting == [0, 1, 2, 3]


async def test_what_came_faster_than_it_was_taken_is_one_delta(engine: EmulatedEngine) -> None:
    box = Outbox()
    box.open("a", 1)
    box.put("a", GenerationDelta((1,), usage=USAGE, logprobs=(TokenLogprobs(-1.0),)))
    box.put("a", GenerationDelta((2, 3), logprobs=(TokenLogprobs(-2.0), TokenLogprobs(-3.0))))
    closing = asyncio.create_task(box.close("a", GenerationDelta((4,), "stop", logprobs=(TokenLogprobs(-4.0),))))
    await asyncio.sleep(0)
    async with aclosing(box.letters("one")) as letters:
        letter = await anext(letters)
    told = tuple(TokenLogprobs(-float(number)) for number in (1, 2, 3, 4))
    assert letter == Letter("one", {"a": GenerationDelta((1, 2, 3, 4), "stop", USAGE, told)}, 1, 0)
    await asyncio.wait_for(closing, 5)


async def test_a_failure_reaches_its_request_only(engine: EmulatedEngine, inbox: Inbox) -> None:
    engine.hold.clear()
    good = asyncio.create_task(tokens_of(inbox, "good", 3))
    bad = asyncio.create_task(tokens_of(inbox, "bad", 3))
    while len(engine.outbox.attempts) < 2:
        await asyncio.sleep(0)
    closing = asyncio.create_task(engine.outbox.close("bad/0", OverloadedError("no room")))
    with pytest.raises(OverloadedError, match="no room"):
        await bad
    await closing
    engine.hold.set()
    assert await good == [0, 1, 2]


async def test_a_refused_beginning_is_the_request_s_failure(engine: EmulatedEngine, inbox: Inbox) -> None:
    engine.refuses = UnansweredError("died", "decode-0")
    with pytest.raises(UnansweredError, match="died"):
        await tokens_of(inbox, "a", 2)
    assert not inbox._readers


async def test_an_error_of_no_known_kind_is_one_of_all_requests(engine: EmulatedEngine, inbox: Inbox) -> None:
    engine.breaks = RuntimeError("what is this?")
    with pytest.raises(TransferError, match="what is this"):
        await tokens_of(inbox, "a", 3)
    assert await tokens_of(inbox, "b", 3) == [0, 1, 2]


async def test_nobody_waits_for_what_was_cancelled(engine: EmulatedEngine, inbox: Inbox) -> None:
    engine.hold.clear()
    kept = asyncio.create_task(tokens_of(inbox, "kept", 3))
    async with aclosing(inbox.generate(task("left", 3), 5)) as deltas:
        await anext(deltas)
    engine.outbox.drop("left/0")
    engine.hold.set()
    assert await kept == [0, 1, 2]
    assert not len(engine.outbox.attempts)


async def test_with_the_stream_all_requests_fail_and_the_next_one_opens_another(engine: EmulatedEngine, inbox: Inbox) -> None:
    engine.breaks = UnansweredError("died", "decode-0")
    failed = await asyncio.gather(tokens_of(inbox, "a", 3), tokens_of(inbox, "b", 3), return_exceptions=True)
    assert [str(error) for error in failed] == ["died", "died"]
    assert [error.process for error in failed if isinstance(error, UnansweredError)] == ["decode-0"] * 2
    assert failed[0] is not failed[1]  # each is raised, and so has a traceback of its own
    assert await tokens_of(inbox, "c", 3) == [0, 1, 2]
    assert engine.streams == 2


@pytest.mark.parametrize("others", [False, True])
async def test_attempts_that_a_restarted_engine_knows_nothing_of_are_lost(engine: EmulatedEngine, inbox: Inbox, others: bool) -> None:
    """Whether or not the new incarnation serves others of this client by now."""
    engine.hold.clear()
    lost = asyncio.create_task(tokens_of(inbox, "lost", 3))
    while not engine.letters_sent:
        await asyncio.sleep(0)
    engine.opens.clear()
    engine.restart()
    other = asyncio.create_task(tokens_of(inbox, "other", 2)) if others else None
    while others and not engine.begun:
        await asyncio.sleep(0)
    engine.opens.set()
    with pytest.raises(UnansweredError, match="lost"):
        await asyncio.wait_for(lost, 5)
    engine.hold.set()
    assert other is None or await other == [0, 1]
    assert await tokens_of(inbox, "next", 2) == [0, 1]


async def test_an_attempt_that_the_engine_has_dropped_is_noticed(engine: EmulatedEngine, inbox: Inbox) -> None:
    engine.hold.clear()
    lost, kept = (asyncio.create_task(tokens_of(inbox, name, 3)) for name in ("lost", "kept"))
    while len(engine.outbox.attempts) < 2 or len(engine.letters_sent) < 1:
        await asyncio.sleep(0)
    del engine.outbox._under_way["lost/0"]
    engine.outbox.put("kept/0", GenerationDelta((8,)))
    for waiting in (lost, kept):  # which one it was is not known
        with pytest.raises(UnansweredError, match="lost"):
            await asyncio.wait_for(waiting, 5)


async def test_a_letter_from_before_an_attempt_began_says_nothing_of_it(engine: EmulatedEngine, inbox: Inbox) -> None:
    engine.hold.clear()
    waiting = [asyncio.create_task(tokens_of(inbox, name, 2)) for name in ("earlier", "later")]
    while len(engine.letters_sent) < 1 or len(engine.outbox.attempts) < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    inbox._take(Letter("one", {}, 1, 1))
    engine.hold.set()
    assert await asyncio.gather(*waiting) == [[0, 1]] * 2


async def test_two_attempts_of_one_name_are_not_mixed_up(engine: EmulatedEngine, inbox: Inbox) -> None:
    engine.hold.clear()
    first = asyncio.create_task(tokens_of(inbox, "a", 3))
    while not engine.letters_sent:
        await asyncio.sleep(0)
    other = Inbox(engine, "decode-0", "client")  # type: ignore[arg-type]  # who would not notice by itself
    for second in (inbox, other):
        with pytest.raises(OverloadedError, match="under way"):
            await tokens_of(second, "a", 3)
    engine.hold.set()
    assert await first == [0, 1, 2]


async def test_a_silent_engine_is_given_up(engine: EmulatedEngine, inbox: Inbox) -> None:
    engine.hold.clear()
    with pytest.raises(DeadlineExceededError, match="nothing for"):
        await tokens_of(inbox, "a", 2, timeout_s=0.05)
    assert not inbox._readers


async def test_attempts_of_a_client_that_is_gone_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "SILENCE_S", 0.05)
    box = Outbox()
    box.open("a", 1)
    box.open("b", 2)
    box.put("a", GenerationDelta((1,)))
    closing = asyncio.create_task(box.close("b", GenerationDelta((), "stop")))
    await asyncio.sleep(0.1)
    with pytest.raises(CancelledError, match="client of a"):
        box.put("a", GenerationDelta((2,)))
    await asyncio.wait_for(closing, 5)
    await asyncio.wait_for(box.close("a", CancelledError("gone")), 5)
    assert not box.in_use and not box._answers


async def test_a_later_stream_takes_the_place_of_one_that_waits() -> None:
    """A client that gave a stream up is not heard by it: what it took would be lost."""
    box = Outbox()
    box.open("a", 1)
    given_up = asyncio.create_task(anext(box.letters("one"), None))
    await asyncio.sleep(0.01)
    stream = box.letters("one")
    taken = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.01)
    box.put("a", GenerationDelta((1,)))
    assert (await asyncio.wait_for(taken, 5)).answers == {"a": GenerationDelta((1,))}
    assert await asyncio.wait_for(given_up, 5) is None
    await stream.aclose()
