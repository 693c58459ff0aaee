"""One run on a testbed, as the process on the head host gets it and answers it (JSON files)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Job:
    """Start a cluster with `overrides`, run the agents of `trajectories` (lists of [append, generate, pause]) and stop it.

    `contexts` are the lengths of what each agent has before its first turn; `context_seed` makes their tokens, `seed` all others.
    """

    overrides: list[str]
    trajectories: list[list[list[float]]]
    vocabulary: int
    contexts: list[int]
    context_seed: int = 0
    seed: int = 0
    share_nothing: bool = False
    agents_per_s: float = 0.0  # 0: offline
    timeout_s: float = 600.0
    preload: bool = False  # only store the contexts

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True, slots=True)
class Answer:
    """`processes` is what each process of the cluster told about itself after the run, when all was quiet."""

    started: float
    finished: float
    records: list[dict[str, Any]]
    processes: dict[str, dict[str, Any]]
    quiet_after_s: float

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text()))
