"""A store within its budget, over a directory and over a bucket: what goes, in which order, who decides, and who is told first."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dualpath_ray.errors import BlockMissingError, StoreError
from dualpath_ray.kv.keys import ROOT_TAG
from dualpath_ray.stores.base import BlockBuffer, BlockStore
from dualpath_ray.stores.collector import Collector, CollectorSettings, NoIndex, Round
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from dualpath_ray.stores.directory_inventory import DirectoryInventory
from dualpath_ray.stores.inventory import Entry, Inventory, Usage
from dualpath_ray.stores.s3 import S3Settings, S3Store
from tests.unit.stores.conftest import FINGERPRINT, PAGED, OpenStore, block_path, emptied, make_blocks

SIZE = 4096 + PAGED.full_block_bytes  # header page and payload


def chain(count: int, seed: int) -> list[BlockBuffer]:
    """A chain that begins at a root."""
    blocks = make_blocks(PAGED, count, seed)
    return [BlockBuffer(blocks[0].key, ROOT_TAG + blocks[0].parent[4:], blocks[0].data), *blocks[1:]]


@pytest.fixture(params=["directory", "s3"])
def open_any(request: pytest.FixtureRequest, tmp_path: Path, open_store: OpenStore) -> Any:
    """Opens stores of one kind over one place."""
    if request.param == "directory":
        yield lambda **settings: open_store(**settings)
        return
    pytest.importorskip("obstore")
    from obstore.store import MemoryStore

    bucket, stores = MemoryStore(), []

    def open_one(**settings: Any) -> S3Store:
        settings.pop("use_resolution_s", None)
        stores.append(S3Store(PAGED, FINGERPRINT, S3Settings("bucket", **settings), bucket))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


class Index:
    """Notes what the collector says, and what was still readable at that moment."""

    def __init__(self, inventory: Inventory, answer: bool = True) -> None:
        self.inventory, self.answer = inventory, answer
        self.forgotten: list[bytes] = []
        self.restored: list[bytes] = []
        self.readable = True

    def forget(self, entries: Sequence[Entry]) -> bool:
        self.forgotten = [entry.key for entry in entries]
        self.readable = all(self.inventory.content(entry) for entry in entries)
        return self.answer

    def restore(self, entries: Sequence[Entry]) -> None:
        self.restored += [entry.key for entry in entries]


def collect(inventory: Inventory, capacity: int | None, index: Any = None, **settings: Any) -> Round:
    options = CollectorSettings(capacity, grace_s=0.0, **settings)
    return Collector(inventory, options, index or NoIndex()).collect()


def fill(store: BlockStore, *chains: list[BlockBuffer]) -> None:
    for blocks in chains:
        assert store.write(blocks).result(10) == [None] * len(blocks)


def keys_of(inventory: Inventory) -> set[bytes]:
    return {entry.key for entry in inventory.entries()}


def test_within_its_budget_a_store_keeps_everything(open_any: Callable[..., BlockStore]) -> None:
    store = open_any()
    fill(store, chain(4, 1))
    inventory = store.inventory()
    done = collect(inventory, 100 * SIZE)
    assert (done.blocks, done.evicted_blocks, done.skipped) == (4, 0, "")
    usage = inventory.usage()
    assert usage is not None
    assert (usage.blocks, usage.nbytes) == (4, done.nbytes)


def test_the_index_hears_first_and_ends_of_chains_go(open_any: Callable[..., BlockStore]) -> None:
    store = open_any()
    blocks = chain(10, 1)
    fill(store, blocks)
    inventory = store.inventory()
    index = Index(inventory)
    capacity = inventory_bytes(inventory) * 6 // 10
    done = collect(inventory, capacity, index)
    assert index.readable, "bytes were gone before the index was told"
    assert done.evicted_blocks == len(index.forgotten) == 5  # down to 90 % of six
    assert keys_of(inventory) == {block.key for block in blocks[:5]}
    assert index.forgotten == [block.key for block in reversed(blocks[5:])]
    usage = inventory.usage()
    assert usage is not None and usage.nbytes <= 0.9 * capacity
    with pytest.raises(BlockMissingError):
        store.open(emptied(blocks)).result(10)
    reader = store.open(emptied(blocks[:5])).result(10)
    reader.read(0, PAGED.layers).result(10)
    reader.close()


def inventory_bytes(inventory: Inventory) -> int:
    return sum(entry.nbytes for entry in inventory.entries())


def test_nothing_is_removed_when_the_index_does_not_answer(open_any: Callable[..., BlockStore]) -> None:
    store = open_any()
    fill(store, chain(10, 1))
    inventory = store.inventory()
    assert collect(inventory, 5 * SIZE, Index(inventory, answer=False)).evicted_blocks == 0
    assert len(keys_of(inventory)) == 10


def test_a_reader_that_has_opened_its_blocks_is_right_or_misses(open_any: Callable[..., BlockStore]) -> None:
    """A directory's open files stay readable; a bucket's objects are missing, which is a miss."""
    store = open_any()
    blocks = chain(4, 1)
    fill(store, blocks)
    copies = emptied(blocks)
    reader = store.open(copies).result(10)
    assert collect(store.inventory(), SIZE).evicted_blocks == 4
    try:
        reader.read(0, PAGED.layers).result(10)
        assert all((copy.data == block.data).all() for copy, block in zip(copies, blocks, strict=True))
    except BlockMissingError:
        assert isinstance(store, S3Store)
    reader.close()


def test_only_one_collects(open_any: Callable[..., BlockStore]) -> None:
    store = open_any()
    fill(store, chain(4, 1))
    first, second = store.inventory(), store.inventory()
    with first.collecting() as alone:
        assert alone
        assert collect(second, SIZE).skipped == "another process is collecting"
    assert collect(second, SIZE).evicted_blocks == 4


def test_orphans_and_what_crashes_left_are_swept(open_any: Callable[..., BlockStore]) -> None:
    store = open_any()
    blocks = chain(6, 1)
    fill(store, blocks)
    store.remove(blocks[2].key)
    inventory = store.inventory()
    assert collect(inventory, None, orphan_age_s=3600).evicted_blocks == 0, "its parent may be on its way"
    done = collect(inventory, None, orphan_age_s=-3600)
    assert (done.evicted_blocks, done.orphan_blocks) == (3, 3)
    assert keys_of(inventory) == {block.key for block in blocks[:2]}


def test_a_full_store_refuses_writes_and_counts_them(open_any: Callable[..., BlockStore]) -> None:
    store = open_any(capacity_bytes=6 * SIZE)
    fill(store, chain(5, 1))
    with pytest.raises(StoreError, match="capacity_bytes") as refused:
        store.write(chain(5, 2)).result(10)
    assert refused.value.retryable
    assert store.stats()["refused_writes"] == 5
    assert store.write(chain(5, 1)[:1]).result(10) == [None], "a block that is there needs no room"
    assert store.budget.used_bytes <= 5 * SIZE
    inventory = store.inventory()
    assert collect(inventory, 4 * SIZE).evicted_blocks > 0
    usage = inventory.usage()
    assert usage is not None
    store.budget.learn(usage)
    assert store.budget.used_bytes >= 5 * SIZE, "its own writes may not have been seen by the collector"
    collect(inventory, None)
    usage = inventory.usage()
    assert usage is not None
    store.budget.learn(usage)
    fill(store, chain(2, 3))


def test_gateways_learn_what_others_found(open_any: Callable[..., BlockStore]) -> None:
    first, second = open_any(capacity_bytes=6 * SIZE), open_any(capacity_bytes=6 * SIZE)
    fill(first, chain(5, 1))
    collect(first.inventory(), None)
    usage = second.inventory().usage()
    assert usage is not None
    second.budget.learn(usage)
    second.budget.learn(usage)
    with pytest.raises(StoreError):
        second.write(chain(4, 2)).result(10)
    third = open_any(capacity_bytes=6 * SIZE)
    second.inventory().note_written("second", usage.number, SIZE)
    assert third.inventory().written_by_others("second", usage.number) == 0
    third.budget.learn(usage, third.inventory().written_by_others("third", usage.number))
    assert third.budget.used_bytes == usage.nbytes + SIZE
    collect(first.inventory(), None)
    collect(first.inventory(), None)
    assert third.inventory().written_by_others("third", usage.number) == 0, "notes about earlier publications are removed"


# ---- what a directory does


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_reading_and_writing_again_is_a_use(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    old, read, written, touched = (chain(2, seed) for seed in range(4))
    fill(store, old, read, written, touched)
    for block in (*old, *read, *written, *touched):
        age(block_path(tmp_path / "store", block.key), 1000)
    store.open(emptied(read)).result(10).close()
    fill(store, written)
    store.touch([block.key for block in touched])
    inventory = store.inventory()
    collect(inventory, inventory_bytes(inventory) * 17 // 20)
    assert keys_of(inventory) == {block.key for block in (*read, *written, *touched)}


def test_a_block_used_after_the_plan_stays_with_its_parents(open_store: OpenStore, tmp_path: Path) -> None:
    """Another gateway has just written it again, or read it, when its turn to be removed comes."""
    store = open_store()
    blocks = chain(4, 1)
    fill(store, blocks)
    for block in blocks:
        age(block_path(tmp_path / "store", block.key), 1000)
    inventory = store.inventory()

    class Busy(Index):
        def forget(self, entries: Sequence[Entry]) -> bool:
            store.open(emptied(blocks[1:2])).result(10).close()
            return super().forget(entries)

    index = Busy(inventory)
    done = collect(inventory, SIZE, index)
    assert (done.evicted_blocks, done.kept_blocks) == (2, 2)
    assert keys_of(inventory) == {block.key for block in blocks[:2]}
    assert set(index.restored) == {block.key for block in blocks[:2]}


def test_removal_waits_for_loads(open_store: OpenStore) -> None:
    store = open_store(read_threads=1)
    fill(store, chain(8, 1))
    gate, begun = threading.Event(), threading.Event()

    def long_read() -> None:
        begun.set()
        gate.wait(30)

    store.submit_reads([long_read])
    assert begun.wait(10)
    inventory = store.inventory()
    collector = Collector(inventory, CollectorSettings(SIZE, grace_s=0.0), NoIndex(), store.wait_idle)
    rounds: list[Round] = []
    thread = threading.Thread(target=lambda: rounds.append(collector.collect()))
    thread.start()
    time.sleep(0.3)
    assert len(list(store.scan())) == 8, "blocks were removed while a read was under way"
    gate.set()
    thread.join(30)
    assert rounds[0].evicted_blocks == 8


def test_temporary_and_damaged_files_are_swept_when_old(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    (block,) = chain(1, 1)
    fill(store, [block])
    path = block_path(tmp_path / "store", block.key)
    damaged = path.with_name(f"{path.name[:2]}{'0' * 30}.kv1")
    leftover, young = path.with_name(".x.kv1.tmp"), path.with_name(".y.kv1.tmp")
    for file in (damaged, leftover, young):
        file.write_bytes(b"nothing")
    age(damaged, 7200)
    age(leftover, 7200)
    done = collect(store.inventory(), None)
    assert (done.swept_files, done.damaged_files) == (2, 1)
    assert path.exists() and young.exists() and not damaged.exists() and not leftover.exists()


def test_blocks_of_other_models_share_the_budget(tmp_path: Path, open_store: OpenStore) -> None:
    mine, other = open_store(), open_store(fingerprint="model-b")
    fill(other, chain(4, 1))
    fill(mine, chain(4, 2))
    for block in chain(4, 1):
        age(block_path(tmp_path / "store", block.key), 1000)
    inventory = mine.inventory()
    assert {entry.model.split()[0] for entry in inventory.entries()} == {FINGERPRINT, "model-b"}
    done = collect(inventory, inventory_bytes(inventory) * 6 // 10)
    assert done.evicted_blocks == 4
    assert keys_of(inventory) == {block.key for block in chain(4, 2)}


def test_a_lock_dies_with_its_process(open_store: OpenStore, tmp_path: Path) -> None:
    import subprocess
    import sys

    store = open_store()
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom dualpath_ray.stores.directory_inventory import DirectoryInventory\n"
        "with DirectoryInventory(Path(sys.argv[1])).collecting() as alone:\n    print(alone, flush=True)\n    time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "True\n"
    with store.inventory().collecting() as alone:
        assert not alone
    child.kill()
    child.wait()
    child.stdout.close()
    with store.inventory().collecting() as alone:
        assert alone


def test_notes_of_another_release_are_no_notes(open_store: OpenStore, tmp_path: Path) -> None:
    inventory = open_store().inventory()
    for text in ("", "{", '{"number": 1}', "[]"):
        (tmp_path / "store" / ".usage.json").write_text(text)
        assert inventory.usage() is None
    inventory.publish(Usage(3, 4, 5, 6.0))
    assert inventory.usage() == Usage(3, 4, 5, 6.0)


def test_settings_reach_the_store(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, PAGED, FINGERPRINT, DirectorySettings(capacity_bytes=5))
    assert store.budget.capacity_bytes == 5
    store.close()
    assert isinstance(store.inventory(), DirectoryInventory)
