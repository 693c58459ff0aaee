"""Memory for transfers: whole pages of any size, and no failure where the machine has no huge ones."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dualpath_ray.config.storage import StagingSettings
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.staging import StagingBuffer, slot_bytes
from dualpath_ray.transfer.memory import HUGE_PAGE_BYTES, PAGE_BYTES, HugePages, allocate


@pytest.mark.parametrize("pages", ["off", "transparent", "reserved"])
def test_memory_is_zero_writable_and_of_the_size_asked_for(pages: HugePages) -> None:
    memory = allocate(3 * PAGE_BYTES, pages)
    assert memory.nbytes == 3 * PAGE_BYTES and memory.ctypes.data % PAGE_BYTES == 0
    assert not memory.any()
    memory[:] = 7
    assert memory.sum() == 7 * memory.nbytes


def test_without_reserved_huge_pages_the_log_says_what_is_taken_instead(caplog: pytest.LogCaptureFixture) -> None:
    if int(Path("/proc/sys/vm/nr_hugepages").read_text()):
        pytest.skip("this machine has reserved huge pages")
    with caplog.at_level(logging.WARNING):
        allocate(HUGE_PAGE_BYTES, "reserved")
    assert "transparent ones instead" in caplog.text


@pytest.mark.parametrize("block_tokens", [4, 7, 64])
def test_an_arena_never_takes_more_than_the_bytes_of_the_configuration(block_tokens: int) -> None:
    """Slots are whole pages, so the padding counts, too."""
    geometry = KVGeometry(layers=3, kv_heads=1, head_dim=8, block_tokens=block_tokens)
    limit = 1_000_003
    slots = StagingSettings(bytes=limit).slot_count(slot_bytes(geometry), 1)  # type: ignore[arg-type]
    arena = StagingBuffer(geometry, slots).arena.nbytes
    assert limit - slot_bytes(geometry) < arena <= limit
