from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dualpath_ray.stores.pieces import BOUNCE_BYTES, Piece, aligned, move_piece
from dualpath_ray.transfer.memory import PAGE_BYTES, allocate


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    yield fd
    os.close(fd)


def test_aligned() -> None:
    memory = allocate(3 * PAGE_BYTES)
    assert aligned(Piece(0, PAGE_BYTES, memory[PAGE_BYTES:]))
    assert not aligned(Piece(0, 1, memory))
    assert not aligned(Piece(0, 0, memory[1 : PAGE_BYTES + 1]))
    assert not aligned(Piece(0, 0, memory[: PAGE_BYTES + 1]))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("length", [1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, BOUNCE_BYTES, 2 * BOUNCE_BYTES + 17])
def test_direct_roundtrip_of_any_length_and_address(fd: int, length: int, shift: int) -> None:
    content = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8)
    memory = allocate(length + shift)[shift:]
    memory[:] = content
    move_piece("WRITE", Piece(fd, PAGE_BYTES, memory), direct=True)
    memory[:] = 0
    move_piece("READ", Piece(fd, PAGE_BYTES, memory), direct=True)
    assert np.array_equal(memory, content)
    offset = length // 3
    part = np.empty(length - offset, dtype=np.uint8)
    move_piece("READ", Piece(fd, PAGE_BYTES + offset, part), direct=True)
    assert np.array_equal(part, content[offset:])


def test_the_last_page_is_filled_with_zeros_not_with_what_went_by_before(fd: int) -> None:
    """Bytes of another block, perhaps another tenant's, must not end up in a file's padding."""
    move_piece("WRITE", Piece(fd, 0, np.full(3 * PAGE_BYTES - 5, 0xEE, dtype=np.uint8)), direct=True)
    os.ftruncate(fd, 0)
    move_piece("WRITE", Piece(fd, 0, np.full(100, 0xAA, dtype=np.uint8)), direct=True)
    page = allocate(PAGE_BYTES)
    move_piece("READ", Piece(fd, 0, page), direct=True)
    assert (page[:100] == 0xAA).all()
    assert not page[100:].any()


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_ends_too_early(fd: int, direct: bool) -> None:
    os.ftruncate(fd, PAGE_BYTES + 10)
    with pytest.raises(EOFError, match="too early"):
        move_piece("READ", Piece(fd, 0, allocate(2 * PAGE_BYTES)), direct)
    with pytest.raises(EOFError, match="too early"):
        move_piece("READ", Piece(fd, 4 * PAGE_BYTES, allocate(PAGE_BYTES)), direct)


def test_a_direct_write_must_begin_at_a_page(fd: int) -> None:
    with pytest.raises(ValueError, match="begin at a page"):
        move_piece("WRITE", Piece(fd, 3, np.zeros(5, dtype=np.uint8)), direct=True)
