"""How a store's files are read and written: through NIXL with direct I/O where the file system allows it, else in steps down.

The ways, best first: NIXL with io_uring and with Linux AIO, direct; NIXL with io_uring, through the page cache; plain
preadv/pwritev, direct and through the page cache. (Linux AIO is synchronous on files that are not direct, so it is not tried
there.) `choose` tries each with real bytes in the store's own directory. NIXL's backends for 3FS and for GPUDirect Storage are used only
when they are named.
"""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dualpath_ray.errors import StoreError
from dualpath_ray.stores.base import Bytes
from dualpath_ray.stores.nixl_files import NixlFiles, OpenFiles
from dualpath_ray.stores.pieces import Operation, Piece, aligned, move_piece
from dualpath_ray.transfer.memory import PAGE_BYTES, allocate

log = logging.getLogger(__name__)

Engine = Literal["nixl-uring", "nixl-aio", "nixl-hf3fs", "nixl-gds", "plain"]
Choice = Literal["auto", "nixl", "plain", "hf3fs", "gds"]
WAYS: tuple[tuple[Engine, bool], ...] = (("nixl-uring", True), ("nixl-aio", True), ("nixl-uring", False), ("plain", True), ("plain", False))
NAMED: dict[str, tuple[tuple[Engine, bool], ...]] = {  # only where they are asked for: they need a plug-in and a file system of their own
    "hf3fs": (("nixl-hf3fs", False),),
    "gds": (("nixl-gds", True), ("nixl-gds", False)),
}
BACKENDS: dict[Engine, tuple[str, dict[str, str]]] = {
    "nixl-uring": ("POSIX", {"use_uring": "true"}),
    "nixl-aio": ("POSIX", {"use_aio": "true"}),
    "nixl-hf3fs": ("HF3FS", {}),
    "nixl-gds": ("GDS", {}),
}
_names = itertools.count()


class PieceError(Exception):
    """Piece number `index` could not be moved because of `cause` (OSError, or EOFError for a file that ends too early)."""

    def __init__(self, index: int, cause: OSError | EOFError) -> None:
        super().__init__(index, cause)
        self.index = index
        self.cause = cause


class FileIO:
    """One way of moving pieces. Methods may be called from any thread; `move` blocks its caller. `max_bytes` bounds what NIXL has under
    way at once; plain calls are bounded by their callers.
    """

    def __init__(self, engine: Engine, direct: bool, max_bytes: int | None = None) -> None:
        self.engine = engine
        self.direct = direct
        self.redone = 0  # transfers that NIXL failed and plain calls were asked to do, or to explain
        self._nixl: NixlFiles | None = None
        if engine != "plain":
            name = f"store-{os.getpid()}-{uuid.uuid4().hex[:8]}-{next(_names)}"
            self._nixl = NixlFiles(name, *BACKENDS[engine], max_bytes)

    @property
    def name(self) -> str:
        return f"{self.engine}, {'direct' if self.direct else 'page cache'}"

    def register(self, arena: Bytes) -> None:
        if self._nixl is not None:
            self._nixl.register(arena)

    def open(self, path: Path | str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0), 0o644)

    def adopt(self, fds: list[int], file_bytes: int) -> OpenFiles:
        """Take over open files, which `release` closes."""
        return OpenFiles(fds) if self._nixl is None else self._nixl.adopt(fds, file_bytes)

    def release(self, files: OpenFiles) -> None:
        if self._nixl is None:
            for fd in files.fds:
                os.close(fd)
        else:
            self._nixl.release(files)

    def move(self, operation: Operation, pieces: Sequence[Piece]) -> None:
        """Move pieces of adopted files. Raises PieceError; no byte is under way any more then. Memory that was never registered
        goes by plain calls, and so does the end of a piece that is no whole page.
        """
        fast: list[tuple[int, Piece]] = []
        plain: list[tuple[int, Piece]] = []
        for index, piece in enumerate(pieces):
            body, tail = self._split(piece)
            if body is not None:
                fast.append((index, body))
            if tail is not None:
                plain.append((index, tail))
        if not fast or self._nixl is None:
            self._move_plain(operation, plain)
            return
        landed = self._nixl.transfer(operation, [piece for _, piece in fast])
        try:
            self._move_plain(operation, plain)
        finally:
            failure = landed.exception()
        if failure is not None:
            self.redone += 1
            log.debug("%s: %s; asking plain calls", self.name, failure)
            self._move_plain(operation, fast)

    def close(self) -> None:
        if self._nixl is not None:
            self._nixl.close()

    def _split(self, piece: Piece) -> tuple[Piece | None, Piece | None]:
        """What of a piece NIXL can move, and the rest."""
        if self._nixl is None or not self._nixl.covers(piece.memory):
            return None, piece
        if not self.direct or aligned(piece):
            return piece, None
        body = piece.memory.nbytes // PAGE_BYTES * PAGE_BYTES
        first = piece._replace(memory=piece.memory[:body])
        if not body or not aligned(first):
            return None, piece
        return first, Piece(piece.fd, piece.offset + body, piece.memory[body:])

    def _move_plain(self, operation: Operation, pieces: Sequence[tuple[int, Piece]]) -> None:
        for index, piece in pieces:
            try:
                move_piece(operation, piece, self.direct)
            except (OSError, EOFError) as error:
                raise PieceError(index, error) from error


def choose(folder: Path, engine: Choice, direct: Literal["auto", "on", "off"], max_bytes: int | None = None) -> FileIO:
    """The best way that works in `folder`, within what the settings allow. Raises StoreError, naming what was tried, if none does."""
    failures: list[str] = []
    for candidate, is_direct in NAMED.get(engine, WAYS):
        allowed = engine == "auto" or engine in NAMED or candidate.startswith(engine)
        if not allowed or direct == ("off" if is_direct else "on"):
            continue
        try:
            file_io = FileIO(candidate, is_direct, max_bytes)
        except StoreError as error:
            if str(error) not in failures:
                failures.append(str(error))
            continue
        try:
            _prove(file_io, folder / f".{uuid.uuid4().hex}.probe.tmp")
            return file_io
        except (OSError, StoreError) as error:
            failures.append(f"{file_io.name}: {error}")
            file_io.close()
    raise StoreError(f"no way of file I/O works in {folder} with io={engine}, direct={direct}: {'; '.join(failures)}")


def _prove(file_io: FileIO, path: Path) -> None:
    """Write and read back some pages. Raises OSError or StoreError."""
    memory = allocate(4 * PAGE_BYTES)
    file_io.register(memory)
    try:
        files = file_io.adopt([file_io.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)], memory.nbytes)
        try:
            memory[:] = 0xA5
            file_io.move("WRITE", [Piece(files.fds[0], 0, memory)])
            memory[:] = 0
            file_io.move("READ", [Piece(files.fds[0], 0, memory)])
        except PieceError as error:
            raise OSError(*error.cause.args) from error
        finally:
            file_io.release(files)
    finally:
        path.unlink(missing_ok=True)
    if file_io.redone or not (memory == 0xA5).all():
        raise StoreError("bytes do not come back as written")
