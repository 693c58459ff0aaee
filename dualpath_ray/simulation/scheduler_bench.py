"""How fast the live scheduler's decision core is at the scale of the paper's largest run (48P96D, its Figure 15)."""

from __future__ import annotations

import random
import time
from typing import Any

import psutil

from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation.node_spec import NodeSpec
from policies.core import SchedulerCore
from policies.settings import ReadMode, SchedulingSettings
from policies.vocabulary import EngineLoad, NodeLoad, RequestDemand

PAPER_PROMPT_TOKENS_S = 6.2e7  # plateau of Figure 15
PAPER_CONTEXT = 25_120  # mean context per turn of the 48K set
REPORT_EVERY_S = 1.0
SERVICE_S = 6.0  # mean time from assignment to the end of a turn
BLOCK_TOKENS = 64


def bench(engines: int, rate: float | None = None, seconds: float = 5.0, read_mode: ReadMode = "split", seed: int = 0) -> dict[str, Any]:
    """Drive a core with `engines` engines (a third prefill) at `rate` requests/s (default: the paper's) for `seconds` of its clock.

    Every request is submitted, decided, and ended by its three events; every engine and node reports once a second. Decision times are
    CPU time of `submit` + `decide` per request (`decision_wall_p99_s`: wall time, which a busy machine prolongs); cores are process
    CPU time of all of it per second of the driven clock.
    """
    rate = rate if rate is not None else PAPER_PROMPT_TOKENS_S / PAPER_CONTEXT * engines / 1152
    gpus = NodeSpec().gpus
    nodes = max(2, engines // gpus)
    prefill_nodes = max(1, nodes // 3)
    core = SchedulerCore(SchedulingSettings(read_mode=read_mode, beta_tokens=2_000_000, hbm_promise="decode", report_timeout_s=10.0))
    names = [f"p{i}" if i < prefill_nodes else f"d{i}" for i in range(nodes)]
    rng = random.Random(seed)
    decisions: list[float] = []
    walls: list[float] = []
    ends: dict[int, list[str]] = {}
    process = psutil.Process()
    slot = 0.01
    placed = 0
    _report(core, names, 0.0, gpus)
    cpu, wall = time.process_time(), time.perf_counter()
    for tick in range(int(seconds / slot)):
        now = tick * slot
        if tick % int(REPORT_EVERY_S / slot) == 0 and tick:
            _report(core, names, now, gpus)
        for request_id in ends.pop(tick, ()):
            core.reads_done(request_id)
            core.prefill_done(request_id)
            core.finish(request_id)
        for i in range(int((tick + 1) * slot * rate) - int(tick * slot * rate)):
            context = rng.randint(2_000, 2 * PAPER_CONTEXT)
            request_id = f"{tick}.{i}"
            demand = RequestDemand(request_id, context + 400, context // BLOCK_TOKENS, BLOCK_TOKENS, 200, now, now + 600.0)
            before, clock = time.thread_time(), time.perf_counter()
            core.submit(demand)
            made = core.decide(now)
            decisions.append(time.thread_time() - before)
            walls.append(time.perf_counter() - clock)
            placed += len(made)
            for assignment in made:
                ends.setdefault(tick + 1 + int(rng.expovariate(1 / SERVICE_S) / slot), []).append(assignment.request_id)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if not decisions:
        raise ConfigError(f"rate: no request arrives within {seconds:g} s at {rate:g} a second; raise it, or seconds")
    decisions.sort()
    walls.sort()
    return {
        "engines": nodes * gpus,
        "rate": rate,
        "decisions": placed,
        "decisions_per_s": placed / wall,
        "decision_p50_s": decisions[len(decisions) // 2],
        "decision_p99_s": decisions[int(len(decisions) * 0.99)],
        "decision_wall_p99_s": walls[int(len(walls) * 0.99)],
        "cores_at_paper_rate": cpu / seconds,
        "rss_bytes": process.memory_info().rss,
        "still_queued": core.queued,
    }


def _report(core: SchedulerCore, names: list[str], now: float, gpus: int) -> None:
    """Reports of every engine and node that confirm what the core accounts."""
    for name in names:
        for g in range(gpus):
            engine = f"{name}e{g}"
            if name.startswith("p"):
                core.update_engine(EngineLoad(engine, name, "prefill", 0, 0, 0, now))
            else:
                core.update_engine(EngineLoad(engine, name, "decode", 0, 0, 470_000, now))
        core.update_node(NodeLoad(name, 0, 0, 49e9, 49e9, 200_000, 200_000, now))
