"""What clients have left with the scheduler of their metrics, so that any of them can show those of all."""

from __future__ import annotations

import time

PUBLISH_S = 3.0  # how often a client does
SPEAKS_S = 4 * PUBLISH_S  # who has said nothing for longer may be gone ...
KEPT_S = 60.0  # ... and after this is forgotten


class ClientMetrics:
    """Texts by client, each until its client has been silent for KEPT_S."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, str]] = {}

    def keep(self, client: str, text: str) -> None:
        now = time.monotonic()
        self._kept[client] = (now, text)
        self._kept = {name: kept for name, kept in self._kept.items() if now - kept[0] < KEPT_S}

    def texts(self) -> dict[str, str]:
        return {name: text for name, (_, text) in self._kept.items()}

    def speaking(self) -> int:
        """How many clients have spoken lately."""
        return sum(time.monotonic() - at < SPEAKS_S for at, _ in self._kept.values())
