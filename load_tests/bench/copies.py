"""`dualpath bench copies`: what it costs to hand over many small copies, by every way that this machine has.

Layer Blocks make KV copies small and many. The paper (section 5) gives 5 to 7 us for submitting one cudaMemcpyAsync and about 1 us for one
RDMA write, less when many share a doorbell. *Submission* is the time that the calling thread is busy until all copies of a batch are
handed over; for ways that copy within the call (memcpy, NIXL over shared memory) it contains the copying. *Total* ends when all have
landed.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from dualpath_ray.errors import DualPathError
from dualpath_ray.rdma.loopback import MAX_CHAIN, Copy, LoopbackCopier
from dualpath_ray.rdma.sysfs import read_machine
from dualpath_ray.traffic.classes import Marking
from dualpath_ray.transfer.memory import allocate
from dualpath_ray.transfer.nixl_api import make_agent
from dualpath_ray.transfer.transports import SHARED_MEMORY
from load_tests.bench.figures import median, show
from load_tests.experiments.plots import figure

COUNTS = tuple(1 << power for power in range(11))  # 1 to 1024
KV_MARKING = Marking(2, 18)
Batch = Callable[[], Callable[[], None]]  # submits, and returns what waits for the end


@dataclass(frozen=True, slots=True)
class Way:
    """One way to copy: `batch(count)` prepares what may be kept between batches and returns what is timed."""

    name: str
    batch: Callable[[int], Batch]


class Memory:
    """Pieces of the first half go to scattered places of the second one."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.bytes = allocate(2 * nbytes * MAX_CHAIN)
        self.bytes[: nbytes * MAX_CHAIN] = np.random.default_rng(1).integers(0, 256, nbytes * MAX_CHAIN, dtype=np.uint8)
        self.order = np.random.default_rng(2).permutation(MAX_CHAIN).astype(np.int32)
        self.source = self.bytes.ctypes.data
        self.target = self.source + nbytes * MAX_CHAIN

    def copies(self, count: int) -> list[Copy]:
        size = self.nbytes
        return [Copy(self.source + i * size, self.target + int(self.order[i]) * size, size) for i in range(count)]

    def forget(self) -> None:
        self.bytes[self.nbytes * MAX_CHAIN :] = 0

    def arrived(self, count: int) -> bool:
        halves = self.bytes.reshape(2, MAX_CHAIN, self.nbytes)
        return bool((halves[1][self.order[:count]] == halves[0][:count]).all())


def nothing() -> None:
    """For ways that have copied when the call returns."""


def memcpy(memory: Memory) -> Way:
    def batch(count: int) -> Batch:
        arguments = [(copy.target, copy.source, copy.nbytes) for copy in memory.copies(count)]

        def submit() -> Callable[[], None]:
            for target, source, nbytes in arguments:
                ctypes.memmove(target, source, nbytes)
            return nothing

        return submit

    return Way("memcpy", batch)


def nixl(memory: Memory) -> Way:
    """A prepared transfer between two agents, as KV is pushed between processes; over whatever UCX chooses."""
    agents: list[Any] = [make_agent(name, progress_thread_delay_us=1000, backends=("UCX",)) for name in ("near", "far")]
    for agent in agents:
        agent.register_memory([(memory.source, memory.bytes.nbytes, 0, "")], "DRAM")
    near, far = agents
    near.add_remote_agent(far.get_agent_metadata())
    size = memory.nbytes
    local = near.prep_xfer_dlist("NIXL_INIT_AGENT", np.array([[memory.source, size, 0, size, MAX_CHAIN]], dtype=np.uint64), "DRAM")
    remote = near.prep_xfer_dlist("far", np.array([[memory.target, size, 0, size, MAX_CHAIN]], dtype=np.uint64), "DRAM")

    def batch(count: int) -> Batch:
        indices = np.arange(count, dtype=np.int32)

        def submit(far: Any = far) -> Callable[[], None]:  # which must stay alive
            handle = near.make_prepped_xfer("WRITE", local, indices, remote, memory.order[:count], b"")
            state = near.transfer(handle)

            def wait() -> None:
                current = state
                while current != "DONE":
                    current = near.check_xfer_state(handle)
                handle.release()

            return wait

        return submit

    return Way("nixl", batch)


