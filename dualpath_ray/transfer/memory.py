"""Memory that transfers read and write: regions, which are arrays of Layer Blocks.

Staging slots, prefill windows and decode pools all hold Layer Blocks of one geometry, so a transfer between any two is a pair
of index lists, and descriptor lists are prepared once per region and peer.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dualpath_ray.transfer.numa import prefer_node

log = logging.getLogger(__name__)

PAGE_BYTES = 4096
MemoryKind = Literal["DRAM", "VRAM"]


HUGE_PAGE_BYTES = 2 << 20
MAP_HUGETLB = 0x40000  # Linux; Python 3.11 does not name it
HugePages = Literal["transparent", "reserved", "off"]


def allocate(nbytes: int, huge_pages: HugePages = "off", numa_node: int | None = None) -> npt.NDArray[np.uint8]:
    """Page-aligned anonymous memory, prefaulted, as uint8 `[nbytes]`. It lives as long as the array (or a view of it) does.

    Fewer, larger pages mean fewer TLB misses and shorter page lists for whoever pins or copies the memory. Pages are placed on
    `numa_node` while it has any; by default on that of the thread that calls this (Linux's policy).
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = None
    if huge_pages == "reserved":
        try:
            memory = mmap.mmap(-1, round_up(nbytes, HUGE_PAGE_BYTES), flags=flags | MAP_HUGETLB)
        except OSError as error:
            log.warning("no %d bytes of reserved huge pages (vm.nr_hugepages), transparent ones instead: %s", nbytes, error)
            huge_pages = "transparent"
    if memory is None:
        memory = mmap.mmap(-1, nbytes, flags=flags)
    if numa_node is not None:
        prefer_node(np.frombuffer(memory, dtype=np.uint8).ctypes.data, len(memory), numa_node)
    if huge_pages == "transparent":
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            log.info("the kernel gives no transparent huge pages: %s", error)
    array = np.frombuffer(memory, dtype=np.uint8)
    array[::PAGE_BYTES] = 0  # touched after the advice, so that the first transfer does not pay for page faults
    return array[:nbytes]


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Region:
    """An array of `groups * group_blocks` Layer Blocks in one process's memory, described so that peers can address it.

    Block i lies at `base + (i // group_blocks) * group_stride + (i % group_blocks) * block_bytes`. In staging a group is a slot
    (a Full Block, padded to whole pages for direct I/O), elsewhere the whole region is one group.
    """

    name: str
    base: int
    block_bytes: int
    group_blocks: int
    group_stride: int
    groups: int = 1
    kind: MemoryKind = "DRAM"
    device: int = 0

    @property
    def nbytes(self) -> int:
        return self.group_stride * self.groups

    @property
    def blocks(self) -> int:
        return self.group_blocks * self.groups

    def descriptors(self) -> npt.NDArray[np.uint64]:
        """NIXL's strided rows `[address, length, device, stride, count]`, one per group (or one for a dense region)."""
        dense = self.group_stride == self.group_blocks * self.block_bytes
        rows = 1 if dense else self.groups
        table = np.empty((rows, 5), dtype=np.uint64)
        table[:, 0] = self.base + np.arange(rows, dtype=np.uint64) * np.uint64(self.group_stride)
        table[:, 1] = self.block_bytes
        table[:, 2] = self.device
        table[:, 3] = self.block_bytes
        table[:, 4] = self.blocks if dense else self.group_blocks
        return table


def dense_region(name: str, base: int, nbytes: int, block_bytes: int, device_type: str, device: int) -> Region:
    """A region whose Layer Blocks follow each other without gaps, in the memory of a torch device."""
    kind: MemoryKind = "VRAM" if device_type == "cuda" else "DRAM"
    return Region(name, base, block_bytes, nbytes // block_bytes, nbytes, kind=kind, device=device)


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What a process tells others so that they can push to it. `agent` is unique per incarnation of a process."""

    engine_id: str
    agent: str
    metadata: bytes
    regions: tuple[Region, ...]

    def region(self, name: str) -> Region:
        for region in self.regions:
            if region.name == name:
                return region
        raise KeyError(f"{self.agent} has no region {name!r}")
