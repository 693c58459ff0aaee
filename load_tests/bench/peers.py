"""`dualpath bench peers`: the same blocks saved and loaded through other KV stores.

Each runs in a process of its own, with the interpreter of a venv of its own: its requirements must not meet the project's. They are made
on demand; torch and numpy are taken from this environment. Over the pipe go `save` and `load`, and back come seconds and peak memory.
All take turns within one run, and each checks the bytes it got. Our side goes around the page cache and verifies what it reads; it saves
durably, and, as the others do, without waiting for the device (`storage.sync: false`). What the others do is said in the outcome.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import platformdirs
from rich.console import Console
from rich.progress import Progress

from dualpath_ray.errors import StoreError
from dualpath_ray.stores.directory import DirectoryStore
from load_tests.bench.blocks import FINGERPRINT, Case, load_requests, make_case, ratio, save, scratch, timed
from load_tests.bench.figures import median, show
from load_tests.bench.store_directory import settings_for

ANSWER_TIMEOUT_S = 180.0
OURS = {"dualpath": True, "dualpath, not synced": False}  # whether it syncs


@dataclass(frozen=True, slots=True)
class Peer:
    """`install`: exact packages, without what they require, so that no second torch comes along. `test`: what must be importable."""

    name: str
    script: str
    install: tuple[str, ...]
    test: str
    does: str
    direct: bool = False


LMCACHE = (
    "lmcache==0.5.6", "py-cpuinfo==9.0.0", "numba", "llvmlite", "aiofile", "caio", "aiofiles", "blake3", "awscrt", "nvtx", "pyzmq", "redis",
    "sortedcontainers", "cachetools",
)  # fmt: skip
DISK = "lmcache.v1.storage_backend.local_disk_backend"
PEERS = (
    Peer("lmcache-disk", "peer_lmcache.py", LMCACHE, DISK, "local disk through a cold page cache, not synced, no checksums"),
    Peer("lmcache-disk-direct", "peer_lmcache.py", LMCACHE, DISK, "local disk with O_DIRECT, not synced, no checksums", direct=True),
    Peer(
        "mooncake", "peer_mooncake.py", ("mooncake-transfer-engine-non-cuda==0.3.13.post1", "requests", "aiohttp", "msgpack"),
        "mooncake.store", "memory of one node over TCP on loopback, not durable",
    ),
)  # fmt: skip


class Process:
    """A running peer."""

    def __init__(self, peer: Peer, python: Path, case: Case, folder: Path) -> None:
        self._own = folder / peer.name
        self._own.mkdir()
        request = {"folder": str(self._own), "block_bytes": case.block_bytes, "count": len(case.blocks), "direct": peer.direct}
        self._log = (folder / f"{peer.name}.log").open("w+")
        command = [str(python), str(Path(__file__).with_name(peer.script)), json.dumps(request)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self.peak_bytes = 0
        self._name = peer.name
        self._answer()

    def ask(self, verb: str) -> float:
        """Seconds that the peer took. Raises StoreError."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(f"{verb}\n")
            stdin.flush()
        answer = json.loads(self._answer())
        self.peak_bytes = answer["peak_bytes"]
        return float(answer["seconds"])

    def _answer(self) -> str:
        """The next line that is for us; libraries print what they like."""
        end, stdout = time.monotonic() + ANSWER_TIMEOUT_S, self._process.stdout
        assert stdout is not None
        while time.monotonic() < end:
            if not select.select([stdout], [], [], 1.0)[0]:
                continue
            line = stdout.readline()
            if line.startswith("@"):
                return line[1:]
            if not line:
                break
        self._log.seek(0)
        said = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        raise StoreError(f"{self._name} does not run: {said[-1][:300] if said else 'it ended without a word'}")

    def close(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError):
            stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def interpreter(peer: Peer, venvs: Path) -> Path:
    """The peer's Python, made if need be. Raises StoreError that says why it cannot be."""
    folder = venvs / peer.script.removesuffix(".py")
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)], peer)
        _run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", *peer.install], peer)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        here = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
        (folder / "lib" / version / "site-packages" / "zz_base.pth").write_text("\n".join(here) + "\n")
    _run([str(python), "-c", f"import {peer.test}"], peer)
    return python


def _run(command: Sequence[str], peer: Peer) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise StoreError(f"{peer.name} cannot be installed or imported: {said[-1].strip()[:300] if said else command}")


