"""Classes of a shaped link under RDMA: the rules that `dualpath qos render --fabric linux-tc` writes sort RoCE packets by their DSCP.

Soft-RoCE sends through its interface's queueing discipline, so the token bucket arbitrates between the classes as it does over TCP. What an
exchange in the model's class takes, with and without KV that fills the link, goes into /out/classes.json, which the host prints; nothing
here fails because of a time.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

from dualpath_ray.config.traffic import TrafficSettings
from dualpath_ray.rdma.loopback import Copy, LoopbackCopier
from dualpath_ray.rdma.sysfs import read_machine
from dualpath_ray.traffic import linux_tc
from dualpath_ray.traffic.classes import TrafficClass
from dualpath_ray.transfer.memory import allocate

LINK, BITS_PER_S = "v0", 40e6
PIECE, CHAIN = 4096, 128  # one packet each
EXCHANGES, PERIOD_S = 50, 0.02
TRAFFIC = TrafficSettings()
LEAVES = (linux_tc.DEFAULT_CLASS, *sorted(set(linux_tc.htb_classes(TRAFFIC).values())))
KV_CLASS = linux_tc.htb_classes(TRAFFIC)[TrafficClass.KV_READ]


@contextmanager
def connection(traffic: TrafficClass) -> Iterator[tuple[LoopbackCopier, np.ndarray]]:
    """From the first device to the second, in a class; the second half of the memory is the target."""
    memory = allocate(2 * PIECE * CHAIN)
    memory[: PIECE * CHAIN] = np.random.default_rng(1).integers(0, 256, PIECE * CHAIN, dtype=np.uint8)
    machine = read_machine()
    first, second = machine.port("rxe0"), machine.port("rxe1")
    assert first and second
    copier = LoopbackCopier(first, (memory.ctypes.data, memory.nbytes), TRAFFIC.of(traffic).marking, to=second)
    try:
        yield copier, memory
    finally:
        copier.close()


def pieces(memory: np.ndarray, count: int) -> list[Copy]:
    base = memory.ctypes.data
    return [Copy(base + i * PIECE, base + (CHAIN + i) * PIECE, PIECE) for i in range(count)]


@contextmanager
def kv_load() -> Iterator[None]:
    """Copies in KV's class without a pause."""
    stop = threading.Event()
    with connection(TrafficClass.KV_READ) as (copier, memory):

        def run() -> None:
            chain = copier.prepare(pieces(memory, CHAIN))
            while not stop.is_set():
                copier.post(chain)
                copier.wait(pause_s=0.001)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            time.sleep(0.5)  # the link's queue fills
            yield
        finally:
            stop.set()
            thread.join(60)
        np.testing.assert_array_equal(memory[PIECE * CHAIN :], memory[: PIECE * CHAIN])


def exchange_times() -> list[float]:
    """Seconds from posting one packet in the model's class until it is acknowledged."""
    times = []
    with connection(TrafficClass.MODEL) as (copier, memory):
        chain = copier.prepare(pieces(memory, 1))
        for _ in range(EXCHANGES):
            start = time.monotonic()
            copier.post(chain)
            copier.wait()
            times.append(time.monotonic() - start)
            time.sleep(PERIOD_S)
        np.testing.assert_array_equal(memory[PIECE * CHAIN : PIECE * (CHAIN + 1)], memory[:PIECE])
    return times


def class_bytes() -> dict[int, int]:
    """What each class of the link has sent, by its minor number."""
    shown = subprocess.run(["tc", "-s", "class", "show", "dev", LINK], capture_output=True, text=True, check=True).stdout
    return {int(number): int(sent) for number, sent in re.findall(r"class htb 1:(\d+) .*?\n Sent (\d+) bytes", shown)}


@contextmanager
def shaped(classes: bool) -> Iterator[None]:
    """The link at its rate. Without classes all packets wait in one queue, the model's."""
    rules = linux_tc.commands(TRAFFIC, LINK, BITS_PER_S)
    try:
        for rule in rules if classes else [rule for rule in rules if rule[1] != "filter"]:
            subprocess.run(rule, check=True)
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", LINK, "root"], check=True)


def test_kv_over_rdma_keeps_to_its_class() -> None:
    subprocess.run(["modprobe", "-a", "sch_htb", "cls_u32"], check=True)
    figures: dict[str, dict[str, float]] = {}
    for classes in (True, False):
        with shaped(classes):
            for source in linux_tc.sources(TRAFFIC, LINK, BITS_PER_S) if classes else ():  # what `dualpath qos check` looks at
                shown = subprocess.run(source.command, capture_output=True, text=True, check=True).stdout
                assert all(finding.ok for finding in source.compare(shown)), shown
            for load in (nullcontext, kv_load):
                with load():
                    before, start = class_bytes(), time.monotonic()
                    times = exchange_times()
                    seconds, after = time.monotonic() - start, class_bytes()
                sent = {number: after[number] - before[number] for number in after}
                figures[f"{'two classes' if classes else 'one queue'}, {'with' if load is kv_load else 'without'} KV"] = {
                    "mean_ms": 1e3 * statistics.mean(times),
                    "p50_ms": 1e3 * statistics.median(times),
                    "p90_ms": 1e3 * statistics.quantiles(times, n=10)[-1],
                    "link_used": 8 * sum(sent[number] for number in LEAVES) / seconds / BITS_PER_S,
                }
                used = {number for number in LEAVES if sent[number] >= EXCHANGES * PIECE}
                assert used == ({linux_tc.DEFAULT_CLASS, KV_CLASS} if classes and load is kv_load else {linux_tc.DEFAULT_CLASS}), sent
    Path("/out/classes.json").write_text(json.dumps(figures, indent=1), encoding="ascii")
