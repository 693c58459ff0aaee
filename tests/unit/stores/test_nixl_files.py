"""What is relied on of NIXL's POSIX backend. A new NIXL release that behaves otherwise must be noticed here."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dualpath_ray.errors import ConfigError, StoreError
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from dualpath_ray.stores.file_io import choose
from dualpath_ray.stores.nixl_files import MAX_PIECES, NixlFiles
from dualpath_ray.stores.pieces import Piece
from dualpath_ray.transfer import nixl_api
from dualpath_ray.transfer.memory import allocate
from tests.unit.stores.conftest import FINGERPRINT, PAGED

MIB = 1 << 20


@pytest.fixture(params=["use_uring", "use_aio"])
def nixl(request: pytest.FixtureRequest) -> Iterator[NixlFiles]:
    files = NixlFiles(f"test-{os.getpid()}-{request.node.name}", "POSIX", {request.param: "true"})
    yield files
    files.close()


def test_nothing_of_a_failed_transfer_lands_after_its_failure_was_reported(nixl: NixlFiles, tmp_path: Path) -> None:
    """Other I/Os of that transfer have landed or were cancelled by then; transfers beside it are not touched."""
    memory = allocate(40 * MIB)
    nixl.register(memory)
    (tmp_path / "long").write_bytes(b"\x05" * (20 * MIB))
    (tmp_path / "short").write_bytes(b"\x05" * 4096)
    flags = os.O_RDONLY | os.O_DIRECT
    files = nixl.adopt([os.open(tmp_path / name, flags) for name in ("long", "short")], 20 * MIB)
    long, short = files.fds
    for _ in range(5):
        memory[:] = 0
        bad_piece = Piece(short, 8192, memory[:4096])
        bad = nixl.transfer("READ", [bad_piece, *(Piece(long, i * MIB, memory[i * MIB : (i + 1) * MIB]) for i in range(1, 20))])
        good = nixl.transfer("READ", [Piece(long, i * MIB, memory[(20 + i) * MIB : (21 + i) * MIB]) for i in range(20)])
        with pytest.raises(StoreError):
            bad.result(30)
        memory[: 20 * MIB] = 9
        good.result(30)
        assert (memory[20 * MIB :] == 5).all()
        assert (memory[: 20 * MIB] == 9).all()
    nixl.release(files)


def test_many_pieces_at_once_stay_below_the_queue_of_the_backend(nixl: NixlFiles, tmp_path: Path) -> None:
    memory = allocate(MIB)
    nixl.register(memory)
    content = np.random.default_rng(0).integers(0, 256, MIB, dtype=np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    files = nixl.adopt([os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT)], MIB)
    pages = [Piece(files.fds[0], i * 4096, memory[i * 4096 : (i + 1) * 4096]) for i in range(256)]
    transfers = [nixl.transfer("READ", pages * 100) for _ in range(3)]  # 76,800 pieces
    for transfer in transfers:
        transfer.result(60)
    assert np.array_equal(memory, content)
    with pytest.raises(StoreError, match="at most"):
        nixl.transfer("READ", [pages[0]] * (MAX_PIECES + 1)).result(30)
    memory[:] = 0
    nixl.transfer("READ", pages).result(30)
    assert np.array_equal(memory, content)
    nixl.release(files)


def test_release_closes_files(nixl: NixlFiles, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    nixl.release(nixl.adopt([fd], 4096))
    nixl.register(allocate(4096))  # commands run in order
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_no_nixl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ConfigError("NIXL is not installed")

    monkeypatch.setattr(nixl_api, "make_agent", missing)
    with pytest.raises(StoreError, match="NIXL is not installed"):
        NixlFiles("test", "POSIX", {"use_uring": "true"})
    assert choose(tmp_path, "auto", "auto").name == "plain, direct"
    with pytest.raises(StoreError, match="NIXL is not installed"):
        choose(tmp_path, "nixl", "auto")


@pytest.mark.parametrize("io", ["hf3fs", "gds"])
def test_a_backend_without_its_plug_in_is_named_once(tmp_path: Path, io: str) -> None:
    with pytest.raises(StoreError, match=rf"libplugin_{io.upper()}\.so") as failed:
        DirectoryStore(tmp_path, PAGED, FINGERPRINT, DirectorySettings(io=io))  # type: ignore[arg-type]
    assert str(failed.value).count("cannot start") == 1


def test_no_more_is_under_way_than_may_be_and_the_next_begins_by_itself(tmp_path: Path) -> None:
    """Six reads of 1 MiB are asked for at once, two may be under way; those who asked do nothing in between."""
    nixl = NixlFiles("bounded", "POSIX", {"use_uring": "true"}, max_bytes=2 * MIB)
    try:
        content = np.random.default_rng(0).integers(0, 256, 6 * MIB, dtype=np.uint8)
        (tmp_path / "file").write_bytes(content.tobytes())
        memory = allocate(6 * MIB)
        nixl.register(memory)
        files = nixl.adopt([os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT)], 6 * MIB)
        most: list[int] = []
        real = nixl._agent.transfer
        nixl._agent.transfer = lambda handle: most.append(len(nixl._posted) + 1) or real(handle)
        pieces = [Piece(files.fds[0], i * MIB, memory[i * MIB : (i + 1) * MIB]) for i in range(6)]
        gate = threading.Event()
        nixl._inbox.put(lambda: gate.wait(30) and None)
        futures = [nixl.transfer("READ", [piece]) for piece in pieces]
        gate.set()
        for future in futures:
            future.result(30)
        assert len(most) == 6 and max(most) == 2
        assert np.array_equal(memory, content)
        nixl.release(files)
    finally:
        nixl.close()
