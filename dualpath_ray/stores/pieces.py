"""Pieces of files and memory that belong together, and moving one with plain system calls.

With direct I/O (`O_DIRECT`) the kernel wants address, offset and length to be whole pages; what is not goes through a bounce
buffer of the calling thread.
"""

from __future__ import annotations

import os
import threading
from typing import Literal, NamedTuple

from dualpath_ray.stores.base import Bytes
from dualpath_ray.transfer.memory import PAGE_BYTES, allocate, round_up

BOUNCE_BYTES = 1 << 20
Operation = Literal["READ", "WRITE"]
_local = threading.local()


class Piece(NamedTuple):
    """`memory` (uint8, contiguous) and the bytes of file `fd` from `offset` on, as many."""

    fd: int
    offset: int
    memory: Bytes


def aligned(piece: Piece) -> bool:
    return not (piece.offset % PAGE_BYTES or piece.memory.nbytes % PAGE_BYTES or piece.memory.ctypes.data % PAGE_BYTES)


def move_piece(operation: Operation, piece: Piece, direct: bool) -> None:
    """Move one piece, whole. Raises OSError, or EOFError when the file ends too early.

    A direct write must begin at a page of the file; its last page is filled up with zeros.
    """
    if not piece.memory.nbytes:
        return
    if direct and not aligned(piece):
        _move_bounced(operation, piece)
    else:
        _move_whole(operation, piece.fd, piece.offset, piece.memory)


def _move_whole(operation: Operation, fd: int, offset: int, memory: Bytes) -> None:
    view = memory.data
    done = 0
    while done < len(view):
        moved = os.preadv(fd, [view[done:]], offset + done) if operation == "READ" else os.pwritev(fd, [view[done:]], offset + done)
        done += moved
        # Direct I/O cannot go on from the middle of a page, so ask for the end of the file rather than run into it.
        if moved == 0 or (operation == "READ" and done < len(view) and os.fstat(fd).st_size <= offset + done):
            raise EOFError(f"the file ends {len(view) - done} bytes too early")


def _move_bounced(operation: Operation, piece: Piece) -> None:
    bounce = getattr(_local, "bounce", None)
    if bounce is None:
        bounce = _local.bounce = allocate(BOUNCE_BYTES)
    start, stop = piece.offset, piece.offset + piece.memory.nbytes
    if operation == "WRITE" and start % PAGE_BYTES:
        raise ValueError("a direct write must begin at a page of the file")
    page = start - start % PAGE_BYTES
    while page < stop:
        window = bounce[: min(round_up(stop - page, PAGE_BYTES), BOUNCE_BYTES)]
        low, high = max(start, page), min(stop, page + window.nbytes)
        inside, outside = window[low - page : high - page], piece.memory[low - start : high - start]
        if operation == "READ":
            _move_whole(operation, piece.fd, page, window)
            outside[:] = inside
        else:
            inside[:] = outside
            window[high - page :] = 0
            _move_whole(operation, piece.fd, page, window)
        page += window.nbytes
