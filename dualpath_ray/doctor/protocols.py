"""Which transports UCX really chose, read from what it logs with UCX_PROTO_INFO=y: one table per kind of peer and operation."""

from __future__ import annotations

import re
from dataclasses import dataclass

LINE = re.compile(r"^(?:\[[^\]]*\] \[[^\]]*\])?\s*\|(.*)\|\s*$")
HEAD = re.compile(r"(self|intra-node|inter-node) cfg#\d+")


@dataclass(frozen=True, slots=True)
class Protocol:
    """`scope`: self, intra-node or inter-node; `operation` as UCX words it; `config` of the largest messages, e.g. `rc_mlx5/mlx5_0:1`."""

    scope: str
    operation: str
    config: str


def read_protocols(log: str) -> list[Protocol]:
    found: list[Protocol] = []
    scope = operation = ""
    for line in log.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        cells = [cell.strip() for cell in match[1].split("|")]
        head = HEAD.search(cells[0])
        if len(cells) == 1:
            scope, operation = (head[1], "") if head else (scope, cells[0])
        elif len(cells) == 3 and ".." in cells[0] and scope:
            protocol = Protocol(scope, operation, cells[2])
            if found and (found[-1].scope, found[-1].operation) == (scope, operation):
                found[-1] = protocol  # the next range of sizes
            else:
                found.append(protocol)
    return found


def writes_to_peers(log: str) -> str | None:
    """How KV is pushed to the peer that the log is about; None when nothing has been pushed."""
    chosen = [each.config for each in read_protocols(log) if "remote memory write" in each.operation and each.scope != "self"]
    return chosen[-1] if chosen else None
