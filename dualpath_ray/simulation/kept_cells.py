"""Cells that earlier, interrupted reproductions have filled, in a file of JSON lines (`dualpath reproduce --resume FILE`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import policies
from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation.reference import ReferenceCell

DECIDE_NOTHING = {
    "commands",
    "compiled",
    "exports",
    "kept_cells",
    "planner",
    "plots",
    "reference",
    "reproduce",
    "scheduler_bench",
    "timeline",
}

Cell = dict[str, Any]


class KeptCells:
    """Cells by what they are of. Cells of another build, or of online runs of another length, are not taken.

    Each line names the build, a digest of the modules that decide a result. Raises ConfigError for a file that is none of ours.
    """

    def __init__(self, path: str | Path, online_s: float) -> None:
        self._path = Path(path)
        self._head = {"build": build(), "online_s": online_s}
        self._cells: dict[tuple[Any, ...], Cell] = {}
        for number, line in enumerate(self._path.read_text().splitlines() if self._path.exists() else (), 1):
            try:
                document = json.loads(line)
                if {name: document[name] for name in self._head} == self._head:
                    self._cells |= {_key(cell): cell for cell in document["cells"]}
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{self._path}: line {number} is not of a reproduction; name another file") from None

    def find(self, wanted: Sequence[ReferenceCell]) -> list[Cell] | None:
        """The cells with what was simulated, or None if one is missing."""
        found = [self._cells.get(_key({name: getattr(cell, name) for name in NAMES})) for cell in wanted]
        return None if None in found else [cell for cell in found if cell is not None]

    def add(self, cells: Sequence[Cell]) -> None:
        """Keep the cells of a setting that was simulated."""
        with self._path.open("a") as file:
            file.write(json.dumps({**self._head, "cells": list(cells)}) + "\n")


NAMES = ("experiment", "model", "prefill_nodes", "decode_nodes", "mal", "agents", "mode", "metric", "paper")


def _key(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell[name] for name in NAMES)


def build() -> str:
    """Digest of the sources of the policies and the simulator, less those that only show results."""
    folders = (Path(policies.__file__ or "").parent, Path(__file__).parent)
    files = [file for folder in folders for file in sorted(folder.glob("*.py")) if file.stem not in DECIDE_NOTHING]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
