"""SIGINT and SIGTERM as an ordinary end of the program, with everything cleaned up."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def raise_on_signals() -> None:
    """From now on both signals raise KeyboardInterrupt in the main thread, once: cleaning up is not interrupted by another one.

    Call it again after `ray.init`, which sets a handler of its own for SIGTERM.
    """
    for number in SIGNALS:
        signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt
