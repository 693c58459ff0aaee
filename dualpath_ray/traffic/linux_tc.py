"""Linux: classes of the hierarchical token bucket on a host's own interface, chosen by DSCP.

For TCP between hosts without a fabric that knows classes. What leaves this host is divided; what others send to it is theirs to
divide. It has no lossless flow control and no arbitration inside the network: a stand-in for virtual lanes in bandwidth only.
"""

from __future__ import annotations

import re

from dualpath_ray.config.traffic import TrafficSettings
from dualpath_ray.traffic.classes import KV_CLASSES, TrafficClass
from dualpath_ray.traffic.finding import Files, Finding, Source

UNITS = {"bit": 1, "Kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "Tbit": 1e12}
DEFAULT_CLASS = 10  # everything that is not KV
KV_PERMILLE = 10  # of the link that each KV class keeps when others are busy


def htb_classes(traffic: TrafficSettings) -> dict[TrafficClass, int]:
    """Minor number of the class that each KV class has."""
    numbers = {TrafficClass.KV_READ: 20, TrafficClass.KV_WRITE: 30}
    if traffic.kv_read.dscp == traffic.kv_write.dscp:
        numbers[TrafficClass.KV_WRITE] = numbers[TrafficClass.KV_READ]
    return numbers


def commands(traffic: TrafficSettings, device: str, bits_per_s: float) -> list[list[str]]:
    """The `tc` commands, in order; the first one replaces what was there."""
    numbers = htb_classes(traffic)
    used = sorted(set(numbers.values()))
    least = bits_per_s * KV_PERMILLE / 1000
    result = [
        f"tc qdisc replace dev {device} root handle 1: htb default {DEFAULT_CLASS}",
        f"tc class replace dev {device} parent 1: classid 1:1 htb rate {_rate(bits_per_s)} ceil {_rate(bits_per_s)}",
        f"tc class replace dev {device} parent 1:1 classid 1:{DEFAULT_CLASS} htb rate {_rate(bits_per_s - least * len(used))} "
        f"ceil {_rate(bits_per_s)} prio 0",
    ]
    for rank, number in enumerate(used, start=1):
        result.append(
            f"tc class replace dev {device} parent 1:1 classid 1:{number} htb rate {_rate(least)} ceil {_rate(bits_per_s)} prio {rank}"
        )
    for rank, each in enumerate(KV_CLASSES):
        tos = traffic.of(each).dscp << 2
        match = f"flowid 1:{numbers[each]}"
        result.append(f"tc filter replace dev {device} parent 1: protocol ip prio {10 + rank} u32 match ip dsfield {tos:#04x} 0xfc {match}")
        result.append(
            f"tc filter replace dev {device} parent 1: protocol ipv6 prio {20 + rank} u32 match ip6 priority {tos:#04x} 0xfc {match}"
        )
    return [line.split() for line in result]


def render(traffic: TrafficSettings, device: str, bits_per_s: float) -> Files:
    lines = ["#!/bin/sh", f"# Traffic classes of dualpath_ray on {device}: KV by its DSCP, everything else before it.", "set -e"]
    return {"tc.sh": "\n".join(lines + [" ".join(words) for words in commands(traffic, device, bits_per_s)]) + "\n"}


def sources(traffic: TrafficSettings, device: str, bits_per_s: float | None) -> list[Source]:
    """Checks of an interface; without a bandwidth the classes' order only."""
    return [
        Source("class", ("tc", "class", "show", "dev", device), lambda text: check_classes(text, traffic, bits_per_s)),
        Source("filter", ("tc", "filter", "show", "dev", device), lambda text: check_filters(text, traffic)),
    ]


def check_classes(text: str, traffic: TrafficSettings, bits_per_s: float | None) -> list[Finding]:
    """From `tc class show`: which class goes first, and that KV may use the whole link when it is idle."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r"class htb 1:(\w+) .*?(?:prio (\d+))? *rate (\S+) ceil (\S+)", line):
            found[int(match[1], 16)] = (match[2], _bits(match[4]))
    findings = []
    order = [DEFAULT_CLASS, *sorted(set(htb_classes(traffic).values()))]
    for rank, number in enumerate(order):
        seen = found.get(int(str(number), 16))
        findings.append(Finding(f"priority of class 1:{number}", str(rank), None if seen is None else seen[0]))
        if bits_per_s is not None:
            findings.append(Finding(f"ceiling of class 1:{number}", _rate(bits_per_s), None if seen is None else _rate(seen[1])))
    return findings


def check_filters(text: str, traffic: TrafficSettings) -> list[Finding]:
    """From `tc filter show`: the class of each KV class's DSCP."""
    found = {
        int(value[2:4], 16) >> 2: target
        for target, value in re.findall(r"protocol ip .*?flowid (1:\w+)[^\n]*\n\s*match (\w{8})/00fc0000 at 0", text)
    }
    return [
        Finding(f"class of DSCP {traffic.of(each).dscp} ({each})", f"1:{htb_classes(traffic)[each]}", found.get(traffic.of(each).dscp))
        for each in KV_CLASSES
    ]


def _rate(bits: float) -> str:
    return f"{int(bits)}bit"


def _bits(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)(\w+)", text)
    return float(match[1]) * UNITS.get(match[2], 0) if match else 0.0
