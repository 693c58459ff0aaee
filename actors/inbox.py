"""The answers of one decode engine to one client: the other end of `actors.outbox`."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from actors.calls import GRACE_S, ActorCalls
from actors.messages import attempt_name
from actors.outbox import STREAM_S, Answer, Letter, is_last
from dualpath_ray.errors import DeadlineExceededError, DualPathError, OverloadedError, TransferError, UnansweredError
from dualpath_ray.messages import DecodeTask
from dualpath_ray.requests import GenerationDelta

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Reader:
    """`engine` is the incarnation that has begun with it, as its number `number`; neither is known at first."""

    answers: asyncio.Queue[Answer] = field(default_factory=asyncio.Queue)
    engine: str = ""
    number: int = 0


class Inbox:
    """While attempts are under way on the engine, one stream of letters from it is open. When that fails, all of them have."""

    def __init__(self, calls: ActorCalls, engine: str, client: str) -> None:
        """`client` tells all clients of the cluster apart."""
        self._calls, self._engine, self._client = calls, engine, client
        self._readers: dict[str, _Reader] = {}
        self._reading: asyncio.Task[None] | None = None

    async def generate(self, task: DecodeTask, timeout_s: float) -> AsyncGenerator[GenerationDelta, None]:
        """Have an attempt served. Each delta comes within `timeout_s` of the one before. Raises DualPathError."""
        attempt = attempt_name(task.request.request_id, task.route.epoch)
        if attempt in self._readers:
            raise OverloadedError(f"another request of the name {task.request.request_id} is under way")
        reader = self._readers[attempt] = _Reader()
        try:
            reader.engine, reader.number = await self._calls.call(self._engine, "begin", self._client, task)
            if self._reading is None or self._reading.done():
                self._reading = asyncio.get_running_loop().create_task(self._read())
            while True:
                try:
                    async with asyncio.timeout(timeout_s):
                        answer = await reader.answers.get()
                except TimeoutError:
                    raise DeadlineExceededError(f"{self._engine} sent nothing for {timeout_s:.1f} s") from None
                if isinstance(answer, DualPathError):
                    raise answer
                yield answer
                if is_last(answer):
                    return
        finally:
            if self._readers.get(attempt) is reader:
                del self._readers[attempt]

    async def aclose(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        """One stream after the other, as long as an attempt waits."""
        while self._readers:
            try:
                async with aclosing(self._calls.stream(self._engine, "letters", self._client, timeout_s=STREAM_S + GRACE_S)) as letters:
                    async for letter in letters:
                        self._take(letter)
            except DualPathError as error:
                self._fail(list(self._readers), error)
            except Exception as error:  # nobody waits for this task, but all readers wait for what it reads
                log.exception("letters of %s cannot be read", self._engine)
                self._fail(list(self._readers), TransferError(f"{self._engine} cannot be read: {error}"))

    def _take(self, letter: Letter) -> None:
        for attempt, answer in letter.answers.items():
            self._answer(attempt, answer)
        begun = [attempt for attempt, reader in self._readers.items() if reader.engine == letter.sender and reader.number <= letter.begun]
        lost = [attempt for attempt, reader in self._readers.items() if reader.engine not in ("", letter.sender)]
        if letter.under_way < len(begun):
            lost += begun
        self._fail(lost, UnansweredError(f"{self._engine} has lost requests", self._engine))

    def _answer(self, attempt: str, answer: Answer) -> None:
        """An attempt that nobody waits for any more has been cancelled."""
        reader = self._readers.get(attempt)
        if reader is None:
            return
        reader.answers.put_nowait(answer)
        if is_last(answer):
            del self._readers[attempt]

    def _fail(self, attempts: list[str], error: DualPathError) -> None:
        for attempt in attempts:
            self._answer(attempt, copy.copy(error))
