"""The scheduler's requests and processes, and what is told of them to people (`/status`, the status page, `dualpath top`)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from actors.messages import Submission
from actors.supervisor import Incarnation
from dualpath_ray.messages import Route

REQUESTS_SHOWN = 100


@dataclass(slots=True)
class WaitingRequest:
    """An attempt that waits for engines. `stored_blocks`: that its prompt begins with."""

    submission: Submission
    stored_blocks: int
    since: float
    route: asyncio.Future[Route]


@dataclass(slots=True)
class AssignedRequest:
    """An attempt that has engines. `confirmed`: its decode engine has it."""

    prefill_engine: str
    decode_engine: str
    since: float
    prompt_tokens: int
    hit_tokens: int
    confirmed: bool = False
    prefilled: bool = False


def process_status(incarnation: Incarnation, draining: bool) -> dict[str, Any]:
    """One process as a JSON-like object: who it is, and what it reported last."""
    registration, report = incarnation.registration, incarnation.report
    return {
        "role": registration.role or "gateway",
        "node": registration.node_id,
        "draining": draining,
        "agent": registration.peer.agent,
        "actor": registration.actor_name,
        "pid": registration.pid,
        "start_s": registration.start_s,
        "report_age_s": incarnation.silent_s,
        "load": asdict(report.load) if report else {},
        "figures": dict(report.figures) if report else {},
    }


def request_status(
    waiting: Mapping[str, WaitingRequest], assigned: Mapping[str, AssignedRequest], block_tokens: int, now: float
) -> list[dict[str, Any]]:
    """The oldest unfinished attempts, assigned ones first."""
    rows = [
        {
            "id": name,
            "phase": "decode" if entry.prefilled else "prefill",
            "age_s": now - entry.since,
            "prompt_tokens": entry.prompt_tokens,
            "hit_tokens": entry.hit_tokens,
            "prefill_engine": entry.prefill_engine,
            "decode_engine": entry.decode_engine,
        }
        for name, entry in islice(assigned.items(), REQUESTS_SHOWN)
    ]
    rows += [
        {
            "id": name,
            "phase": "queued",
            "age_s": now - entry.since,
            "prompt_tokens": entry.submission.prompt_tokens,
            "hit_tokens": entry.stored_blocks * block_tokens,
        }
        for name, entry in islice(waiting.items(), REQUESTS_SHOWN - len(rows))
    ]
    return rows
