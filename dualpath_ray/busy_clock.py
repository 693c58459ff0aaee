"""How long something has been under way: over time, the utilisation of whatever does it."""

from __future__ import annotations

import time


class BusyClock:
    """Counts work that begins and ends, and the seconds since start in which there was any.

    One thread adds and takes; any may read.
    """

    __slots__ = ("_past_s", "_since", "amount")

    def __init__(self) -> None:
        self.amount = 0
        """What is under way, in the unit of `add`."""
        self._past_s = self._since = 0.0

    def add(self, amount: int) -> None:
        if amount and not self.amount:
            self._since = time.monotonic()
        self.amount += amount

    def take(self, amount: int) -> None:
        self.amount -= amount
        if amount and not self.amount:
            self._past_s += time.monotonic() - self._since
            self._since = 0.0

    def seconds(self) -> float:
        since = self._since
        return self._past_s + (time.monotonic() - since if since else 0.0)
