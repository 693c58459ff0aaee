"""InfiniBand: virtual lanes and their arbitration, set by the subnet manager on every port (paper section 5, IBA 7.6.9).

Lanes of the high-priority table are served first, round robin by weight; KV's lanes have weight 0 there. After `high_limit` units of
4 KiB one packet of the low-priority table gets its turn, so KV is slowed down as long as the model sends, but never starved.
"""

from __future__ import annotations

import re

from dualpath_ray.config.traffic import TrafficSettings
from dualpath_ray.traffic.classes import KV_CLASSES, TrafficClass
from dualpath_ray.traffic.finding import Files, Finding, Source

SERVICE_LEVELS = 16


def high_table(traffic: TrafficSettings) -> dict[int, int]:
    """Weight of each lane in the high-priority table."""
    kv = _kv_lanes(traffic)
    return {lane: 0 if lane in kv else traffic.high_weight for lane in range(traffic.lanes)}


def low_table(traffic: TrafficSettings) -> dict[int, int]:
    """Weight of each lane in the low-priority table: that of its class, the larger one if two share it, the model's for the others."""
    weights = dict.fromkeys(range(traffic.lanes), traffic.model.weight)
    for lane in range(traffic.lanes):
        own = [traffic.of(each).weight for each in TrafficClass if traffic.of(each).sl == lane]
        weights[lane] = max(own, default=weights[lane])
    return weights


def lane_of_service_levels(traffic: TrafficSettings) -> list[int]:
    """A lane for each of the first service levels; the others travel with the model, as all do without lanes."""
    return [level if level < traffic.lanes else traffic.model.sl for level in range(SERVICE_LEVELS)]


def render(traffic: TrafficSettings) -> Files:
    """Options for the subnet manager. They take effect when it starts or gets SIGHUP."""
    lines = [
        "# Virtual lanes for the traffic classes of dualpath_ray; add to opensm.conf on every subnet manager, then restart it.",
        *(f"# {each}: service level {traffic.of(each).sl}" for each in TrafficClass),
        "qos TRUE",
        f"qos_max_vls {traffic.lanes}",
        f"qos_high_limit {traffic.high_limit}",
        f"qos_vlarb_high {_words(high_table(traffic))}",
        f"qos_vlarb_low {_words(low_table(traffic))}",
        f"qos_sl2vl {','.join(map(str, lane_of_service_levels(traffic)))}",
    ]
    return {"opensm.conf": "\n".join(lines) + "\n"}


def sources(traffic: TrafficSettings, lid: int, port: int) -> list[Source]:
    """Checks of the port with this address: what it holds, whatever the subnet manager was told."""
    target = (str(lid), str(port))
    return [
        Source("portinfo", ("smpquery", "portinfo", *target), lambda text: check_port(text, traffic)),
        Source("vlarb", ("smpquery", "vlarb", *target), lambda text: check_arbitration(text, traffic)),
        Source("sl2vl", ("smpquery", "sl2vl", *target), lambda text: check_lanes(text, traffic)),
    ]


def check_port(text: str, traffic: TrafficSettings) -> list[Finding]:
    """From `smpquery portinfo`: enough lanes in operation, and the limit."""
    lanes = re.search(r"^OperVLs:\.*VL0(?:-(\d+))?", text, re.MULTILINE)
    limit = re.search(r"^VLHighLimit:\.*(\d+)", text, re.MULTILINE)
    count = None if lanes is None else int(lanes[1] or 0) + 1
    enough = traffic.lanes if count is not None and count >= traffic.lanes else count
    return [
        Finding("lanes in operation (at least)", str(traffic.lanes), None if enough is None else str(enough)),
        Finding("limit of high priority", str(traffic.high_limit), None if limit is None else limit[1]),
    ]


def check_arbitration(text: str, traffic: TrafficSettings) -> list[Finding]:
    """From `smpquery vlarb`. Tables may name a lane several times: its weights add up."""
    found: dict[str, dict[int, int] | None] = {"Low": None, "High": None}
    for name, lanes, weights in re.findall(r"# (Low|High) priority VL Arbitration Table:\s*\nVL\s*:(.*)\nWEIGHT:(.*)", text):
        table: dict[int, int] = {}
        for lane, weight in zip(_cells(lanes), _cells(weights), strict=False):
            table[lane] = table.get(lane, 0) + weight
        found[name] = {lane: table.get(lane, 0) for lane in range(traffic.lanes)}
    wanted = {"High": high_table(traffic), "Low": low_table(traffic)}
    return [Finding(f"{name.lower()}-priority table", _words(wanted[name]), _optional(found[name])) for name in ("High", "Low")]


def check_lanes(text: str, traffic: TrafficSettings) -> list[Finding]:
    """From `smpquery sl2vl`: the lane of each class's service level, on all pairs of ports."""
    rows = [_cells(row) for row in re.findall(r"^ports: in\s+\d+, out\s+\d+: (.*)$", text, re.MULTILINE)]
    findings = []
    for each in TrafficClass:
        level = traffic.of(each).sl
        lanes = {row[level] for row in rows if len(row) > level}
        found = ",".join(map(str, sorted(lanes))) if lanes else None
        findings.append(Finding(f"lane of {each} (service level {level})", str(level), found))
    return findings


def _kv_lanes(traffic: TrafficSettings) -> set[int]:
    return {traffic.of(each).sl for each in KV_CLASSES}


def _words(table: dict[int, int]) -> str:
    return ",".join(f"{lane}:{weight}" for lane, weight in table.items())


def _optional(table: dict[int, int] | None) -> str | None:
    return None if table is None else _words(table)


def _cells(row: str) -> list[int]:
    return [int(cell, 0) for cell in row.replace(" ", "").strip("|").split("|") if cell]
