"""The directory store beside fio on the same file system: the same block size, depth and engine, one file per block, each durable.

Both sides write new files and sync each one's data; ours also names each atomically (rename, and a sync of the directory), has headers,
and computes checksums. Both read the whole files back, around the page cache where the file system allows it; ours verifies. The memory of
both has pages of the same size: a device that takes few segments per request is several times as fast with huge ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from dualpath_ray.errors import StoreError
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from dualpath_ray.transfer.memory import HugePages
from load_tests.bench.blocks import (
    FINGERPRINT,
    READS,
    Case,
    Unchecked,
    in_turns,
    latencies,
    load,
    load_requests,
    percentile,
    rate,
    ratio,
    save,
    timed,
)  # fmt: skip
from load_tests.bench.checksum_cost import ChecksumCost, Cost, costed

THREADS = 2
ENGINES = {"nixl-uring": "io_uring", "nixl-aio": "libaio", "plain": "psync"}


def has_fio() -> bool:
    return shutil.which("fio") is not None


def settings_for(
    case: Case, io: Literal["auto", "nixl", "plain"], direct: Literal["auto", "on", "off"], threads: int = THREADS
) -> DirectorySettings:
    """At most `case.depth` blocks under way."""
    threads = min(threads, case.depth)
    batch = case.block_bytes * max(1, case.depth // threads)
    return DirectorySettings(io=io, direct=direct, read_threads=threads, write_threads=threads, batch_bytes=batch)


def measure(case: Case, settings: DirectorySettings, folder: Path, rounds: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Rates in GB/s, latencies in milliseconds, ratios as medians over rounds."""
    store = DirectoryStore(folder / "store", case.geometry, FINGERPRINT, settings)
    beside = folder / "beside"
    for operation in ("read", "write"):
        (beside / operation).mkdir(parents=True)
    store.register(case.arena)
    checked, unchecked = store.format, Unchecked(case.geometry, FINGERPRINT)
    direct, fio = store.file_io.direct, has_fio()
    checksums = ChecksumCost(case.arena.nbytes)
    seconds: dict[str, list[float]] = {}
    theirs: dict[str, Any] = {}

    def read(verify: bool) -> Cost:
        case.forget()
        if not direct:
            drop_caches(folder)
        store.format = checked if verify else unchecked
        cost = costed(lambda: load_requests(store, case))
        case.check()
        seconds.setdefault("read" if verify else "read_unchecked", []).append(cost.seconds)
        return cost

    def write() -> None:
        for block in case.blocks:
            store.remove(block.key)
        os.sync()
        seconds.setdefault("write", []).append(timed(lambda: save(store, case)))

    def fio_moves(operation: str) -> None:
        if fio:
            theirs[operation] = fio_job(case, beside / operation, operation, ENGINES[store.file_io.engine], direct)
            seconds.setdefault(f"fio_{operation}", []).append(case.arena.nbytes / float(theirs[operation]["bw_bytes"]))

    with contextlib.closing(store):
        for number in range(rounds):
            writes: list[Callable[[], None]] = [write, lambda: fio_moves("write")]
            reads: list[Callable[[], None]] = [lambda: checksums.measure(read), lambda: fio_moves("read")]
            for step in [*in_turns(number, writes, 1), os.sync, *in_turns(number, reads, READS)]:
                step()
            tick()
        store.format = checked
        own = latencies(lambda i: load(store, case.blocks[i : i + 1], case.geometry.layers), case)
        way = store.file_io.name
    figures: dict[str, Any] = {"block_bytes": case.block_bytes, "depth": case.depth, "blocks": len(case.blocks), "io": way}
    figures |= {f"{name}_gbps": rate(case, values) for name, values in seconds.items()}
    for operation in ("read", "write"):
        figures[f"vs_fio_{operation}"] = ratio(seconds[f"fio_{operation}"], seconds[operation]) if fio else None
    figures |= checksums.figures()
    figures["load_p50_ms"], figures["load_p99_ms"] = percentile(own, 0.5) * 1e3, percentile(own, 0.99) * 1e3
    figures["fio_read_p99_ms"] = theirs["read"]["clat_ns"]["percentile"]["99.000000"] / 1e6 if fio else None
    return figures


def fio_job(case: Case, folder: Path, operation: str, engine: str, direct: bool) -> dict[str, Any]:
    """fio's own account of writing (anew) or reading one file per block.

    Writes come from as many jobs as blocks may be under way, each of which writes a block, syncs it, and goes on. One job with a queue as
    deep would sync files before their writes have ended (16 blocks of 8 MiB: 5 flushes, and 150 ms left to sync afterwards), so that
    nothing of it is durable. At its end a job syncs its files once more, for the sake of the last.
    """
    files, jobs = len(case.blocks), 1
    if operation == "write":
        jobs = min(case.depth, files)
        files = max(1, round(files / jobs))
    command = [
        "fio", "--name=blocks", f"--directory={folder}", f"--rw={operation}", f"--ioengine={engine}", f"--direct={int(direct)}",
        f"--bs={case.block_bytes}", f"--iodepth={1 if operation == 'write' else case.depth}", f"--size={files * case.block_bytes}",
        f"--nrfiles={files}", "--file_service_type=sequential", f"--openfiles={files}", "--invalidate=1", "--output-format=json",
    ]  # fmt: skip
    if operation == "write":
        for path in folder.iterdir():
            path.unlink()
        command += ["--create_on_open=1", "--fallocate=native", "--fdatasync=1", "--end_fsync=1"]
        command += ["--thread", f"--numjobs={jobs}", "--group_reporting"]
    elif not any(folder.iterdir()):
        run_fio([*command, "--create_only=1"], case.pages)
    os.sync()
    output = run_fio(command, case.pages)
    account: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0][operation]
    return account


def run_fio(command: list[str], pages: HugePages) -> str:
    """fio has no option for transparent huge pages, but its buffers come from malloc, and glibc has one (from 2.35 on)."""
    tunables = {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb={int(pages != 'off')}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **tunables})
    if done.returncode:
        raise StoreError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def drop_caches(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
