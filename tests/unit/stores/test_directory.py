from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dualpath_ray.errors import BlockCorruptError, BlockMissingError, CancelledError, ConfigError, OverloadedError, StoreError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores import commit
from dualpath_ray.stores.base import BlockBuffer, StoredBlock
from dualpath_ray.stores.directory import DirectoryStore
from dualpath_ray.transfer.memory import PAGE_BYTES, allocate, round_up
from tests.unit.stores.conftest import ODD, PAGED, OpenStore, block_path, emptied, make_blocks, temporaries

WAYS = [("nixl", "on"), ("nixl", "off"), ("plain", "on"), ("plain", "off")]


def read_all(store: DirectoryStore, blocks: list[BlockBuffer]) -> None:
    reader = store.open(blocks).result()
    try:
        reader.read(0, store.format.geometry.layers).result()
    finally:
        reader.close()


def same(left: list[BlockBuffer], right: list[BlockBuffer]) -> bool:
    return all(np.array_equal(a.data, b.data) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("geometry", [PAGED, ODD])
@pytest.mark.parametrize(("io", "direct"), WAYS)
@pytest.mark.parametrize("registered", [True, False])
def test_roundtrip(open_store: OpenStore, geometry: KVGeometry, io: str, direct: str, registered: bool) -> None:
    stride = round_up(geometry.full_block_bytes, PAGE_BYTES)
    arena = allocate(20 * stride)
    store = open_store(geometry, io=io, direct=direct, batch_bytes=3 * stride)
    if registered:
        store.register(arena)
    blocks = make_blocks(geometry, 10, memory=arena[: 10 * stride])
    assert store.write(blocks).result() == [None] * 10
    targets = [BlockBuffer(b.key, b.parent, arena[(10 + i) * stride : (10 + i) * stride + b.data.nbytes]) for i, b in enumerate(blocks)]
    read_all(store, targets)
    assert same(targets, blocks)
    values = store.stats()
    assert values["read_bytes"] == values["written_bytes"] == 10 * geometry.full_block_bytes
    assert values["redone_transfers"] == 0
    assert values["nixl"] == (io == "nixl")
    assert values["direct_io"] == (direct == "on")


def test_auto_takes_nixl_and_direct_io_where_they_work(open_store: OpenStore) -> None:
    assert open_store().file_io.name in ("nixl-uring, direct", "nixl-aio, direct")


@pytest.mark.parametrize("offset", [1, 2048])
@pytest.mark.parametrize("io", ["nixl", "plain"])
def test_buffers_that_begin_within_a_page(open_store: OpenStore, io: str, offset: int) -> None:
    store = open_store(io=io, direct="on")
    memory = allocate(5 * PAGED.full_block_bytes)
    store.register(memory)
    blocks = make_blocks(PAGED, 2, memory=memory[offset:])
    assert store.write(blocks).result() == [None, None]
    targets = [BlockBuffer(b.key, b.parent, memory[offset + (2 + i) * b.data.nbytes :][: b.data.nbytes]) for i, b in enumerate(blocks)]
    read_all(store, targets)
    assert same(targets, blocks)


@pytest.mark.parametrize("geometry", [PAGED, ODD])
def test_layer_ranges_come_alone_and_in_order(open_store: OpenStore, geometry: KVGeometry) -> None:
    store = open_store(geometry, batch_bytes=1)
    blocks = make_blocks(geometry, 8)
    store.write(blocks).result()
    targets = emptied(blocks)
    size = geometry.layer_block_bytes
    ended: list[int] = []
    reader = store.open(targets).result()
    for target in targets:
        target.data[:] = 0
    futures = []
    for layer in range(geometry.layers):
        future = reader.read(layer, layer + 1)
        future.add_done_callback(lambda _, layer=layer: ended.append(layer))
        futures.append(future)
    for future in futures:
        future.result()
    reader.close()
    assert ended == list(range(geometry.layers))
    assert same(targets, blocks)
    reader = store.open(targets).result()
    for target in targets:
        target.data[:] = 0
    reader.read(1, 3).result()
    reader.close()
    for target, block in zip(targets, blocks, strict=True):
        assert not target.data[:size].any()
        assert np.array_equal(target.data[size : 3 * size], block.data[size : 3 * size])
        assert not target.data[3 * size :].any()


def test_layer_groups(open_store: OpenStore) -> None:
    size = PAGED.layer_block_bytes
    assert open_store(PAGED, layer_groups=4, range_bytes=size).layer_groups() == 4
    assert open_store(PAGED, layer_groups=99, range_bytes=size).layer_groups() == PAGED.layers
    assert open_store(PAGED, layer_groups=99, range_bytes=2 * size).layer_groups() == PAGED.layers // 2
    assert open_store(PAGED, layer_groups=4).layer_groups() == 1, "small blocks are read whole"
    assert open_store(ODD, layer_groups=4, range_bytes=1).layer_groups() == 1


@pytest.mark.parametrize("layers", [(-1, 2), (2, 2), (3, 2), (0, 7)])
def test_impossible_layer_ranges_are_refused(open_store: OpenStore, layers: tuple[int, int]) -> None:
    store = open_store()
    blocks = make_blocks(PAGED, 1)
    store.write(blocks).result()
    reader = store.open(blocks).result()
    with pytest.raises(ValueError, match="layers"):
        reader.read(*layers)
    reader.close()


def test_nothing_to_do_is_done(open_store: OpenStore) -> None:
    store = open_store()
    assert store.write([]).result() == []
    reader = store.open([]).result()
    reader.read(0, PAGED.layers).result()
    reader.close()


def test_an_existing_block_is_a_success_and_not_written_again(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    blocks = make_blocks(PAGED, 3)
    store.write(blocks).result()
    before = os.stat(block_path(tmp_path / "store", blocks[0].key)).st_ino
    assert store.write(blocks).result() == [None] * 3
    assert os.stat(block_path(tmp_path / "store", blocks[0].key)).st_ino == before
    assert store.stats()["existing_blocks"] == 3
    assert store.stats()["written_blocks"] == 3


def test_scan_lists_own_blocks_only(open_store: OpenStore, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store = open_store()
    blocks = make_blocks(PAGED, 40)
    store.write(blocks).result()
    open_store(fingerprint="model-b").write(make_blocks(PAGED, 3, seed=1)).result()
    wide = KVGeometry(layers=300, kv_heads=1, head_dim=2, dtype="bfloat16", block_tokens=8)  # header of two pages
    open_store(wide).write(make_blocks(wide, 2, seed=2)).result()
    truncated, flipped, renamed = (block_path(folder, block.key) for block in blocks[:3])
    os.truncate(truncated, 5000)
    with open(flipped, "r+b") as file:
        file.seek(100)
        file.write(b"?")
    os.rename(renamed, renamed.with_name(f"{renamed.name[:2]}{'0' * 30}.kv1"))
    (truncated.parent / "notes.txt").write_text("not a block")
    (truncated.parent / f"{truncated.name[:32]}.kv2").write_bytes(b"from the future")
    fresh, old = truncated.parent / ".fresh.kv1.tmp", truncated.parent / ".old.kv1.tmp"
    fresh.write_bytes(b"")
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    found = set(store.scan())
    assert found == {StoredBlock(block.key, block.parent, PAGED.full_block_bytes) for block in blocks[3:]}
    values = store.stats()
    assert (values["foreign_files"], values["damaged_files"], values["swept_files"]) == (7, 3, 1)
    assert fresh.exists()
    assert not old.exists()
    assert truncated.exists(), "a scan leaves damaged files alone"


def test_a_write_replaces_a_damaged_file(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    blocks = make_blocks(PAGED, 1)
    store.write(blocks).result()
    os.truncate(block_path(tmp_path / "store", blocks[0].key), 9000)
    assert store.write(blocks).result() == [None]
    targets = emptied(blocks)
    read_all(store, targets)
    assert same(targets, blocks)


def test_missing_block(open_store: OpenStore) -> None:
    store = open_store()
    blocks = make_blocks(PAGED, 3)
    store.write(blocks).result()
    store.remove(blocks[1].key)
    store.remove(blocks[1].key)
    with pytest.raises(BlockMissingError) as caught:
        store.open(blocks).result()
    assert caught.value.key == blocks[1].key
    assert store.stats()["missing_blocks"] == 1


def test_wrong_parent_is_refused(open_store: OpenStore) -> None:
    store = open_store()
    blocks = make_blocks(PAGED, 1)
    store.write(blocks).result()
    with pytest.raises(BlockCorruptError, match="parent"):
        read_all(store, [BlockBuffer(blocks[0].key, bytes(16), blocks[0].data)])


@pytest.mark.parametrize(("io", "direct"), WAYS)
def test_damaged_data_is_found_put_aside_and_can_be_written_anew(open_store: OpenStore, tmp_path: Path, io: str, direct: str) -> None:
    store = open_store(io=io, direct=direct)
    blocks = make_blocks(PAGED, 4)
    store.write(blocks).result()
    path = block_path(tmp_path / "store", blocks[2].key)
    with open(path, "r+b") as file:
        file.seek(store.format.header_bytes + 3 * PAGED.layer_block_bytes + 17)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    reader = store.open(emptied(blocks)).result()
    reader.read(0, 3).result()
    with pytest.raises(BlockCorruptError, match="layer 3") as caught:
        reader.read(3, 6).result()
    reader.close()
    assert caught.value.key == blocks[2].key
    assert not path.exists()
    assert [p.name[:32] for p in (tmp_path / "store" / "quarantine").iterdir()] == [blocks[2].key.hex()]
    assert (store.stats()["corrupt_blocks"], store.stats()["quarantined_files"]) == (1, 1)
    assert len(list(store.scan())) == 3
    assert store.write(blocks).result() == [None] * 4
    targets = emptied(blocks)
    read_all(store, targets)
    assert same(targets, blocks)


@pytest.mark.parametrize(("io", "direct"), WAYS)
@pytest.mark.parametrize("length", [0, 4096, 4096 + 2 * 4096, 4096 + 4 * 4096 + 100])
def test_truncated_files_are_found(open_store: OpenStore, tmp_path: Path, io: str, direct: str, length: int) -> None:
    store = open_store(io=io, direct=direct)
    arena = allocate(2 * PAGED.full_block_bytes)
    store.register(arena)
    blocks = make_blocks(PAGED, 2, memory=arena)
    store.write(blocks).result()
    os.truncate(block_path(tmp_path / "store", blocks[1].key), length)
    with pytest.raises(BlockCorruptError, match="truncated") as caught:
        read_all(store, blocks)
    assert caught.value.key == blocks[1].key


@pytest.mark.parametrize(("io", "direct"), WAYS)
def test_a_file_truncated_while_it_is_open_is_found(open_store: OpenStore, tmp_path: Path, io: str, direct: str) -> None:
    store = open_store(io=io, direct=direct)
    arena = allocate(3 * PAGED.full_block_bytes)
    store.register(arena)
    blocks = make_blocks(PAGED, 3, memory=arena)
    store.write(blocks).result()
    reader = store.open(blocks).result()
    os.truncate(block_path(tmp_path / "store", blocks[1].key), 4096 + 100)
    with pytest.raises(BlockCorruptError, match="truncated") as caught:
        reader.read(0, 6).result()
    assert caught.value.key == blocks[1].key
    reader.close()
    assert store.stats()["redone_transfers"] == (io == "nixl")


def test_bit_flips_anywhere_in_a_file_are_never_served(open_store: OpenStore, tmp_path: Path) -> None:
    """400 files, each damaged in one place by a flip, an overwritten run, a cut or another block's content."""
    store = open_store(io="plain", direct="off")
    blocks = make_blocks(PAGED, 2)
    store.write(blocks).result()
    path, other = (block_path(tmp_path / "store", block.key) for block in blocks)
    good, stranger = path.read_bytes(), other.read_bytes()
    random = np.random.default_rng(3)
    served = 0
    for number in range(400):
        mutant = bytearray(good)
        kind = number % 4
        if kind == 0:
            mutant[random.integers(len(mutant))] ^= 1 << random.integers(8)
        elif kind == 1:
            start = random.integers(len(mutant) - 64)
            mutant[start : start + 64] = random.bytes(64)
        elif kind == 2:
            del mutant[random.integers(len(mutant)) :]
        else:
            page = random.integers(len(mutant) // PAGE_BYTES) * PAGE_BYTES
            mutant[page : page + PAGE_BYTES] = stranger[page : page + PAGE_BYTES]
        path.write_bytes(mutant)
        targets = emptied(blocks[:1])
        try:
            read_all(store, targets)
        except BlockCorruptError as error:
            assert error.key == blocks[0].key
        else:
            served += 1
    assert served == 0
    assert store.stats()["corrupt_blocks"] == 400


def test_quarantine_is_bounded(open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualpath_ray.stores.layout.QUARANTINE_FILES", 2)
    store = open_store()
    blocks = make_blocks(PAGED, 5)
    store.write(blocks).result()
    for block in blocks:
        os.truncate(block_path(tmp_path / "store", block.key), 100)
        with pytest.raises(BlockCorruptError):
            read_all(store, [block])
    assert len(list((tmp_path / "store" / "quarantine").iterdir())) == 2
    assert list(store.scan()) == []


def test_a_replaced_file_is_not_put_aside(open_store: OpenStore, tmp_path: Path) -> None:
    """Between the read that found damage and the quarantine, another gateway may have written the block anew."""
    store = open_store()
    blocks = make_blocks(PAGED, 1)
    store.write(blocks).result()
    path = block_path(tmp_path / "store", blocks[0].key)
    os.truncate(path, 4096)
    with open(path, "rb") as damaged:
        assert store.write(blocks).result() == [None]
        store.block_failed(blocks[0], damaged.fileno(), BlockCorruptError(blocks[0].key, "damaged"))
    assert path.exists()
    assert store.stats()["quarantined_files"] == 0


@pytest.mark.parametrize("io", ["nixl", "plain"])
def test_full_disk(open_store: OpenStore, tmp_path: Path, io: str) -> None:
    """A file system of 1 MiB; what does not fit fails by itself and leaves nothing behind."""
    with small_file_system(tmp_path / "small") as folder:
        store = open_store(path=folder, io=io, batch_bytes=200_000)
        blocks = make_blocks(PAGED, 60)
        outcomes = store.write(blocks).result()
        failed = [outcome for outcome in outcomes if outcome is not None]
        assert failed
        assert all(isinstance(outcome, StoreError) and "free space" in str(outcome) for outcome in failed)
        assert temporaries(folder) == []
        kept = [block for block, outcome in zip(blocks, outcomes, strict=True) if outcome is None]
        assert kept
        assert {found.key for found in store.scan()} == {block.key for block in kept}
        targets = emptied(kept)
        read_all(store, targets)
        assert same(targets, kept)
        store.close()


def test_a_file_system_that_becomes_read_only(open_store: OpenStore, tmp_path: Path) -> None:
    """As ext4 does after an error of its device: what is there is still served, writes fail and say why."""
    with small_file_system(tmp_path / "small") as folder:
        store = open_store(path=folder)
        blocks = make_blocks(PAGED, 4)
        assert store.write(blocks[:2]).result() == [None, None]
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        outcomes = store.write(blocks).result()
        assert all(isinstance(outcome, StoreError) and "read-only" in str(outcome) for outcome in outcomes[2:])
        assert store.stats()["failed_writes"] >= 2
        targets = emptied(blocks[:2])
        read_all(store, targets)
        assert same(targets, blocks[:2])
        store.close()


@contextlib.contextmanager
def small_file_system(folder: Path) -> Iterator[Path]:
    """A file system of 1 MiB, mounted there."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_io_errors_are_store_errors_per_block(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = open_store()
    blocks = make_blocks(PAGED, 3)
    real, calls = os.fdatasync, []

    def failing(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(commit.os, "fdatasync", failing)
    outcomes = store.write(blocks).result()
    assert [type(outcome) for outcome in outcomes] == [type(None), StoreError, type(None)]
    assert "check the device" in str(outcomes[1])
    assert outcomes[1].retryable
    assert temporaries(tmp_path) == []
    assert {found.key for found in store.scan()} == {blocks[0].key, blocks[2].key}
    assert store.stats()["failed_writes"] == 1


def test_vanished_directory(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    blocks = make_blocks(PAGED, 2)
    store.write(blocks[:1]).result()
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(StoreError):
        store.open(blocks[:1]).result()
    (outcome,) = store.write(blocks[1:]).result()
    assert isinstance(outcome, StoreError)
    assert "vanished" in str(outcome)
    with pytest.raises(StoreError, match=r"mount or create it again|cannot be written"):
        list(store.scan())
    assert not (tmp_path / "store").exists(), "a store must not fill the directory below an unmounted one"


@pytest.mark.skipif(os.geteuid() != 0, reason="dropping privileges needs root")
def test_no_permission(tmp_path: Path) -> None:
    """In a child, as nobody: an error that names the directory and what is missing."""
    folder = tmp_path / "store"
    folder.mkdir(mode=0o500)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chmod(folder, 0o500)
            from dualpath_ray.stores.layout import DirectoryLayout

            os.setuid(65534)
            try:
                DirectoryLayout(folder)
            except ConfigError as error:
                code = 0 if str(folder) in str(error) and "permission" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("obstacle", ["file", "below a file"])
def test_paths_that_are_no_directories(tmp_path: Path, obstacle: str) -> None:
    (tmp_path / "plain").write_text("")
    path = tmp_path / "plain" if obstacle == "file" else tmp_path / "plain" / "below"
    with pytest.raises(ConfigError, match="cannot be used"):
        DirectoryStore(path, PAGED, "model")


def test_no_way_of_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_direct(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("dualpath_ray.stores.file_io.FileIO.open", no_direct)
    with pytest.raises(StoreError, match="no way of file I/O works"):
        DirectoryStore(tmp_path, PAGED, "model")
    assert temporaries(tmp_path) == []


def test_steps_down_where_direct_io_is_refused(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: object, flags: int, *rest: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("dualpath_ray.stores.file_io.os.open", refusing)
    store = open_store()
    assert store.file_io.name == "nixl-uring, page cache"
    assert store.stats()["direct_io"] == 0


def test_queues_are_bounded(open_store: OpenStore) -> None:
    store = open_store(max_queued_writes=4, max_queued_reads=3, max_open_files=8, batch_bytes=1)
    blocks = make_blocks(PAGED, 9)
    for start in range(0, 9, 3):
        store.write(blocks[start : start + 3]).result()
    with pytest.raises(OverloadedError, match="write queue"):
        store.write(blocks).result()
    with pytest.raises(StoreError, match="at most 8 files"):
        store.open(blocks).result()
    reader = store.open(blocks[:8]).result()
    with pytest.raises(OverloadedError, match="block files open"):
        store.open(blocks[:1]).result()
    with pytest.raises(OverloadedError, match="read queue"):
        reader.read(0, 1).result()
    reader.close()
    read_all(store, blocks[:3])


def test_many_readers_and_writers_at_once(open_store: OpenStore) -> None:
    arena = allocate(240 * PAGED.full_block_bytes)
    store = open_store(batch_bytes=4 * PAGED.full_block_bytes)
    store.register(arena)
    blocks = make_blocks(PAGED, 80, memory=arena)
    store.write(blocks).result()
    wanted = [block.data.copy() for block in blocks]
    failures: list[BaseException] = []

    def load(number: int) -> None:
        try:
            for turn in range(4):
                part = blocks[(number + turn) * 8 : (number + turn) * 8 + 20]
                targets = emptied(part)
                reader = store.open(targets).result()
                for future in [reader.read(layer, layer + 2) for layer in range(0, 6, 2)]:
                    future.result()
                reader.close()
                assert same(targets, part)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    fresh = make_blocks(PAGED, 80, seed=9, memory=arena[80 * PAGED.full_block_bytes :])
    assert store.write(fresh).result() == [None] * 80
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(np.array_equal(block.data, data) for block, data in zip(blocks, wanted, strict=True))
    assert len(list(store.scan())) == 160


def test_a_closed_reader_withdraws_what_has_not_begun(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(io="plain", read_threads=1, batch_bytes=1)
    blocks = make_blocks(PAGED, 6)
    store.write(blocks).result()
    targets = emptied(blocks)
    reader = store.open(targets).result()
    entered, go_on = threading.Event(), threading.Event()
    real = store.file_io.move

    def held(*arguments: object) -> None:
        entered.set()
        go_on.wait(30)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store.file_io, "move", held)
    first, second = reader.read(0, 3), reader.read(3, 6)
    assert entered.wait(30)
    reader.close()
    assert not first.cancel()
    assert not first.done(), "its bytes are still under way"
    go_on.set()
    for future in (first, second):
        with pytest.raises(CancelledError):
            future.result()
    with pytest.raises(StoreError, match="closed"):
        reader.read(0, 1).result()
    assert store.stats()["read_bytes"] == PAGED.layer_block_bytes * 3, "only the batch that had begun"


def test_close_waits_for_what_is_under_way(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, PAGED, "model")
    before = len(os.listdir("/proc/self/fd"))
    blocks = make_blocks(PAGED, 200)
    written = store.write(blocks)
    store.close()
    assert written.done()
    assert written.result() == [None] * 200
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.write(blocks).result()
    with pytest.raises(StoreError, match="closed"):
        store.open(blocks).result()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_close_while_reading_ends_everything(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, PAGED, "model")
    blocks = make_blocks(PAGED, 100)
    store.write(blocks).result()
    targets = emptied(blocks)
    reader = store.open(targets).result()
    futures = [reader.read(layer, layer + 1) for layer in range(6)]
    store.close()
    assert all(future.done() for future in futures)
    assert same(targets, blocks)
    assert store.stats()["open_files"] == 0
    assert not [name for name in os.listdir("/proc/self/fd") if str(tmp_path) in _target(name)]


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