@click.command()
@click.option(
    "--dir", "parent", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Directory to measure in (default: temporary)."
)
@click.option(
    "--venvs", type=click.Path(file_okay=False, path_type=Path), help="Where the peers are installed (default: the user's cache)."
)
@click.option("--block-kib", type=click.IntRange(min=256), default=3072, show_default=True)
@click.option("--depth", type=click.IntRange(1, 256), default=16, show_default=True, help="Our blocks under way at once.")
@click.option("--total-mib", type=click.IntRange(min=1), default=192, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(parent: Path | None, venvs: Path | None, block_kib: int, depth: int, total_mib: int, rounds: int, as_json: bool) -> None:
    """Save and load the same blocks through LMCache and Mooncake Store."""
    venvs = (venvs or Path(platformdirs.user_cache_dir("dualpath-ray")) / "peers").absolute()
    venvs.mkdir(parents=True, exist_ok=True)
    case = make_case(block_kib << 10, depth, total_mib << 20)
    console = Console(stderr=True)
    missing: dict[str, str] = {}
    with scratch(parent) as folder, contextlib.ExitStack() as stack:
        (folder / "blocks.bin").write_bytes(case.wanted.tobytes())
        running: dict[str, Process] = {}
        for peer in PEERS:
            try:
                with console.status(f"starting {peer.name}"):
                    running[peer.name] = Process(peer, interpreter(peer, venvs), case, folder)
                stack.callback(running[peer.name].close)
            except StoreError as error:
                missing[peer.name] = str(error)
                console.print(str(error))
        with Progress(console=console, transient=True) as progress:
            times = _rounds(case, folder, running, missing, rounds, progress)
        peaks = {name: process.peak_bytes for name, process in running.items()}
    peaks |= dict.fromkeys(OURS, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    document = _document(case, times, peaks, missing)
    columns = ("store", "save GB/s", "load GB/s", "ours saves x", "not synced x", "ours loads x", "peak MiB", "what it does")
    rows = [_row(name, row) for name, row in document["stores"].items()]
    show(f"{len(case.blocks)} blocks of {case.block_bytes >> 10} KiB", document, rows, columns, as_json)


Times = dict[str, list[float]]


def _rounds(
    case: Case, folder: Path, running: dict[str, Process], missing: dict[str, str], rounds: int, progress: Progress
) -> dict[str, Times]:
    """Seconds of each round, by store and verb."""
    times: dict[str, Times] = {name: {"save": [], "load": []} for name in (*OURS, *running)}
    task = progress.add_task("rounds", total=rounds)
    with contextlib.ExitStack() as stack:
        stores = {name: stack.enter_context(contextlib.closing(_own(folder / name, case, sync))) for name, sync in OURS.items()}
        for number in range(rounds):
            for name in (list if number % 2 == 0 else reversed)([*OURS, *running]):
                if name in missing:
                    continue
                os.sync()  # what others have left unsynced is not for this one to wait for
                if name in stores:
                    _own_round(stores[name], case, times[name])
                    continue
                try:
                    for verb in ("save", "load"):
                        times[name][verb].append(running[name].ask(verb))
                except StoreError as error:
                    missing[name] = str(error)
                    del times[name]
            progress.advance(task)
    return times


def _own(folder: Path, case: Case, sync: bool) -> DirectoryStore:
    store = DirectoryStore(folder, case.geometry, FINGERPRINT, replace(settings_for(case, "auto", "auto"), sync=sync))
    store.register(case.arena)
    return store


def _own_round(store: DirectoryStore, case: Case, ours: Times) -> None:
    for block in case.blocks:
        store.remove(block.key)
    case.arena[:] = case.wanted
    ours["save"].append(timed(lambda: save(store, case)))
    case.forget()
    ours["load"].append(timed(lambda: load_requests(store, case)))
    case.check()


def _document(case: Case, times: dict[str, Times], peaks: dict[str, int], missing: dict[str, str]) -> dict[str, Any]:
    """Ratios say how many times as fast ours is: `ours_save_ratio` when it syncs, `unsynced_save_ratio` when it does not."""
    does = {peer.name: peer.does for peer in PEERS}
    does |= {name: f"directory, around the page cache, {'durable' if sync else 'not synced'}, checksums" for name, sync in OURS.items()}
    durable, unsynced = OURS
    stores: dict[str, Any] = {}
    for name, own in times.items():
        stores[name] = {f"{verb}_gbps": case.arena.nbytes / median(own[verb]) / 1e9 for verb in own}
        if name not in OURS:
            stores[name] |= {f"ours_{verb}_ratio": ratio(own[verb], times[durable][verb]) for verb in own}
            stores[name]["unsynced_save_ratio"] = ratio(own["save"], times[unsynced]["save"])
        stores[name] |= {"peak_bytes": peaks[name], "does": does[name]}
    return {"block_bytes": case.block_bytes, "blocks": len(case.blocks), "stores": stores, "missing": missing}


def _row(name: str, row: dict[str, Any]) -> list[str]:
    ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("ours_save_ratio", "unsynced_save_ratio", "ours_load_ratio")]
    return [name, f"{row['save_gbps']:.2f}", f"{row['load_gbps']:.2f}", *ratios, str(row["peak_bytes"] >> 20), row["does"]]
