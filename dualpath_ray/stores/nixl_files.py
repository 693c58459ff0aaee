"""File transfers by one of NIXL's backends for files: one agent, and the one thread that uses it.

What was measured with the POSIX backend of NIXL 1.5.1 and is relied on: a transfer makes progress only while it is posted or looked
at, hence the polling; a transfer reports its own failure only when each of its other I/Os has landed or has been cancelled (tests pin
this down); posting more than `ios_pool_size` I/Os at once breaks the backend for good, hence `MAX_PIECES`; registering a file costs 2-5 us.

A device with a short queue idles between the end of a transfer and the beginning of the next. So callers may ask for more than may be under
way: the thread begins the next, which is ready by then, as soon as it sees one end, without waiting for whoever asked for that one.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dualpath_ray.errors import StoreError
from dualpath_ray.stores.base import Bytes
from dualpath_ray.stores.pieces import Operation, Piece
from dualpath_ray.transfer import nixl_api

log = logging.getLogger(__name__)

MAX_PIECES = 32_768  # in flight, of the 65,536 that NIXL's queue holds
POLL_SECONDS = 0.0001


@dataclass(slots=True, eq=False)
class OpenFiles:
    """Files registered with NIXL, and closed by `NixlFiles.release`."""

    fds: list[int]
    registration: Any = None


@dataclass(slots=True, eq=False)
class _Transfer:
    """`memory` and `files` are uint64 `[pieces, 3]` as NIXL wants them: address or offset, length, device or file."""

    operation: Operation
    memory: npt.NDArray[np.uint64]
    files: npt.NDArray[np.uint64]
    nbytes: int
    future: Future[None] = field(default_factory=Future)
    handle: Any = None


class NixlFiles:
    """Moves pieces of registered memory to and from registered files. All methods may be called from any thread.

    `backend` is a NIXL plug-in for files (POSIX, HF3FS, GDS), `parameters` are its own. `max_bytes` may be under way at once (or one
    transfer, if larger); what is asked for beyond that waits. Raises StoreError when NIXL is missing or the backend cannot start.
    """

    def __init__(self, name: str, backend: str, parameters: Mapping[str, str], max_bytes: int | None = None) -> None:
        self._name = name
        self._max_bytes = max_bytes
        self._backend, self._parameters = backend, dict(parameters)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[_Transfer] = deque()
        self._posted: list[_Transfer] = []
        self._pieces_posted = self._bytes_posted = 0
        self._arenas: list[tuple[int, int, Bytes]] = []  # first address, last + 1, and the array to keep it mapped
        self._stopping = False
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name=f"{name}-nixl", daemon=True)
        self._thread.start()
        started.result()

    def register(self, arena: Bytes) -> None:
        """Make memory usable in transfers; returns when it is."""
        done: Future[None] = Future()

        def register() -> None:
            try:
                address = arena.ctypes.data
                self._agent.register_memory([(address, arena.nbytes, 0, "")], "DRAM", [self._backend])
                self._arenas.append((address, address + arena.nbytes, arena))
                done.set_result(None)
            except Exception as error:
                done.set_exception(StoreError(f"NIXL cannot register {arena.nbytes} bytes of memory: {error}"))

        self._inbox.put(register)
        done.result()

    def covers(self, memory: Bytes) -> bool:
        start = memory.ctypes.data
        return any(low <= start and start + memory.nbytes <= high for low, high, _ in self._arenas)

    def adopt(self, fds: list[int], file_bytes: int) -> OpenFiles:
        """Register open files of `file_bytes` each; they belong to this object until `release`. Never fails: transfers would."""
        files = OpenFiles(fds)
        if not fds:
            return files

        def adopt() -> None:
            try:
                files.registration = self._agent.register_memory([(0, file_bytes, fd, "") for fd in fds], "FILE", [self._backend])
            except Exception as error:
                log.warning("%s: NIXL cannot register %d files: %s", self._name, len(fds), error)

        self._inbox.put(adopt)
        return files

    def release(self, files: OpenFiles) -> None:
        """Deregister and close files that no transfer uses any more."""

        def release() -> None:
            if files.registration is not None:
                self._agent.deregister_memory(files.registration)
            for fd in files.fds:
                os.close(fd)

        self._inbox.put(release)

    def transfer(self, operation: Operation, pieces: Sequence[Piece]) -> Future[None]:
        """Move pieces; the future raises StoreError, without saying which of them failed, when none is under way any more."""
        memory = np.array([(piece.memory.ctypes.data, piece.memory.nbytes, 0) for piece in pieces], dtype=np.uint64)
        files = np.array([(piece.offset, piece.memory.nbytes, piece.fd) for piece in pieces], dtype=np.uint64)
        transfer = _Transfer(operation, memory, files, int(memory[:, 1].sum()))
        self._inbox.put(lambda: self._waiting.append(transfer))
        return transfer.future

    def close(self) -> None:
        """End after all transfers and releases asked for so far."""

        def stop() -> None:
            self._stopping = True

        self._inbox.put(stop)
        self._thread.join()

    # ---- on the thread

    def _run(self, started: Future[None]) -> None:
        try:
            self._agent = nixl_api.make_agent(self._name)
            self._agent.create_backend(self._backend, self._parameters)
        except Exception as error:
            how = f" ({', '.join(self._parameters)})" if self._parameters else ""
            advice = (
                "" if self._backend == "POSIX" else f"; is its plug-in libplugin_{self._backend}.so in NIXL_PLUGIN_DIR, and what it needs?"
            )
            why = str(error) or type(error).__name__
            started.set_exception(StoreError(f"NIXL's {self._backend} backend{how} cannot start: {why}{advice}"))
            return
        started.set_result(None)
        while not (self._stopping and not self._waiting and not self._posted and self._inbox.empty()):
            self._take_commands()
            self._check_posted()
            self._post_waiting()
        del self._agent

    def _take_commands(self) -> None:
        """Sleeps until there is a command, or for a moment while transfers are under way."""
        busy = bool(self._posted or self._waiting) or self._stopping
        try:
            command = self._inbox.get(timeout=POLL_SECONDS) if busy else self._inbox.get()
            while True:
                command()
                command = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _post_waiting(self) -> None:
        """Begin what may begin, and make the one after that ready."""
        while self._waiting:
            transfer = self._waiting[0]
            try:
                self._prepare(transfer)
                if self._posted and not self._fits(transfer):
                    return
                self._agent.transfer(transfer.handle)
            except Exception as error:
                self._waiting.popleft()
                self._end(transfer, error)
                continue
            self._waiting.popleft()
            self._posted.append(transfer)
            self._pieces_posted += len(transfer.memory)
            self._bytes_posted += transfer.nbytes

    def _fits(self, transfer: _Transfer) -> bool:
        if self._max_bytes is not None and self._bytes_posted + transfer.nbytes > self._max_bytes:
            return False
        return self._pieces_posted + len(transfer.memory) <= MAX_PIECES

    def _prepare(self, transfer: _Transfer) -> None:
        if transfer.handle is not None:
            return
        if len(transfer.memory) > MAX_PIECES:
            raise ValueError(f"{len(transfer.memory)} pieces in one transfer; at most {MAX_PIECES} may be")
        agent = self._agent
        local, remote = agent.get_xfer_descs(transfer.memory, "DRAM"), agent.get_xfer_descs(transfer.files, "FILE")
        transfer.handle = agent.initialize_xfer(transfer.operation, local, remote, self._name, backends=[self._backend])

    def _check_posted(self) -> None:
        for transfer in list(self._posted):
            failure: Exception | None = None
            try:
                if self._agent.check_xfer_state(transfer.handle) != "DONE":
                    continue
            except Exception as error:
                failure = error
            self._posted.remove(transfer)
            self._pieces_posted -= len(transfer.memory)
            self._bytes_posted -= transfer.nbytes
            self._end(transfer, failure)

    def _end(self, transfer: _Transfer, failure: Exception | None) -> None:
        if transfer.handle is not None:
            transfer.handle.release()
        if failure is None:
            transfer.future.set_result(None)
        else:
            transfer.future.set_exception(StoreError(f"NIXL file transfer failed: {failure or type(failure).__name__}"))
