"""The cheapest cluster that serves a workload within its latency targets, found by simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dualpath_ray.simulation.cluster_spec import ClusterSpec
from dualpath_ray.simulation.experiment import Experiment, run
from dualpath_ray.simulation.simulator import DoesNotFit
from policies.pd_ratio import violations


def plan(
    base: Experiment,
    most_gpus: int,
    ttft_s: float,
    tpot_s: float,
    modes: tuple[str, ...] = ("ours", "split"),
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Try clusters of `base.aps` agents per second from small to large, up to `most_gpus`.

    Returns the first size at which some prefill/decode split and read mode meets mean TTFT and TPOT, with all runs of that size, or the
    nearest miss with what binds it; `choice` is None where the model fits in no cluster, and `too_small` says why. Sizes are tried by
    doubling and then bisection, splits from the one closest to 1:2 outwards.
    """
    gpus = base.cluster.node.gpus
    most_nodes = most_gpus // gpus
    tried: list[dict[str, Any]] = []
    too_small = ""

    def feasible(nodes: int) -> dict[str, Any] | None:
        nonlocal too_small
        for prefill in sorted(range(1, nodes), key=lambda p: abs(p / nodes - 1 / 3))[:3]:
            cluster = base.cluster.model_copy(update={"prefill_nodes": prefill, "decode_nodes": nodes - prefill})
            for mode in modes:
                note(f"{prefill}P{nodes - prefill}D {mode}")
                try:
                    result = _try(base, cluster, mode, ttft_s, tpot_s)
                except DoesNotFit as error:
                    too_small = str(error)
                    note(too_small)
                    break
                tried.append(result)
                if result["meets"]:
                    return result
        return None

    low, high, best = 2, 2, None
    while high <= most_nodes and best is None:
        best = feasible(high)
        if best is None:
            low, high = high + 1, min(high * 2, most_nodes) if high < most_nodes else most_nodes + 1
    while best is not None and low < high:
        middle = (low + high) // 2
        smaller = feasible(middle)
        if smaller is not None:
            best, high = smaller, middle
        else:
            low = middle + 1
    nearest = min(tried, key=lambda r: r["excess"], default=None)
    chosen = best if best is not None else nearest
    return {"found": best is not None, "choice": chosen, "tried": tried, "too_small": too_small}


def _try(base: Experiment, cluster: ClusterSpec, mode: str, ttft_s: float, tpot_s: float) -> dict[str, Any]:
    result = run(base.model_copy(update={"cluster": cluster, "mode": mode}))
    ttft = result["ttft_s"].get("mean", float("inf"))
    tpot = result["tpot_s"].get("mean", float("inf"))
    excess = max(ttft / ttft_s, tpot / tpot_s, 2.0 if result["overloaded"] else 0.0)
    return {
        "prefill_nodes": cluster.prefill_nodes,
        "decode_nodes": cluster.decode_nodes,
        "gpus": (cluster.prefill_nodes + cluster.decode_nodes) * cluster.node.gpus,
        "mode": mode,
        "meets": excess <= 1.0,
        "excess": excess,
        "ttft_s": result["ttft_s"],
        "tpot_s": result["tpot_s"],
        **_binding(cluster, result, tpot / tpot_s),
    }


RELIEF = {
    "storage NIC": "read on more nodes (mode split or pool), or add nodes of either kind",
    "prefill compute": "add prefill nodes",
    "decode step": "add decode nodes",
    "decode memory": "add decode nodes, or GPUs with more memory",
}


def _binding(cluster: ClusterSpec, result: dict[str, Any], step_share: float) -> dict[str, Any]:
    """Which resource is closest to its limit, and what relieves it.

    The storage NICs' share is the utilisation of the NICs that read most; that of prefill compute (decode memory) the share of time in
    which requests were ready but found no room in the pass (in memory); that of the decode step its time over the target.
    """
    node = cluster.node
    shares = {
        "storage NIC": max(result["snic_utilisation"]),
        "prefill compute": result["prefill_full"],
        "decode step": min(1.0, step_share),
        "decode memory": result["decode_full"],
    }
    binds = max(shares, key=lambda name: shares[name])
    bandwidths = node.snic_bytes_per_s, node.cnic_bytes_per_s, node.dram_bytes_per_s
    warnings = violations(cluster.prefill_nodes, cluster.decode_nodes, node.gpus, *bandwidths)
    return {"binds": binds, "relief": RELIEF[binds], "shares": shares, "ratio_warnings": warnings}
