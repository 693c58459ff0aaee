"""The thread that steps a decode engine's batch. Everyone else talks to it through a queue of commands, taken between steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from dualpath_ray.engine.decode import DecodeRunner, DecodeSequence, StepOutput
from dualpath_ray.errors import DualPathError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class LoopStats:
    """Counters since start."""

    steps: int = 0
    step_s: float = 0.0


class DecodeLoop:
    """Steps as long as anything runs, admits as soon as there is room. `on_step` and `on_failure` are called on its thread."""

    def __init__(
        self,
        name: str,
        runner: DecodeRunner,
        on_step: Callable[[list[StepOutput]], None],
        on_failure: Callable[[str, DualPathError], None],
    ) -> None:
        self.stats = LoopStats()
        self._name, self._runner, self._on_step, self._on_failure = name, runner, on_step, on_failure
        self._waiting: deque[DecodeSequence] = deque()  # the thread's own
        self._running: set[str] = set()  # the thread's own
        self._commands: deque[Callable[[], None]] = deque()
        self._work = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name=f"decode-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def admit(self, sequence: DecodeSequence) -> None:
        """Let a sequence join the batch as soon as it has room. Its pool blocks stay in use until `on_step` ends it or `remove` is done."""
        self._command(lambda: self._waiting.append(sequence))

    def remove(self, request_id: str) -> Future[None]:
        """Take a sequence out; when the future is done its pool blocks are in no step any more."""
        removed: Future[None] = Future()

        def take_out() -> None:
            self._runner.remove(request_id)
            self._running.discard(request_id)
            self._waiting = deque(sequence for sequence in self._waiting if sequence.request_id != request_id)
            removed.set_result(None)

        self._command(take_out)
        return removed

    def __len__(self) -> int:
        """Sequences in the batch, or waiting for room in it."""
        return len(self._running) + len(self._waiting)

    def stop(self) -> None:
        """End the thread after the step under way. Idempotent."""
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _command(self, command: Callable[[], None]) -> None:
        with self._work:
            self._commands.append(command)
            self._work.notify()

    def _main(self) -> None:
        while True:
            with self._work:
                while not (self._commands or self._running or self._waiting or self._stopping):
                    self._work.wait()
                if self._stopping:
                    return
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            self._admit()
            if self._running:
                self._step()

    def _admit(self) -> None:
        while self._waiting and self._runner.can_admit():
            sequence = self._waiting.popleft()
            try:
                self._runner.admit(sequence)
                self._running.add(sequence.request_id)
            except DualPathError as error:
                self._on_failure(sequence.request_id, error)

    def _step(self) -> None:
        start = time.monotonic()
        try:
            outputs = self._runner.step()
        except Exception as error:
            log.exception("decode engine %s: a step failed", self._name)
            wrapped = error if isinstance(error, DualPathError) else DualPathError(f"decoding failed: {error}")
            for request_id in self._running:
                self._runner.remove(request_id)
                self._on_failure(request_id, wrapped)
            self._running.clear()
            return
        self.stats.steps += 1
        self.stats.step_s += time.monotonic() - start
        self._running -= {output.request_id for output in outputs if output.finish_reason is not None or output.error is not None}
        self._on_step(outputs)
        for output in outputs:
            if output.error is not None:
                self._on_failure(output.request_id, output.error)
