"""What has happened in the cluster lately, for people: deaths, restarts, scaling. Soft like the rest of the scheduler's state."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Literal

KEPT = 200

Kind = Literal["joined", "died", "hung", "lost", "corrupt", "draining", "resumed", "left", "scaling"]


@dataclass(frozen=True, slots=True)
class Event:
    """`at` is in seconds since the epoch; `who` an engine, a node or a request."""

    at: float
    kind: Kind
    who: str
    text: str


class EventLog:
    """The last events, oldest first."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT)

    def note(self, kind: Kind, who: str, text: str) -> None:
        self._events.append(Event(time.time(), kind, who, text))

    def documents(self) -> list[dict[str, Any]]:
        return [asdict(event) for event in self._events]
