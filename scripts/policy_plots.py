"""Plots of docs/scheduling.md: what each policy decides, from the policies' own code. `python scripts/policy_plots.py docs/plots`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from policies.admission import AdmissionQueue
from policies.batch_quota import AttentionTimeModel, plan_batch
from policies.core import SchedulerCore
from policies.load_or_recompute import blocks_to_load
from policies.pd_ratio import ratio_limits
from policies.read_plan import ReadCandidate, plan_reads
from policies.rebalancing import rebalance
from policies.scaling import RoleLoad, ScalingLimits, wanted_nodes
from policies.settings import SchedulingSettings
from policies.vocabulary import EngineLoad, NodeLoad, RequestDemand

matplotlib.use("Agg")
from matplotlib import pyplot

BLOCK = 64
HITS = 500  # blocks of the request in the examples: 32,000 tokens
MS = 1e3


def request(name: str = "r", hits: int = HITS, new: int = 400, **fields: Any) -> RequestDemand:
    return RequestDemand(name, hits * BLOCK + new, hits, BLOCK, 200, 0.0, 1e9, **fields)


def prefill_placement(axis: Any) -> None:
    """Assignments of a burst to two nodes of four engines; the first node's read queue is long."""
    core = SchedulerCore(SchedulingSettings(alpha_tokens=300_000, beta_tokens=100_000, read_mode="prefill_only"))
    for node, queue in (("p0", 400_000), ("p1", 0), ("d0", 0)):
        core.update_node(NodeLoad(node, queue, 0, 49e9, 49e9, 0, 0, 0.0))
        for i in range(4):
            role: Any = "decode" if node == "d0" else "prefill"
            core.update_engine(EngineLoad(f"{node}e{i}", node, role, 0, 0, 10_000_000 if role == "decode" else 0, 0.0))
    for i in range(60):
        core.submit(request(f"r{i}"))
    made = core.decide(0.0)
    for node in ("p0", "p1"):
        axis.step(range(len(made)), [sum(m.prefill_node == node for m in made[: i + 1]) for i in range(len(made))], label=node)
    axis.set(title="prefill placement: p0's read queue is long", xlabel="requests placed (then all pass beta)", ylabel="on the node")


def decode_placement(axis: Any) -> None:
    """Tokens of eight decode engines after a burst of requests of mixed length."""
    core = SchedulerCore(SchedulingSettings(beta_tokens=1 << 60))
    for node, role in (("p0", "prefill"), ("d0", "decode")):
        core.update_node(NodeLoad(node, 0, 0, 49e9, 49e9, 0, 0, 0.0))
        for i in range(8):
            start = 60_000 * i if role == "decode" else 0
            core.update_engine(EngineLoad(f"{node}e{i}", node, role, 0, start, 2_000_000 - start, 0.0, 2_000_000))  # type: ignore[arg-type]
    before = [core.engine_account(f"d0e{i}").tokens / 1000 for i in range(8)]
    for i in range(60):
        core.submit(request(f"r{i}", hits=100 + 97 * i % 800))
    core.decide(0.0)
    after = [core.engine_account(f"d0e{i}").tokens / 1000 for i in range(8)]
    axis.bar(range(8), after, label="after 60 requests")
    axis.bar(range(8), before, label="before")
    axis.set(title="decode placement levels tokens", xlabel="decode engine", ylabel="thousand tokens")


def read_plan(axis: Any) -> None:
    """Blocks read by the prefill node as its queue grows; the decode node's stays at 64,000 tokens."""
    queues = range(0, 160_001, 2000)
    for mode in ("prefill_only", "shorter_queue", "split", "pool"):
        blocks = []
        for queue in queues:
            prefill, decode, third = (ReadCandidate(n, q, 49e9, 10_000) for n, q in (("p", queue), ("d", 64_000), ("x", 64_000)))
            plan = plan_reads(request(), prefill, decode, (third,), mode, 8)  # type: ignore[arg-type]
            blocks.append(plan.storage_blocks().get("p", 0))
        axis.plot([queue / 1000 for queue in queues], blocks, label=mode)
    axis.set(title="read plan: 500 blocks, decode queue 64k", xlabel="prefill node's queue, thousand tokens", ylabel="blocks it reads")


