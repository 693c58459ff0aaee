"""The durable, atomic commit of some blocks to a directory: temporary file, data, fsync, rename, fsync of the directory.

A crash at any point leaves each block either absent or whole. Writers of one key do not exclude each other: the key commits
to the bytes, so whoever renames last puts the same block in place.

What a commit of small blocks waits for is the device: each sync is a flush, and on a file system with a journal a commit of that. Both are
merged when they are asked for at the same time. So the syncs of a commit run in parallel, and the directories of one are synced
together with the data of the next, if another one follows.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dualpath_ray.errors import BlockCorruptError, StoreError
from dualpath_ray.stores.base import BlockBuffer, Bytes
from dualpath_ray.stores.block_format import BlockFormat
from dualpath_ray.stores.file_io import FileIO, PieceError
from dualpath_ray.stores.layout import DirectoryLayout, fsync_directory
from dualpath_ray.stores.pieces import Piece
from dualpath_ray.transfer.memory import allocate

SYNC_THREADS = 32  # they wait for the device, all at once
ADVICE = {
    errno.ENOSPC: "free space on the file system",
    errno.EDQUOT: "raise the quota or free space",
    errno.EROFS: "the file system has become read-only",
    errno.EACCES: "give the gateway's user write permission",
    errno.EPERM: "give the gateway's user write permission",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "check the device",
}


def store_error(action: str, error: OSError | EOFError) -> StoreError:
    reason = getattr(error, "strerror", None) or str(error)
    advice = ADVICE.get(getattr(error, "errno", 0) or 0)
    return StoreError(f"{action} failed: {reason}" + (f"; {advice}" if advice else ""))


@dataclass(slots=True, eq=False)
class Commit:
    """Blocks that have got their names. `outcomes` has one per block: None when it is durable, provided that this commit has been
    finished, else a StoreError. `existing` numbers those that were there before.
    """

    outcomes: list[Exception | None]
    existing: set[int] = field(default_factory=set)
    unsynced: dict[Path, list[int]] = field(default_factory=dict)  # directories and, by number, the blocks that were named in them


@dataclass(slots=True, eq=False)
class _Draft:
    """A block being written."""

    index: int
    block: BlockBuffer
    temporary: Path
    fd: int
    pieces: tuple[Piece, Piece]


class Committer:
    """Writes blocks under their names, at most `max_blocks` in a commit and `max_commits` at once.

    Without `sync` nothing waits for the device: a block is there for everybody, and survives the process, but not a loss of power.

    `on_step` is called after each step with the step's name (tests kill the process there); after the sync of data, once per block.
    """

    def __init__(
        self, format: BlockFormat, layout: DirectoryLayout, file_io: FileIO, max_blocks: int, max_commits: int, sync: bool = True
    ) -> None:
        self._sync = sync
        self._format = format
        self._layout = layout
        self._file_io = file_io
        # Headers in registered memory go out with the data; one by one, each would wait behind megabytes in the device's queue.
        headers = allocate(max_commits * max_blocks * format.header_bytes)
        file_io.register(headers)
        self._headers: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for each in headers.reshape(max_commits, max_blocks, format.header_bytes):
            self._headers.put(each)
        self._syncers = ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="store-sync")
        self.on_step: Callable[[str], None] | None = None

    def commit(self, blocks: Sequence[BlockBuffer], before: Commit | None = None) -> Commit:
        """Write blocks and give them their names; `finish` makes the names durable. Commit `before` is finished on the way."""
        commit = Commit([None] * len(blocks))
        headers = self._headers.get()
        try:
            drafts = self._create(blocks, commit, headers)
            self._step("created")
            files = self._file_io.adopt([draft.fd for draft in drafts], self._format.file_bytes)
            try:
                drafts = self._write(drafts, commit.outcomes)
                self._step("written")
                end_syncs = self._sync_directories(before) if before is not None else None
                drafts = self._each(drafts, commit.outcomes, self._sync_and_rename)
                self._step("renamed")
                if end_syncs is not None:
                    end_syncs()
            finally:
                self._file_io.release(files)
        finally:
            self._headers.put(headers)
        for draft in drafts if self._sync else ():
            commit.unsynced.setdefault(draft.temporary.parent, []).append(draft.index)
        return commit

    def finish(self, commit: Commit) -> None:
        """Make the names of a commit durable, unless they are. Blocks whose directory cannot be synced get an outcome that says so."""
        if commit.unsynced:
            self._sync_directories(commit)()
            self._step("directories synced")

    def holds(self, block: BlockBuffer) -> bool:
        """Whether a sound file of that block is in place already (its header is checked, its data is not). It counts as used then, so
        that no collector removes it because it had not been for long.
        """
        try:
            with open(self._layout.path(block.key), "rb", buffering=0) as file:
                page = file.read(self._format.header_bytes) or b""
                self._format.check(page, os.fstat(file.fileno()).st_size, block.key, block.parent)
                os.utime(file.fileno())
        except (OSError, BlockCorruptError):
            return False
        return True

    def close(self) -> None:
        self._syncers.shutdown()

    def _create(self, blocks: Sequence[BlockBuffer], commit: Commit, headers: Bytes) -> list[_Draft]:
        size, outcomes = self._format.header_bytes, commit.outcomes
        drafts: list[_Draft] = []
        for index, block in enumerate(blocks):
            if self.holds(block):
                commit.existing.add(index)
                if self._sync:  # whoever put it there may not have synced its name yet
                    commit.unsynced.setdefault(self._layout.path(block.key).parent, []).append(index)
                continue
            header = self._format.encode(block.key, block.parent, self._format.checksums(block.data))
            headers[index] = np.frombuffer(header, dtype=np.uint8)
            temporary = self._layout.temporary(block.key)
            fd = -1
            try:
                fd = self._open(block, temporary)
                os.posix_fallocate(fd, 0, self._format.file_bytes)
            except OSError as error:
                outcomes[index] = store_error(f"creating a file for block {block.key.hex()} in {temporary.parent}", error)
            except StoreError as error:
                outcomes[index] = error
            if outcomes[index] is None:
                drafts.append(_Draft(index, block, temporary, fd, (Piece(fd, 0, headers[index]), Piece(fd, size, block.data))))
            elif fd >= 0:
                os.close(fd)
                self._discard(temporary)
        return drafts

    def _open(self, block: BlockBuffer, temporary: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            return self._file_io.open(temporary, flags)
        except FileNotFoundError:
            self._layout.make_shard(block.key)
            return self._file_io.open(temporary, flags)

    def _write(self, drafts: list[_Draft], outcomes: list[Exception | None]) -> list[_Draft]:
        """All at once; should that fail, one by one, so that each block gets its own outcome."""
        try:
            self._file_io.move("WRITE", [piece for draft in drafts for piece in draft.pieces])
            return drafts
        except PieceError:
            return self._each(drafts, outcomes, lambda draft: self._file_io.move("WRITE", draft.pieces))

    def _each(self, drafts: list[_Draft], outcomes: list[Exception | None], act: Callable[[_Draft], None]) -> list[_Draft]:
        """Do something to each draft, in parallel; drafts that fail are discarded. Returns the others."""

        def attempt(draft: _Draft) -> bool:
            try:
                act(draft)
                return True
            except (OSError, PieceError) as error:
                cause = error.cause if isinstance(error, PieceError) else error
                outcomes[draft.index] = store_error(f"writing block {draft.block.key.hex()} to {draft.temporary.parent}", cause)
                self._discard(draft.temporary)
                return False

        return [draft for draft, done in zip(drafts, self._syncers.map(attempt, drafts), strict=True) if done]

    def _sync_and_rename(self, draft: _Draft) -> None:
        if self._sync:
            os.fdatasync(draft.fd)
        self._step("synced")
        os.rename(draft.temporary, self._layout.path(draft.block.key))

    def _sync_directories(self, commit: Commit) -> Callable[[], None]:
        """Begin to sync the directories of a commit; what is returned waits until that has ended."""
        syncs = {folder: self._syncers.submit(fsync_directory, folder) for folder in commit.unsynced}

        def end() -> None:
            for folder, sync in syncs.items():
                try:
                    sync.result()
                except OSError as error:
                    for index in commit.unsynced[folder]:
                        commit.outcomes[index] = store_error(f"making a block durable in {folder}", error)
            commit.unsynced.clear()

        return end

    def _discard(self, temporary: Path) -> None:
        with contextlib.suppress(OSError):
            temporary.unlink()

    def _step(self, name: str) -> None:
        if self.on_step is not None:
            self.on_step(name)
