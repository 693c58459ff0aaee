"""Trajectories from trace files: JSON lines with token counts of whole sessions.

Two layouts are read: `{"turns": [[append, generate], ...]}`, and `{"cols": [...], "turns": [[...], ...]}` where the columns name what
each turn holds (append and generated tokens under one of the names below, optionally the seconds that a tool takes after the turn).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load_tests.replay.trajectory import Trajectory, Turn

APPEND = ("append", "append_tokens", "new_tokens", "input_tokens")
GENERATE = ("gen", "generate", "gen_tokens", "output_tokens")
PAUSE = ("tool_s", "tool_s_est", "pause_s")


def read_trajectories(path: Path, count: int | None = None, with_pauses: bool = False) -> list[Trajectory]:
    """The first `count` sessions. `with_pauses` keeps tool delays. Raises ValueError naming the line that is not understood."""
    result: list[Trajectory] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if count is not None and len(result) == count:
                break
            if not line.strip():
                continue
            try:
                result.append(_session(json.loads(line), with_pauses))
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise ValueError(f"{path}, line {number}: not a session: {error}") from error
    return result


def _session(record: dict[str, Any], with_pauses: bool) -> Trajectory:
    columns: list[str] = list(record.get("cols", ["append", "gen"]))
    append, generate = _column(columns, APPEND), _column(columns, GENERATE)
    pause = next((columns.index(name) for name in PAUSE if name in columns), None)

    def turn(row: Sequence[Any]) -> Turn:
        seconds = float(row[pause] or 0.0) if with_pauses and pause is not None else 0.0
        return Turn(max(1, int(row[append])), max(1, int(row[generate])), seconds)

    return Trajectory(tuple(turn(row) for row in record["turns"]))


def _column(columns: list[str], names: tuple[str, ...]) -> int:
    for name in names:
        if name in columns:
            return columns.index(name)
    raise ValueError(f"columns {columns} name none of {', '.join(names)}")
