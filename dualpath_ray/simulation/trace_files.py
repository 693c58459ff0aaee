"""Public traces as agents: one JSON object a line, in any of three shapes, told apart by their fields.

- sessions: `turns` is a list of rows; `cols` names the columns (`append` and `gen`, or `gen_kept`, must be there; `tool_s_est` or `gap_s`
  becomes the delay before the next turn). Without `cols` rows are [append, generation]. `context` tokens are stored before the first turn.
- requests with `session_id`, `timestamp` (ms), `input_length`, `output_length` and chained `hash_ids`: requests of a session become turns;
  what the next request's blocks share with the current one counts as context, the rest as appended.
- the same without `session_id`: each request is linked to the latest earlier one that shares its longest block prefix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation.workload import Trajectory


def load_trajectories(path: str | Path) -> list[Trajectory]:
    """All agents of a trace file; raises ConfigError if the file is missing or its fields are not as they must be."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"trace: no file {path}")
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise ConfigError(f"trace: {path} is not one JSON object a line: {error}") from error
    if not rows:
        raise ConfigError(f"trace: {path} is empty")
    try:
        return _trajectories(path, rows)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"trace: {path} has a line without the fields of the others, or with fields of other types: {error!r}") from error


def _trajectories(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> list[Trajectory]:
    if "turns" in rows[0]:
        return [_session(row) for row in rows]
    if "hash_ids" in rows[0]:
        return _from_requests(rows)
    raise ConfigError(f"trace: {path} has neither `turns` nor `hash_ids`")


def _session(row: Mapping[str, Any]) -> Trajectory:
    columns: Sequence[str] = row.get("cols", ["append", "gen"])
    append = columns.index("append")
    generation = columns.index("gen_kept") if "gen_kept" in columns else columns.index("gen")
    delay = next((columns.index(name) for name in ("tool_s_est", "gap_s") if name in columns), None)
    turns = tuple((max(1, int(turn[append])), max(1, int(turn[generation]))) for turn in row["turns"])
    delays = tuple(float(turn[delay]) for turn in row["turns"]) if delay is not None else ()
    return Trajectory(turns, delays, int(row.get("context", 0)))


def _from_requests(rows: Sequence[Mapping[str, Any]]) -> list[Trajectory]:
    """Chain requests into conversations by session, or else by the longest shared block prefix."""
    chains: list[list[Mapping[str, Any]]] = []
    by_session: dict[str, int] = {}
    by_last_block: dict[int, int] = {}
    for row in sorted(rows, key=lambda row: float(row["timestamp"])):
        if "session_id" in row:
            chain = by_session.setdefault(str(row["session_id"]), len(chains))
        else:
            shared = [by_last_block[block] for block in reversed(row["hash_ids"]) if block in by_last_block]
            chain = shared[0] if shared else len(chains)
        if chain == len(chains):
            chains.append([])
        chains[chain].append(row)
        if "session_id" not in row:
            for block in row["hash_ids"][1:] or row["hash_ids"]:  # the first block is often a system prompt many share
                by_last_block[block] = chain
    return [_chain(chain) for chain in chains]


def _chain(rows: Sequence[Mapping[str, Any]]) -> Trajectory:
    turns: list[tuple[int, int]] = []
    delays: list[float] = []
    context = 0
    for i, row in enumerate(rows):
        append = max(1, int(row["input_length"]) - context)
        generation = max(1, int(row["output_length"]))
        turns.append((append, generation))
        context += append + generation
        if i + 1 < len(rows):
            delays.append(max(0.0, (float(rows[i + 1]["timestamp"]) - float(row["timestamp"])) / 1000))
    return Trajectory(tuple(turns), tuple(delays))
