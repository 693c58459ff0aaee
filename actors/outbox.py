"""What a decode engine's requests have generated, on its way to their client: all requests of a client share one Ray stream.

An item of a Ray stream costs more than a millisecond of processor time, both ends together (`dualpath bench overhead`), and a batch
generates as many tokens in a step as it has requests. With a stream for each request a busy engine does little else; so an item holds
what all of them have generated since the one before. A stream lasts for some seconds: Ray keeps something of each item as long as the
stream lives, and a client that opens no other one has died.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import dataclass

from dualpath_ray.errors import CancelledError, DualPathError, OverloadedError
from dualpath_ray.requests import GenerationDelta

Answer = GenerationDelta | DualPathError

STREAM_S = 10.0
SILENCE_S = 30.0  # a client that has opened no stream for as long is gone


@dataclass(frozen=True, slots=True)
class Letter:
    """`answers`: by attempt, what it has generated since the letter before, or why it failed. `sender`: incarnation of the engine.

    `under_way` of the client's attempts that began up to number `begun` will be answered further: if it waits for more, some are lost.
    """

    sender: str
    answers: Mapping[str, Answer]
    begun: int
    under_way: int


class Outbox:
    """For one client. Bounded by what its requests may generate."""

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}
        self._under_way: dict[str, asyncio.Future[None]] = {}  # resolved when the last answer has been taken
        self._begun = 0
        self._changed = asyncio.Event()
        self._streams = self._open_streams = 0
        self._heard_at = time.monotonic()

    @property
    def attempts(self) -> Collection[str]:
        """Those whose last answer has not been taken."""
        return self._under_way.keys()

    @property
    def in_use(self) -> bool:
        return bool(self._under_way or self._open_streams)

    def open(self, attempt: str, number: int) -> None:
        """An attempt begins. Numbers rise. Raises OverloadedError while an earlier one of the name is there."""
        if attempt in self._under_way:
            raise OverloadedError(f"{attempt} is under way already")
        self._under_way[attempt] = asyncio.get_running_loop().create_future()
        self._begun = number
        self._heard_at = time.monotonic()

    def put(self, attempt: str, delta: GenerationDelta) -> None:
        """Raises CancelledError if the client is gone."""
        if self._deserted:
            raise CancelledError(f"the client of {attempt} has not been heard of for {SILENCE_S:.0f} s")
        self._add(attempt, delta)

    async def close(self, attempt: str, last: Answer) -> None:
        """Leave the last answer of an attempt; return when it has been taken, or cannot be as the client is gone."""
        taken = self._under_way[attempt]
        self._add(attempt, last)
        while not taken.done() and not self._deserted:
            await asyncio.wait([taken], timeout=SILENCE_S)
        self.drop(attempt)

    def drop(self, attempt: str) -> None:
        """Nobody waits for the answers of an attempt any more."""
        self._answers.pop(attempt, None)
        del self._under_way[attempt]

    async def letters(self, sender: str) -> AsyncGenerator[Letter, None]:
        """A letter whenever there is something to say, and one at the end. A later stream takes the place of this one, which then ends."""
        self._streams += 1
        own = self._streams
        self._heard_at = time.monotonic()
        ends_at = self._heard_at + (STREAM_S if self._under_way else 0.0)
        self._changed.set()
        self._open_streams += 1
        try:
            while (left := ends_at - time.monotonic()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._changed.wait()
                if own != self._streams:
                    return
                self._changed.clear()
                if self._answers:
                    yield self._letter(sender)
            yield self._letter(sender)
        finally:
            self._open_streams -= 1

    def _letter(self, sender: str) -> Letter:
        answers, self._answers = self._answers, {}
        for attempt, answer in answers.items():
            if is_last(answer):
                self._under_way[attempt].set_result(None)
        return Letter(sender, answers, self._begun, sum(not taken.done() for taken in self._under_way.values()))

    @property
    def _deserted(self) -> bool:
        return time.monotonic() - self._heard_at > SILENCE_S

    def _add(self, attempt: str, answer: Answer) -> None:
        before = self._answers.get(attempt)
        both = isinstance(before, GenerationDelta) and isinstance(answer, GenerationDelta)
        self._answers[attempt] = _joined(before, answer) if both else answer  # type: ignore[arg-type]
        self._changed.set()


def is_last(answer: Answer) -> bool:
    return isinstance(answer, DualPathError) or answer.finish_reason is not None


def _joined(one: GenerationDelta, next_one: GenerationDelta) -> GenerationDelta:
    return GenerationDelta(
        one.tokens + next_one.tokens, next_one.finish_reason, next_one.usage or one.usage, one.logprobs + next_one.logprobs
    )
