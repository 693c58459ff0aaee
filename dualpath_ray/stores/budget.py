"""How full a store is believed to be, so that writers stop before the collector has caught up."""

from __future__ import annotations

import threading

from dualpath_ray.stores.inventory import Usage


class Budget:
    """Bytes of a shared place: what was last published, and what this process and others have written since. Thread safe.

    Others say what they have written each time they look, so the bound can be overshot by what they write between two looks.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._published = 0
        self._number = 0
        self._written = 0
        self._since_look = 0
        self._others = 0

    @property
    def used_bytes(self) -> int:
        return self._published + self._written + self._others

    @property
    def written_bytes(self) -> int:
        """By this process, since the last publication that it knows."""
        return self._written

    def take(self, nbytes: int) -> bool:
        """Account for bytes about to be written; False, and nothing taken, if they do not fit."""
        with self._lock:
            if self.capacity_bytes is not None and self.used_bytes + nbytes > self.capacity_bytes:
                return False
            self._written += nbytes
            self._since_look += nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        """Bytes taken were not written after all, or have been removed."""
        with self._lock:
            self._written -= nbytes
            self._since_look -= nbytes

    def learn(self, usage: Usage, others: int = 0) -> None:
        """Look at the latest publication, and at what `others` say they have written since.

        What was written here since the look before may not be in the publication (listing takes time), so it still counts.
        """
        with self._lock:
            if usage.number != self._number:
                self._number, self._published, self._written = usage.number, usage.nbytes, self._since_look
            self._since_look, self._others = 0, others
