"""RoCE: DSCP to priority to traffic class, each class lossless (PFC) and weighed (ETS), on network cards and switches.

The paper describes this (section 5) and has not evaluated it. Cards are set with `dcb` of iproute2, which every driver with DCB
understands; the switch's part is written for SONiC.
"""

from __future__ import annotations

import json
import re

from dualpath_ray.config.traffic import TrafficSettings
from dualpath_ray.traffic.classes import KV_CLASSES, TrafficClass
from dualpath_ray.traffic.finding import Files, Finding, Source

PRIORITIES = 8
LEAST_SHARE = 1  # percent: about what the InfiniBand tables leave KV, and enough that nothing starves


def priorities(traffic: TrafficSettings) -> dict[int, list[TrafficClass]]:
    """Classes by their 802.1p priority, which is also the number of their traffic class and queue."""
    found: dict[int, list[TrafficClass]] = {}
    for each in TrafficClass:
        found.setdefault(traffic.of(each).marking.priority, []).append(each)
    return dict(sorted(found.items()))


def shares(traffic: TrafficSettings) -> dict[int, int]:
    """Percent of the link for each of the 8 traffic classes when all are busy: KV and what is no class of ours keep a little each."""
    first = [traffic.of(each).marking.priority for each in TrafficClass if each not in KV_CLASSES]
    result = dict.fromkeys(range(PRIORITIES), LEAST_SHARE)
    others = sorted(set(first))
    left = 100 - LEAST_SHARE * (PRIORITIES - len(others))
    result |= dict.fromkeys(others, left // len(others))
    result[traffic.model.marking.priority] += left % len(others)
    return result


def render(traffic: TrafficSettings, device: str) -> Files:
    """A script for the hosts, a configuration for the switches, and the environment of the model's own communication."""
    return {"nic.sh": _card(traffic, device), "switch.json": _switch(traffic), "model.env": model_environment(traffic)}


def model_environment(traffic: TrafficSettings) -> str:
    """Variables that put collectives into the model's class."""
    return "".join(f"{name}={value}\n" for name, value in traffic.model.marking.collectives().items())


def _card(traffic: TrafficSettings, device: str) -> str:
    classes = priorities(traffic)
    dscps = " ".join(f"{traffic.of(each).dscp}:{traffic.of(each).marking.priority}" for each in TrafficClass)
    lossless = " ".join(f"{priority}:{'on' if priority in classes else 'off'}" for priority in range(PRIORITIES))
    bandwidth = " ".join(f"{priority}:{share}" for priority, share in shares(traffic).items())
    own = " ".join(f"{priority}:{priority}" for priority in range(PRIORITIES))
    scheduling = " ".join(f"{priority}:ets" for priority in range(PRIORITIES))
    return "\n".join(
        [
            "#!/bin/sh",
            "# Traffic classes of dualpath_ray on a compute NIC: DSCP to priority, a lossless traffic class for each, shares of the link.",
            f"device=${{1:-{device}}}",
            *(f"# {', '.join(members)}: priority {priority}" for priority, members in classes.items()),
            "set -e",
            f'dcb app replace dev "$device" dscp-prio {dscps}',
            f'dcb pfc set dev "$device" prio-pfc {lossless}',
            f'dcb ets set dev "$device" prio-tc {own} tc-tsa {scheduling} tc-bw {bandwidth}',
            "",
        ]
    )


def _switch(traffic: TrafficSettings) -> str:
    """SONiC's configuration database. Port names are the first port's as an example: repeat PORT_QOS_MAP and QUEUE for each."""
    classes = priorities(traffic)
    name, port = "DUALPATH", "Ethernet0"
    identity = {str(priority): str(priority) for priority in range(PRIORITIES)}
    ours = {str(traffic.of(each).dscp): str(traffic.of(each).marking.priority) for each in TrafficClass}
    document = {
        "DSCP_TO_TC_MAP": {name: {str(dscp): ours.get(str(dscp), "0") for dscp in range(64)}},
        "TC_TO_QUEUE_MAP": {name: identity},
        "TC_TO_PRIORITY_GROUP_MAP": {name: identity},
        "MAP_PFC_PRIORITY_TO_QUEUE": {name: identity},
        "SCHEDULER": {f"{name}.{priority}": {"type": "DWRR", "weight": str(share)} for priority, share in shares(traffic).items() if share},
        "QUEUE": {f"{port}|{priority}": {"scheduler": f"{name}.{priority}"} for priority in classes},
        "PORT_QOS_MAP": {
            port: {
                "dscp_to_tc_map": name,
                "tc_to_queue_map": name,
                "tc_to_pg_map": name,
                "pfc_to_queue_map": name,
                "pfc_enable": ",".join(map(str, classes)),
            }
        },
    }
    return json.dumps(document, indent=2) + "\n"


def sources(traffic: TrafficSettings, device: str) -> list[Source]:
    """Checks of a network card."""
    return [
        Source("app", ("dcb", "app", "show", "dev", device), lambda text: check_app(text, traffic)),
        Source("pfc", ("dcb", "pfc", "show", "dev", device), lambda text: check_pfc(text, traffic)),
        Source("ets", ("dcb", "ets", "show", "dev", device), lambda text: check_ets(text, traffic)),
    ]


def check_app(text: str, traffic: TrafficSettings) -> list[Finding]:
    """From `dcb app show`: DSCP to priority. dcb prints well-known DSCPs by name (AF21) unless told otherwise."""
    found = {_dscp(dscp): priority for dscp, priority in re.findall(r"(\w+):(\d)", _after(text, "dscp-prio"))}
    return [
        Finding(
            f"priority of DSCP {traffic.of(each).dscp} ({each})", str(traffic.of(each).marking.priority), found.get(traffic.of(each).dscp)
        )
        for each in TrafficClass
    ]


def check_pfc(text: str, traffic: TrafficSettings) -> list[Finding]:
    """From `dcb pfc show`: which priorities are lossless."""
    found = dict(re.findall(r"(\d):(on|off)", _after(text, "prio-pfc")))
    return [Finding(f"flow control of priority {priority}", "on", found.get(str(priority))) for priority in priorities(traffic)]


def check_ets(text: str, traffic: TrafficSettings) -> list[Finding]:
    """From `dcb ets show`: a traffic class of its own for each priority, and its share."""
    classes = dict(re.findall(r"(\d):(\d)", _after(text, "prio-tc")))
    bandwidth = dict(re.findall(r"(\d):(\d+)", _after(text, "tc-bw")))
    wanted = shares(traffic)
    findings = []
    for priority in priorities(traffic):
        findings.append(Finding(f"traffic class of priority {priority}", str(priority), classes.get(str(priority))))
        findings.append(Finding(f"share of traffic class {priority}", str(wanted[priority]), bandwidth.get(str(priority))))
    return findings


def _after(text: str, word: str) -> str:
    """The rest of the line that starts with `word`."""
    match = re.search(rf"^\s*{word} (.*)$", text, re.MULTILINE)
    return match[1] if match else ""


def _dscp(word: str) -> int:
    """A DSCP as a number or as RFC 2474, 2597 and 3246 name it."""
    if word.isdigit():
        return int(word)
    if match := re.fullmatch(r"CS(\d)", word):
        return 8 * int(match[1])
    if match := re.fullmatch(r"AF(\d)(\d)", word):
        return 8 * int(match[1]) + 2 * int(match[2])
    return {"EF": 46}.get(word, -1)
