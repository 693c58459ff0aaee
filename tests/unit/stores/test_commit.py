"""A commit is atomic and durable, whatever kills its process and whoever else commits the same block."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dualpath_ray.errors import StoreError
from dualpath_ray.stores import commit, layout
from dualpath_ray.transfer.memory import PAGE_BYTES, allocate, round_up
from tests.unit.stores.conftest import PAGED, OpenStore, emptied, make_blocks, temporaries

STEPS = ["created", "written", "synced", "renamed", "directories synced"]

WRITER = """
import os, signal, sys
from pathlib import Path
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from tests.unit.stores.conftest import FINGERPRINT, PAGED, make_blocks

folder, die_at, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = DirectoryStore(folder, PAGED, FINGERPRINT, DirectorySettings(write_threads=1, batch_bytes=300_000))

def step(name):
    if name == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

store._committer.on_step = step
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
blocks = make_blocks(PAGED, 30)
for turn in range(rounds):
    outcomes = store.write(blocks).result()
    assert outcomes == [None] * 30, outcomes
    for block in blocks if turn < rounds - 1 else []:
        store.remove(block.key)
store.close()
"""


def start_writer(folder: Path, die_at: str, rounds: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), die_at, str(rounds)]
    root = Path(__file__).parents[3]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize("step", STEPS)
def test_killed_between_steps_a_block_is_absent_or_whole(open_store: OpenStore, tmp_path: Path, step: str) -> None:
    folder = tmp_path / "store"
    child = start_writer(folder, step)
    _, errors = child.communicate("go\n", timeout=60)
    assert child.returncode == -signal.SIGKILL, errors
    store = open_store(temporary_age_s=-60)
    blocks = make_blocks(PAGED, 30)
    found = {stored.key for stored in store.scan()}
    there = [block for block in blocks if block.key in found]
    assert bool(there) == (step in ("renamed", "directories synced"))
    if there:
        targets = emptied(there)
        reader = store.open(targets).result()
        reader.read(0, PAGED.layers).result()
        reader.close()
        assert all(np.array_equal(a.data, b.data) for a, b in zip(targets, there, strict=True))
    assert temporaries(folder) == [], "the scan has swept what the dead process left"
    assert (store.stats()["swept_files"] > 0) == (step in STEPS[:3])
    assert store.stats()["damaged_files"] == 0
    assert store.write(blocks).result() == [None] * 30


ACKNOWLEDGER = """
import os, signal, sys
from pathlib import Path
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from tests.unit.stores.conftest import FINGERPRINT, PAGED, make_blocks

folder, die_at, die_in = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = DirectoryStore(folder, PAGED, FINGERPRINT, DirectorySettings(write_threads=1))
batch = 0

def step(name):
    if (name, batch) == (die_at, die_in):
        os.kill(os.getpid(), signal.SIGKILL)

