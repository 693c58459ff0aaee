"""SIGINT and SIGTERM as an ordinary end of the program, with everything cleaned up; and the end of a program whose Ray has died.

Whoever signals a whole group of processes (systemd by default, `timeout`, `kill -TERM -1` in a container) ends the Ray that a program has
started together with the program. What the program then asks of Ray, even to stop, waits a minute for an answer and aborts.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RAY = ("gcs_server", "raylet")
INTERRUPTED = 130  # exit status, as shells have it
LOOK_S = 0.5
GRACE_S = 5.0  # an orderly end takes its last second without Ray

_stopping = threading.Event()


def raise_on_signals() -> None:
    """From now on both signals raise KeyboardInterrupt in the main thread, once: cleaning up is not interrupted by another one."""
    for number in SIGNALS:
        signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    _stopping.set()
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def ending_with_ray(stopped: int = 0, cleanup: Callable[[], object] = lambda: None) -> Iterator[None]:
    """If a Ray that this process starts in the block dies, end the process: with status `stopped` if a signal had told it to stop, else 1.

    Ray's other processes end when their raylet has. `cleanup`, in another thread, removes what a crash would leave.
    """
    left = threading.Event()
    threading.Thread(target=_watch, args=(left, stopped, cleanup), name="ray-watch", daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _watch(left: threading.Event, stopped: int, cleanup: Callable[[], object]) -> None:
    import ray  # not before the program has set Ray's environment

    heads: list[psutil.Process] = []  # of the Ray that was connected last
    died_at: float | None = None
    while not left.wait(LOOK_S):
        if not (ray.is_initialized() or _stopping.is_set()):
            heads = []  # not there yet, or a start that failed and is tried again
        elif not heads:
            heads = [child for child in psutil.Process().children() if _lives(child)]
        if all(map(_lives, heads)):
            died_at = None
            continue
        died_at = died_at or time.monotonic()
        if time.monotonic() - died_at > GRACE_S:
            try:
                cleanup()
            finally:
                if _stopping.is_set():
                    _end(stopped, "stopped, as Ray was")
                _end(1, "Ray has died under this program; its logs say why (/tmp/ray/session_latest/logs, or RAY_TMPDIR)")


def _lives(child: psutil.Process) -> bool:
    """Whether this is one of Ray's head processes that has not ended: until it is waited for, one that has is a zombie."""
    try:
        return child.name() in RAY and child.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end(status: int, why: str) -> None:
    print(why, file=sys.__stderr__, flush=True)  # also where a program has put its own standard error elsewhere
    logging.shutdown()
    os._exit(status)
