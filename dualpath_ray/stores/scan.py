"""Listing what a directory holds, to rebuild the index: every file's header is read and checked, none of the data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dualpath_ray.errors import BlockCorruptError
from dualpath_ray.stores.base import StoredBlock
from dualpath_ray.stores.block_format import BlockFormat, decode_header, peek_header_bytes
from dualpath_ray.stores.counters import Counters
from dualpath_ray.stores.layout import TEMPORARY, DirectoryLayout
from dualpath_ray.transfer.memory import PAGE_BYTES

THREADS = 8


class Scan:
    """Goes over a directory once. Counts `foreign_files` (other models, layouts, versions, or no blocks at all), `damaged_files`
    (left where they are: a write of that block replaces them) and `swept_files` (temporary files older than `temporary_age_s`).
    """

    def __init__(self, format: BlockFormat, layout: DirectoryLayout, counters: Counters, temporary_age_s: float) -> None:
        self._format = format
        self._layout = layout
        self._counters = counters
        self._temporary_age_s = temporary_age_s

    def blocks(self) -> Iterator[StoredBlock]:
        """Blocks of this format, one subdirectory after the other. Raises StoreError when the directory cannot be listed."""
        oldest = self._layout.now() - self._temporary_age_s
        with ThreadPoolExecutor(THREADS, thread_name_prefix="store-scan") as pool:
            for shard in self._layout.shards():
                named: list[tuple[Path, bytes]] = []
                for path, key in self._layout.files(shard):
                    if key is not None:
                        named.append((path, key))
                    elif path.name.endswith(TEMPORARY):
                        self._sweep(path, oldest)
                    else:
                        self._counters.add("foreign_files")
                for block in pool.map(self._look, named, chunksize=16):
                    if block is not None:
                        yield block

    def _look(self, named: tuple[Path, bytes]) -> StoredBlock | None:
        path, key = named
        try:
            with open(path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead into the data
                page = os.pread(file.fileno(), max(PAGE_BYTES, self._format.header_bytes), 0)
                header_bytes = peek_header_bytes(page, key)
                if header_bytes > len(page):  # another layout's; is it whole?
                    page = os.pread(file.fileno(), header_bytes, 0)
                header = decode_header(page, key)
                if self._format.foreign(header) is not None:
                    self._counters.add("foreign_files")
                    return None
                self._format.check(page, os.fstat(file.fileno()).st_size, key)
        except FileNotFoundError:
            return None  # removed since it was listed
        except (BlockCorruptError, OSError):
            self._counters.add("damaged_files")
            return None
        return StoredBlock(key, header.parent, self._format.payload_bytes)

    def _sweep(self, path: Path, oldest: float) -> None:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()
                self._counters.add("swept_files")