store._committer.on_step = step
blocks = make_blocks(PAGED, 30)
for batch in range(10):
    part = blocks[3 * batch : 3 * batch + 3]
    assert store.write(part).result() == [None] * 3
    sys.stdout.write(f"{batch}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("step", STEPS)
def test_what_was_acknowledged_survives_a_kill_at_any_step(open_store: OpenStore, tmp_path: Path, step: str) -> None:
    folder = tmp_path / "store"
    command = [sys.executable, "-c", ACKNOWLEDGER, str(folder), step, "4"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.split() == ["0", "1", "2", "3"]
    store = open_store()
    acknowledged = make_blocks(PAGED, 30)[:12]
    assert {block.key for block in acknowledged} <= {stored.key for stored in store.scan()}
    targets = emptied(acknowledged)
    reader = store.open(targets).result(10)
    reader.read(0, PAGED.layers).result(10)
    reader.close()
    assert all(np.array_equal(a.data, b.data) for a, b in zip(targets, acknowledged, strict=True))


def test_order_of_calls_survives_a_power_cut(open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced before it gets its name, its directory after, and a new subdirectory's parent before both."""
    calls: list[str] = []
    real_datasync, real_sync, real_rename = os.fdatasync, os.fsync, os.rename

    def target(fd: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path / "store")

    def datasync(fd: int) -> None:
        calls.append("data " + ("temporary" if target(fd).endswith(".tmp") else target(fd)))
        real_datasync(fd)

    def sync(fd: int) -> None:
        calls.append(f"directory {target(fd)}")
        real_sync(fd)

    def rename(source: Path, destination: Path) -> None:
        calls.append("rename")
        real_rename(source, destination)

    store = open_store()
    (block,) = make_blocks(PAGED, 1)
    monkeypatch.setattr(commit.os, "fdatasync", datasync)
    monkeypatch.setattr(layout.os, "fsync", sync)
    monkeypatch.setattr(commit.os, "rename", rename)
    assert store.write([block]).result() == [None]
    assert calls == ["directory .", "data temporary", "rename", f"directory {block.key[:1].hex()}"]


def test_without_sync_nothing_waits_for_the_device(open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a new subdirectory is synced. The blocks are there for another process, named only when they are whole."""
    store = open_store(sync=False)
    blocks = make_blocks(PAGED, 6)
    for block in blocks:
        (tmp_path / "store" / block.key[:1].hex()).mkdir(exist_ok=True)
    synced: list[int] = []
    renamed: list[bool] = []
    real_rename = os.rename

    def rename(source: Path, destination: Path) -> None:
        renamed.append(source.stat().st_size == store.format.file_bytes)
        real_rename(source, destination)

    monkeypatch.setattr(commit.os, "fdatasync", synced.append)
    monkeypatch.setattr(layout.os, "fsync", synced.append)
    monkeypatch.setattr(commit.os, "rename", rename)
    for _ in range(2):  # the second time they exist
        assert store.write(blocks).result() == [None] * 6
    assert (synced, renamed) == ([], [True] * 6)
    other = open_store()
    assert {stored.key for stored in other.scan()} == {block.key for block in blocks}
    targets = emptied(blocks)
    reader = other.open(targets).result()
    reader.read(0, PAGED.layers).result()
    reader.close()
    assert all(np.array_equal(a.data, b.data) for a, b in zip(targets, blocks, strict=True))


def test_two_processes_write_the_same_blocks(open_store: OpenStore, tmp_path: Path) -> None:
    """Both write and remove all blocks, again and again, without a failure; what is left in the end is whole."""
    folder = tmp_path / "store"
    children = [start_writer(folder, "never", rounds=8) for _ in range(2)]
    for child in children:
        go(child)
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    store = open_store()
    blocks = make_blocks(PAGED, 30)
    found = {stored.key for stored in store.scan()}
    assert found <= {block.key for block in blocks}
    assert found, "the writer that ended last removed nothing after its last write"
    there = [block for block in blocks if block.key in found]
    targets = emptied(there)
    reader = store.open(targets).result()
    reader.read(0, PAGED.layers).result()
    reader.close()
    assert all(np.array_equal(a.data, b.data) for a, b in zip(targets, there, strict=True))
    assert temporaries(folder) == []
    assert store.stats()["damaged_files"] == 0


def test_headers_go_out_with_the_data_and_wait_behind_nothing(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written one by one they took half of a commit: each waits in the device's queue behind the blocks' megabytes."""
    store = open_store(write_threads=2, batch_bytes=3 * PAGED.full_block_bytes)
    if not (store.file_io.direct and store.file_io.engine.startswith("nixl")):
        pytest.skip("no direct I/O through NIXL here")
    arena = allocate(10 * round_up(PAGED.full_block_bytes, PAGE_BYTES))
    store.register(arena)
    blocks = make_blocks(PAGED, 10, memory=arena)
    alone: list[object] = []
    monkeypatch.setattr("dualpath_ray.stores.file_io.move_piece", lambda operation, piece, direct: alone.append(piece))
    assert store.write(blocks).result() == [None] * 10
    assert alone == []
    assert {stored.key for stored in store.scan()} == {block.key for block in blocks}


def test_a_batch_is_acknowledged_when_its_directories_are_synced(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one batch are synced together with the data of the next; a block that was there before is held to the same."""
    events: list[str] = []
    real_datasync, real_sync = os.fdatasync, os.fsync

    def datasync(fd: int) -> None:
        real_datasync(fd)
        events.append("data")

    def sync(fd: int) -> None:
        real_sync(fd)
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path / "store"))

    store = open_store(write_threads=1, batch_bytes=PAGED.full_block_bytes, write_yield_s=30.0)
    blocks = make_blocks(PAGED, 3)
    for block in blocks:
        store._layout.make_shard(block.key)
    monkeypatch.setattr(commit.os, "fdatasync", datasync)
    monkeypatch.setattr(layout.os, "fsync", sync)
    gate = threading.Event()
    store.submit_reads([gate.wait])
    writes = [store.write([block]) for block in [*blocks, blocks[0]]]
    for number, write in enumerate(writes):
        write.add_done_callback(lambda _, number=number: events.append(f"done {number}"))  # type: ignore[misc]
    gate.set()
    assert [write.result(30) for write in writes] == [[None]] * 4
    folders = [block.key[:1].hex() for block in blocks]
    for number, folder in enumerate([*folders, folders[0]]):
        done = events.index(f"done {number}")
        assert folder in events[:done]
        assert events[:done].count("data") == min(number + 2, 3), "the next batch's data was written meanwhile"
    assert events.count(folders[0]) == 2


def test_a_directory_that_cannot_be_synced_fails_its_blocks(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(write_threads=1, batch_bytes=2 * PAGED.full_block_bytes)
    blocks = make_blocks(PAGED, 4)
    for block in blocks:
        store._layout.make_shard(block.key)
    real, bad = commit.fsync_directory, blocks[1].key[:1].hex()

    def failing(folder: Path) -> None:
        if folder.name == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(folder)

    monkeypatch.setattr(commit, "fsync_directory", failing)
    for _ in range(2):  # the second time they are there already
        outcomes = store.write(blocks).result()
        assert [type(outcome) for outcome in outcomes] == [type(None), StoreError, type(None), type(None)]
        assert "check the device" in str(outcomes[1])
    stats = store.stats()
    assert (stats["written_blocks"], stats["existing_blocks"], stats["failed_writes"]) == (3, 4, 2)
