"""Traces as a memory of blocks sees them: for each request, which blocks it loads and which it makes.

A block is loaded if it exists by then, that is, if an earlier request has made it, and is found only behind all blocks before it.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from load_tests.replay.paper_workload import paper_trajectories
from load_tests.replay.request_traces import TraceRequest, read_requests
from load_tests.replay.trace_files import read_trajectories
from load_tests.replay.trajectory import Trajectory

SCAN_SHARE = 0.2  # of the made-up trace's requests: long prompts that never come back


@dataclass(frozen=True, slots=True)
class Uses:
    """Of one request, in order of the prompt."""

    loads: tuple[bytes, ...]
    makes: tuple[bytes, ...]


def read_uses(path: Path, block_tokens: int, agents: int, turn_s: float, count: int | None = None) -> list[Uses]:
    """A trace file of either kind: requests with block hashes, or sessions with token counts, of which `agents` run at a time (the other
    arguments are theirs, too). Raises ValueError naming the line that is not understood.
    """
    if _has_hashes(path):
        return list(uses_of_requests(read_requests(path, 1, count)))
    return list(uses_of_sessions(read_trajectories(path, count, with_pauses=True), block_tokens, agents, turn_s))


def made_up_uses(block_tokens: int, agents: int, turn_s: float, count: int | None = None) -> list[Uses]:
    """Agents with the paper's statistics, and in between prompts as long as theirs that are seen once."""
    sessions = paper_trajectories(count or 4 * agents)
    random = np.random.default_rng(1)
    found: list[Uses] = []
    for number, uses in enumerate(uses_of_sessions(sessions, block_tokens, agents, turn_s)):
        found.append(uses)
        if random.random() < SCAN_SHARE:
            found.append(Uses((), _keys(len(sessions) + number, 0, len(uses.loads) + len(uses.makes))))
    return found


def uses_of_requests(requests: Iterable[TraceRequest]) -> Iterator[Uses]:
    """Whole blocks only. A block's size is not in these files; it is the power of two that the lengths agree with."""
    requests = list(requests)
    ratio = max((request.input_tokens / len(request.hash_ids) for request in requests if request.hash_ids), default=1.0)
    block_tokens = 1 << (max(1, int(np.ceil(ratio))) - 1).bit_length()
    made: set[bytes] = set()
    for request in requests:
        keys = [number.to_bytes(8, "big") for number in request.hash_ids[: request.input_tokens // block_tokens]]
        hits = next((place for place, key in enumerate(keys) if key not in made), len(keys))
        new = tuple(dict.fromkeys(key for key in keys[hits:] if key not in made))
        made.update(new)
        yield Uses(tuple(keys[:hits]), new)


def uses_of_sessions(sessions: Sequence[Trajectory], block_tokens: int, agents: int, turn_s: float) -> Iterator[Uses]:
    """`agents` at a time; whoever ends is followed by the next session. A turn takes `turn_s` on average (exponential), then its pause.

    The last generated token of a turn has no KV yet.
    """
    random = np.random.default_rng(0)
    waiting = iter(enumerate(sessions))
    turns: list[tuple[float, int, int]] = []  # (when, session, turn)
    for number, session in waiting:
        if session.turns:
            turns.append((float(random.exponential(turn_s)), number, 0))
        if len(turns) == agents:
            break
    heapq.heapify(turns)
    made = [0] * len(sessions)
    tokens = [0] * len(sessions)
    while turns:
        at, number, place = heapq.heappop(turns)
        turn = sessions[number].turns[place]
        tokens[number] += turn.append + turn.generate
        blocks = (tokens[number] - 1) // block_tokens
        yield Uses(_keys(number, 0, made[number]), _keys(number, made[number], blocks))
        made[number] = blocks
        then = at + float(random.exponential(turn_s)) + turn.pause_s
        if place + 1 < len(sessions[number].turns):
            heapq.heappush(turns, (then, number, place + 1))
        else:
            following = next((number for number, session in waiting if session.turns), None)
            if following is not None:
                heapq.heappush(turns, (then, following, 0))


def _keys(session: int, first: int, stop: int) -> tuple[bytes, ...]:
    return tuple(session.to_bytes(4, "big") + block.to_bytes(4, "big") for block in range(first, stop))


def _has_hashes(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        line = next((line for line in file if line.strip()), "{}")
    try:
        return "hash_ids" in json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line 1: not JSON: {error}") from error
