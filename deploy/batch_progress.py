"""How far a batch job is: a bar on a terminal, a line now and then in a job's log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from deploy.openai_api.batch import LineDone

LOG_INTERVAL_S = 30.0


class BatchProgress:
    """Counts lines. Use as a context manager."""

    def __init__(self, console: Console, total_bytes: int) -> None:
        self.done = self.failed = self.skipped = self.tokens = self._bytes = 0
        self._console, self._total = console, total_bytes
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=total_bytes)
        self._logged = time.monotonic()

    def advance(self, line: LineDone) -> None:
        self.done, self.failed, self.skipped = self.done + (not line.skipped), self.failed + line.failed, self.skipped + line.skipped
        self.tokens, self._bytes = self.tokens + line.tokens, self._bytes + line.read_bytes
        self._bar.update(self._task, advance=line.read_bytes, description=self.summary())
        if not self._console.is_terminal and time.monotonic() - self._logged > LOG_INTERVAL_S:
            self._logged = time.monotonic()
            self._console.print(f"{100 * self._bytes / max(1, self._total):.0f} %: {self.summary()}")

    def summary(self) -> str:
        earlier = f", {self.skipped} done before" if self.skipped else ""
        return f"{self.done} requests done, {self.failed} of them failed, {self.tokens} tokens{earlier}"

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