def load_or_recompute(axis: Any) -> None:
    """Blocks loaded as the read queue grows, for two speeds of computing."""
    waits = [i / 20 for i in range(101)]
    for token_s in (20e-6, 65e-6):
        model = AttentionTimeModel(per_pair_s=0.5e-9, per_token_s=token_s)
        loaded = [blocks_to_load(HITS, 400, BLOCK, lambda n, w=wait: w + n * 50e-6, model) for wait in waits]  # type: ignore[misc]
        axis.plot(waits, loaded, label=f"{token_s * 1e6:.0f} us per token")
    axis.set(title="load or recompute", xlabel="read queue in front, s", ylabel="of 500 hit blocks loaded")


def batch_quota(axis: Any) -> None:
    """New tokens in a batch against their context."""
    model = AttentionTimeModel(per_pair_s=3e-9, per_token_s=0.078e-3)
    contexts = range(0, 65_536, 1024)
    for quota in (0.1, 0.3):
        axis.plot(
            [c / 1000 for c in contexts],
            [plan_batch([(c, 16_384)], model, quota, 16_384, BLOCK)[0] for c in contexts],
            label=f"{quota * MS:.0f} ms",
        )
    axis.set(title="batch quota: chunk of a long prompt", xlabel="tokens before it, thousand", ylabel="tokens computed")


def rebalancing(axis: Any) -> None:
    """Loads before and after, one engine behind."""
    load = {f"e{i}": value for i, value in enumerate((160.0, 40.0, 30.0, 20.0))}
    movable = {"e0": [(f"r{i}", 20.0) for i in range(7)]}
    after = dict(load)
    for move in rebalance(load, movable, 0.0, 0.3):
        after[move.source] -= 20.0
        after[move.target] += 20.0
    axis.bar([i - 0.2 for i in range(4)], list(load.values()), 0.4, label="before")
    axis.bar([i + 0.2 for i in range(4)], list(after.values()), 0.4, label="after")
    axis.set(title="rebalancing, hysteresis 0.3", xlabel="prefill engine", ylabel="thousand tokens")


def admission(axis: Any) -> None:
    """Tokens served to two tenants; one sends ten times as many requests."""
    queue = AdmissionQueue(1000, 100_000)
    for i in range(100):
        queue.push(f"many{i}", "many", 30_000)
    for i in range(10):
        queue.push(f"few{i}", "few", 30_000)
    served = {"many": [0], "few": [0]}
    while (name := queue.pop()) is not None:
        for tenant, tokens in served.items():
            tokens.append(tokens[-1] + (30 if name.startswith(tenant) else 0))
    for tenant, tokens in served.items():
        axis.plot(tokens[:50], label=f"tenant with {'100' if tenant == 'many' else '10'} requests")
    axis.set(title="admission: turns of 100k tokens", xlabel="requests served", ylabel="thousand tokens served")


def scaling(axis: Any) -> None:
    """Wanted nodes against utilisation, short queue."""
    shares = [i / 100 for i in range(101)]
    for nodes in (2, 4, 8):
        axis.plot(shares, [wanted_nodes(RoleLoad(nodes, share, 0.0, 100), ScalingLimits()) for share in shares], label=f"{nodes} nodes")
    axis.set(title="scaling (short queue)", xlabel="utilisation", ylabel="wanted nodes")


def pd_range(axis: Any) -> None:
    """Smallest and largest P/D against the storage bandwidth."""
    shares = [i / 20 for i in range(4, 70)]
    limits = [ratio_limits(8, share * 49e9, 49e9, 500e9) for share in shares]
    axis.fill_between(shares, [x.least for x in limits], [max(x.least, x.most) for x in limits], alpha=0.4, label="storage NICs bind")
    axis.set(title="P/D range, 8 GPUs, 500 GB/s DRAM", xlabel="storage NIC / compute NIC", ylabel="P/D", yscale="log")


PANELS: tuple[Callable[[Any], None], ...] = (
    prefill_placement,
    decode_placement,
    read_plan,
    load_or_recompute,
    batch_quota,
    rebalancing,
    admission,
    scaling,
    pd_range,
)


def main() -> None:
    figure, axes = pyplot.subplots(3, 3, figsize=(15, 11))
    for draw, axis in zip(PANELS, axes.flat, strict=True):
        draw(axis)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(sys.argv[1]) / "policies.png", dpi=80)


if __name__ == "__main__":
    main()
