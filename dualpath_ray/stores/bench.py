"""`dualpath bench store`: what the block store makes of a file system.

Beside it, in the same directory and alternating with it, so that noise meets both: one thread that opens each file and moves
it with one preadv or pwritev, durable in the same way but without headers and checksums; and fio, where it is installed, with as many
bytes in flight as the store may have.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from dualpath_ray.errors import StoreError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores.base import BlockBuffer, Bytes
from dualpath_ray.stores.block_format import BlockFormat, BlockHeader
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from dualpath_ray.stores.layout import fsync_directory
from dualpath_ray.transfer.memory import allocate

LAYERS = 32
HEAD_DIM = 64


class Unchecked(BlockFormat):
    """The format without verification of data, to tell what verification costs."""

    def verify(self, header: BlockHeader, data: Bytes, first_layer: int, stop_layer: int) -> None:
        return


@dataclass(frozen=True, slots=True)
class Case:
    """Blocks of one size: `count` of them, in memory and in two directories."""

    block_bytes: int
    geometry: KVGeometry
    blocks: Sequence[BlockBuffer]
    arena: Bytes
    folder: Path


def make_case(block_bytes: int, total_bytes: int, folder: Path) -> Case:
    tokens = block_bytes // (LAYERS * 2 * HEAD_DIM * 2)
    geometry = KVGeometry(LAYERS, 1, HEAD_DIM, "bfloat16", tokens)
    count = max(1, total_bytes // block_bytes)
    random = np.random.default_rng(0)
    arena = allocate(count * block_bytes)
    arena.view(np.uint64)[:] = random.integers(0, 1 << 63, arena.nbytes // 8, dtype=np.uint64)
    keys = [random.bytes(16) for _ in range(count + 1)]
    parts = arena.reshape(count, block_bytes)
    blocks = [BlockBuffer(keys[i + 1], keys[i], parts[i]) for i in range(count)]
    return Case(block_bytes, geometry, blocks, arena, folder)


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def store_write(store: DirectoryStore, case: Case) -> None:
    for outcome in store.write(case.blocks).result():
        if outcome is not None:
            raise outcome


def store_read(store: DirectoryStore, case: Case) -> None:
    """As a gateway reads: all blocks of a request, one group of layers after the other, all groups asked for at once."""
    reader = store.open(case.blocks).result()
    groups = store.layer_groups()
    cuts = [case.geometry.layers * group // groups for group in range(groups + 1)]
    futures = [reader.read(first, stop) for first, stop in itertools.pairwise(cuts)]
    for future in futures:
        future.result()
    reader.close()


def plain_write(case: Case, direct: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0)
    for number, block in enumerate(case.blocks):
        path = case.folder / f"{number}.plain"
        fd = os.open(path.with_suffix(".new"), flags, 0o644)
        os.posix_fallocate(fd, 0, case.block_bytes)
        _all_of(os.pwritev, fd, block.data)
        os.fdatasync(fd)
        os.close(fd)
        os.rename(path.with_suffix(".new"), path)
    fsync_directory(case.folder)


def plain_read(case: Case, direct: bool) -> None:
    for number, block in enumerate(case.blocks):
        fd = os.open(case.folder / f"{number}.plain", os.O_RDONLY | (os.O_DIRECT if direct else 0))
        _all_of(os.preadv, fd, block.data)
        os.close(fd)


def _all_of(move: Callable[[int, list[memoryview], int], int], fd: int, memory: Bytes) -> None:
    view = memory.data
    done = 0
    while done < len(view):
        moved = move(fd, [view[done:]], done)
        if not moved:
            raise StoreError("a file of the benchmark ends too early")
        done += moved


def drop_caches(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def run_fio(case: Case, operation: str, direct: bool, in_flight: int) -> float:
    """Seconds that fio takes with io_uring for one file per block, new and synced each when it writes."""
    depth = max(1, in_flight // case.block_bytes)
    command = [
        "fio", "--name=dualpath", f"--directory={case.folder}", f"--rw={operation}", "--ioengine=io_uring", f"--direct={int(direct)}",
        f"--bs={case.block_bytes}", f"--iodepth={depth}", f"--size={case.arena.nbytes}", f"--nrfiles={len(case.blocks)}",
        "--file_service_type=roundrobin", f"--openfiles={len(case.blocks)}", "--fsync_on_close=1", "--invalidate=1", "--output-format=json",
    ]  # fmt: skip
    if operation == "write":
        for path in case.folder.glob("dualpath.*"):
            path.unlink()
        command.append("--create_on_open=1")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StoreError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    return case.arena.nbytes / float(json.loads(done.stdout)["jobs"][0][operation]["bw_bytes"])


def measure(case: Case, settings: DirectorySettings, rounds: int) -> dict[str, Any]:
    """Rates in GB/s (medians of rounds) and their ratios."""
    store = DirectoryStore(case.folder / "store", case.geometry, "benchmark", settings)
    store.register(case.arena)
    unchecked = Unchecked(case.geometry, "benchmark")
    direct = store.file_io.direct
    in_flight = settings.read_threads * settings.batch_bytes
    has_fio = shutil.which("fio") is not None
    names = ("write", "plain_write", "fio_write", "read", "read_unchecked", "plain_read", "fio_read")
    seconds: dict[str, list[float]] = {name: [] for name in names if has_fio or not name.startswith("fio")}
    wanted = case.arena.copy()
    checked = store.format
    with contextlib.closing(store):
        for _ in range(rounds):
            for block in case.blocks:
                store.remove(block.key)
            for path in case.folder.glob("*.plain"):
                path.unlink()
            os.sync()
            seconds["write"].append(timed(lambda: store_write(store, case)))
            os.sync()
            seconds["plain_write"].append(timed(lambda: plain_write(case, direct)))
            if has_fio:
                os.sync()
                seconds["fio_write"].append(run_fio(case, "write", direct, in_flight))
            for name, format in (("read", checked), ("read_unchecked", unchecked)):
                _forget(case, direct)
                store.format = format
                seconds[name].append(timed(lambda: store_read(store, case)))
                if not np.array_equal(case.arena, wanted):
                    raise StoreError("the store returned other bytes than were written")
            _forget(case, direct)
            seconds["plain_read"].append(timed(lambda: plain_read(case, direct)))
            if has_fio:
                seconds["fio_read"].append(run_fio(case, "read", direct, in_flight))
        way = store.file_io.name
    gbps = {name: case.arena.nbytes / statistics.median(values) / 1e9 for name, values in seconds.items()}
    result: dict[str, Any] = {"block_bytes": case.block_bytes, "blocks": len(case.blocks), "io": way}
    result |= {f"{name}_gbps": value for name, value in gbps.items()}
    result |= {"vs_plain_read": gbps["read"] / gbps["plain_read"], "vs_plain_write": gbps["write"] / gbps["plain_write"]}
    result["checksum_cost"] = 1 - gbps["read"] / gbps["read_unchecked"]
    for name in ("read", "write"):
        result[f"vs_fio_{name}"] = gbps[name] / gbps[f"fio_{name}"] if has_fio else None
    return result


def _forget(case: Case, direct: bool) -> None:
    case.arena[:] = 0
    if not direct:
        drop_caches(case.folder)


@contextlib.contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dualpath-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@click.command()
@click.option(
    "--dir", "parent", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Directory to measure in (default: temporary)."
)
@click.option(
    "--block-kib", multiple=True, type=click.IntRange(min=256), default=(512, 3072, 8192), show_default=True, help="Full Block sizes."
)
@click.option("--total-mib", type=click.IntRange(min=1), default=256, show_default=True, help="Bytes moved per measurement.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Repetitions; medians are reported.")
@click.option("--io", type=click.Choice(["auto", "nixl", "plain"]), default="auto", show_default=True)
@click.option("--direct", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option("--read-threads", type=click.IntRange(min=1), default=DirectorySettings().read_threads, show_default=True)
@click.option("--write-threads", type=click.IntRange(min=1), default=DirectorySettings().write_threads, show_default=True)
@click.option("--batch-mib", type=click.IntRange(min=1), default=DirectorySettings().batch_bytes >> 20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(
    parent: Path | None,
    block_kib: tuple[int, ...],
    total_mib: int,
    rounds: int,
    io: Any,
    direct: Any,
    read_threads: int,
    write_threads: int,
    batch_mib: int,
    as_json: bool,
) -> None:
    """Measure the directory store beside plain system calls (and fio, if installed)."""
    settings = DirectorySettings(io=io, direct=direct, read_threads=read_threads, write_threads=write_threads, batch_bytes=batch_mib << 20)
    cases = []
    for kib in block_kib:
        with scratch(parent) as folder:
            unit = LAYERS * 2 * HEAD_DIM * 2
            cases.append(measure(make_case(max(unit, kib * 1024 // unit * unit), total_mib << 20, folder), settings, rounds))
        if not as_json:
            click.echo(_line(cases[-1]))
    worst = {key: _worst(cases, key) for key in ("vs_plain_read", "vs_plain_write", "vs_fio_read", "vs_fio_write")}
    summary = {**worst, "checksum_cost": max(case["checksum_cost"] for case in cases), "cases": cases}
    if as_json:
        click.echo(json.dumps(summary))


def _worst(cases: list[dict[str, Any]], key: str) -> float | None:
    values = [case[key] for case in cases if case[key] is not None]
    return min(values) if values else None


def _line(case: dict[str, Any]) -> str:
    read, write = (
        f"{name} {case[f'{name}_gbps']:.2f} GB/s = {case[f'vs_plain_{name}']:.2f} x plain"
        + ("" if case[f"vs_fio_{name}"] is None else f" = {case[f'vs_fio_{name}']:.2f} x fio")
        for name in ("read", "write")
    )
    return f"{case['block_bytes'] >> 10} KiB blocks, {case['io']}: {read}; {write}; checksums {case['checksum_cost']:.1%} of load time"