def loopback(memory: Memory) -> Iterator[Way]:
    """RDMA through each active port, posted one by one and as one chain. Chains are prepared anew each time, as real ones would be."""
    for port in read_machine().active_ports:
        try:
            copier = LoopbackCopier(port, (memory.source, memory.bytes.nbytes), KV_MARKING)
        except DualPathError as error:
            click.echo(f"no loop-back over {port.ucx_name}: {error}", err=True)
            continue

        def chained(count: int, copier: LoopbackCopier = copier) -> Batch:
            copies = memory.copies(count)

            def submit() -> Callable[[], None]:
                copier.post(copier.prepare(copies))
                return copier.wait

            return submit

        def posted(count: int, copier: LoopbackCopier = copier) -> Batch:
            chain = copier.prepare(memory.copies(count))

            def submit() -> Callable[[], None]:
                copier.post(chain)
                return copier.wait

            return submit

        yield Way(f"verbs {port.ucx_name}, prepared", posted)
        yield Way(f"verbs {port.ucx_name}", chained)


def cuda(memory: Memory) -> Iterator[Way]:
    """Host to device by PyTorch's non-blocking copies: cudaMemcpyAsync with the call cost of PyTorch."""
    import torch

    if not torch.cuda.is_available():
        return
    source = torch.from_numpy(memory.bytes).pin_memory().view(2, MAX_CHAIN, memory.nbytes)[0]
    target = torch.empty((MAX_CHAIN, memory.nbytes), dtype=torch.uint8, device="cuda")

    def batch(count: int) -> Batch:
        pairs = [(target[int(memory.order[i])], source[i]) for i in range(count)]

        def submit() -> Callable[[], None]:
            for there, here in pairs:
                there.copy_(here, non_blocking=True)
            return torch.cuda.synchronize

        return submit

    yield Way("cuda", batch)


def measure(way: Way, memory: Memory, rounds: int) -> list[dict[str, float]]:
    """Medians of rounds for each count, in microseconds per copy."""
    rows = []
    for count in COUNTS:
        submit = way.batch(count)
        memory.forget()
        submit()()  # connections and page faults
        if way.name != "cuda" and not memory.arrived(count):
            raise DualPathError(f"{way.name} did not copy what it was told to")
        submitted, total = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            wait = submit()
            middle = time.perf_counter()
            wait()
            end = time.perf_counter()
            submitted.append(1e6 * (middle - start) / count)
            total.append(1e6 * (end - start) / count)
        rows.append({"count": count, "submit_us": median(submitted), "total_us": median(total)})
    return rows


def crossover(one: list[dict[str, float]], other: list[dict[str, float]]) -> int | None:
    """The smallest count from which on `one` costs less to submit than `other`; None if there is none."""
    better = [mine["submit_us"] < theirs["submit_us"] for mine, theirs in zip(one, other, strict=True)]
    index = len(better)
    while index and better[index - 1]:
        index -= 1
    return int(one[index]["count"]) if index < len(better) else None


def draw(results: dict[str, list[dict[str, float]]], nbytes: int, path: Path) -> None:
    with figure(path, columns=2, size=(10, 4)) as (drawn, axes):
        for axis, key, title in ((axes[0][0], "submit_us", "submission"), (axes[0][1], "total_us", "until all have landed")):
            for name, rows in results.items():
                axis.plot([row["count"] for row in rows], [row[key] for row in rows], marker="o", markersize=3, label=name)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(f"copies of {nbytes} B in a batch")
            axis.set_ylabel("us per copy")
            axis.set_title(title)
            axis.grid(alpha=0.3)
        axes[0][0].legend(fontsize=8)
        drawn.tight_layout()


@click.command()
@click.option("--bytes", "nbytes", type=click.IntRange(64, 1 << 20), default=4096, show_default=True, help="Size of each copy.")
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Batches per size; medians are reported.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw a PNG.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(nbytes: int, rounds: int, plot: Path | None, as_json: bool) -> None:
    """Submission cost per copy for 1 to 1024 small copies: memcpy, NIXL, RDMA loop-back, CUDA."""
    os.environ.setdefault("UCX_TLS", ",".join((*SHARED_MEMORY, "tcp", "self")))
    os.environ.setdefault("UCX_SYSV_ERROR_HANDLING", "y")
    memory = Memory(nbytes)
    ways = [memcpy(memory), nixl(memory), *loopback(memory), *cuda(memory)]
    results = {way.name: measure(way, memory, rounds) for way in ways}
    verbs = next((name for name in results if name.startswith("verbs") and not name.endswith("prepared")), None)
    crossovers = {name: crossover(results[verbs], rows) for name, rows in results.items() if name != verbs} if verbs else {}
    document = {"bytes": nbytes, "rounds": rounds, "ways": results, "loopback_cheaper_from": crossovers}
    if plot is not None:
        draw(results, nbytes, plot)
    rows = [
        [name, *(f"{row['submit_us']:.2f} / {row['total_us']:.2f}" for row in measured if row["count"] in (1, 16, 256, 1024))]
        for name, measured in results.items()
    ]
    show(f"us per copy of {nbytes} B: submission / total", document, rows, ["way", "1", "16", "256", "1024"], as_json)
