"""The range of prefill to decode nodes in which no link but the storage NICs can be the bottleneck (paper section 4.2).

Symbols: g GPUs (and compute NICs) per node, storage bandwidth per node = s * compute NIC bandwidth B, memory bandwidth per node M.
Conditions on r = P / D, one per resource; the first is corrected: the loop-back read and the copy to the decode node both leave through
the prefill node's compute NICs, 2 * B * s / g <= B, so s <= g / 2 (the paper prints s <= g).

    prefill NIC out:  s <= g / 2
    prefill NIC in:   r >= s / (g - s)
    decode NIC out:   r <= (g - 2s) / s
    decode NIC in:    r <= (g - s) / (2s)
    prefill memory:   2 s B <= M
    decode memory:    r <= (M / (s B) - 3) / 2
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RatioLimits:
    """Smallest and largest P/D, and whether the two conditions that do not depend on P/D hold."""

    least: float
    most: float
    prefill_nic_ok: bool
    prefill_memory_ok: bool


def ratio_limits(gpus: int, snic_bandwidth: float, cnic_bandwidth: float, memory_bandwidth: float) -> RatioLimits:
    """The range for a node type; bandwidths in bytes/s. An empty range has least > most."""
    s = snic_bandwidth / cnic_bandwidth
    least = s / (gpus - s) if gpus > s else float("inf")
    most = min((gpus - 2 * s) / s, (gpus - s) / (2 * s), (memory_bandwidth / snic_bandwidth - 3) / 2)
    return RatioLimits(least, most, s <= gpus / 2, 2 * snic_bandwidth <= memory_bandwidth)


def violations(
    prefill_nodes: int, decode_nodes: int, gpus: int, snic_bandwidth: float, cnic_bandwidth: float, memory_bandwidth: float
) -> list[str]:
    """A sentence per violated row, naming the resource; empty if the storage NICs are the only possible bottleneck."""
    s = snic_bandwidth / cnic_bandwidth
    ratio = prefill_nodes / decode_nodes
    rows = [
        (s <= gpus / 2, f"prefill NIC out: storage bandwidth is {s:g} compute NICs, more than half of {gpus}"),
        (gpus > s and ratio >= s / (gpus - s), f"prefill NIC in: P/D = {ratio:g} is too small; use more prefill nodes"),
        (ratio <= (gpus - 2 * s) / s, f"decode NIC out: P/D = {ratio:g} is above {(gpus - 2 * s) / s:g}; use more decode nodes"),
        (ratio <= (gpus - s) / (2 * s), f"decode NIC in: P/D = {ratio:g} is above {(gpus - s) / (2 * s):g}; use more decode nodes"),
        (2 * snic_bandwidth <= memory_bandwidth, "prefill memory: bandwidth is below twice the storage bandwidth"),
        (
            ratio <= (memory_bandwidth / snic_bandwidth - 3) / 2,
            f"decode memory: P/D = {ratio:g} is above {(memory_bandwidth / snic_bandwidth - 3) / 2:g}; use more decode nodes",
        ),
    ]
    return [sentence for holds, sentence in rows if not holds]
