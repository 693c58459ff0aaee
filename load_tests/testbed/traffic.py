"""How the sending end of a link is shaped: arguments of `tc` for one device.

`one_class` is a plain rate limit. `two_classes` stands for the virtual lanes of a compute fabric (paper section 5): packets with the DSCP
of model traffic (setting traffic.model.dscp) go first and have 99 % of the rate for certain; everything else, KV that is, gets 1 % for
certain and whatever model traffic leaves. What it lacks of a real fabric: flow control by credits, and arbitration inside switches.
"""

from __future__ import annotations

from dualpath_ray.config.traffic import TrafficSettings

BURST_BYTES = 256 << 10  # at most 20 ms at 100 Mbit/s
SMALL_BURST_BYTES = 18_000  # two frames: KV that has left the queue is not in front of model traffic for long
QUEUE_BYTES = 32 << 20  # more than is ever under way: a lossless fabric, as storage and compute networks are, drops nothing
MODEL_TOS = TrafficSettings().model.dscp << 2  # the DSCP's place in the IPv4 type-of-service byte
MODEL_SHARE = 0.99

Commands = list[list[str]]


def one_class(device: str, bits_per_s: int, burst: int = BURST_BYTES) -> Commands:
    return [["qdisc", "replace", "dev", device, "root", "tbf", *_rate(bits_per_s), "burst", str(burst), "limit", str(QUEUE_BYTES)]]


def two_classes(device: str, bits_per_s: int) -> Commands:
    model = round(bits_per_s * MODEL_SHARE)
    burst, ceiling = ["burst", str(SMALL_BURST_BYTES), "cburst", str(SMALL_BURST_BYTES)], ["ceil", f"{bits_per_s}bit"]
    lane = ["class", "add", "dev", device, "parent"]
    return [
        ["qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "20"],
        [*lane, "1:", "classid", "1:1", "htb", *_rate(bits_per_s), *ceiling, *burst],
        [*lane, "1:1", "classid", "1:10", "htb", *_rate(model), *ceiling, *burst, "prio", "0"],
        [*lane, "1:1", "classid", "1:20", "htb", *_rate(bits_per_s - model), *ceiling, *burst, "prio", "1"],
        ["qdisc", "add", "dev", device, "parent", "1:10", "bfifo", "limit", str(QUEUE_BYTES)],
        ["qdisc", "add", "dev", device, "parent", "1:20", "bfifo", "limit", str(QUEUE_BYTES)],
        [
            "filter",
            "add",
            "dev",
            device,
            "parent",
            "1:",
            "protocol",
            "ip",
            "u32",
            "match",
            "ip",
            "tos",
            hex(MODEL_TOS),
            "0xfc",
            "flowid",
            "1:10",
        ],
    ]


def _rate(bits_per_s: int) -> list[str]:
    return ["rate", f"{bits_per_s}bit"]
