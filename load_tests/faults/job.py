"""What the process that runs the faults is asked, and what it answers (JSON files)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Job:
    """`testbed` says where the hosts are (arguments of `Hosts.of`); None: everything is on this machine."""

    overrides: list[str]
    model_path: str
    faults: int
    seed: int
    agents: int = 8
    period_s: float = 2.0
    timeout_s: float = 60.0
    sessions: int = 12
    testbed: dict[str, Any] | None = None
    http: bool = True
    only: list[str] = field(default_factory=list)  # kinds of faults; all that are possible if empty
    rest_every: int = 10  # rounds
    minutes: float | None = None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text()))


@dataclass(slots=True)
class Answer:
    """`outcomes` are faults as they went, times in seconds since the load began; `rates` are tokens per second every `rate_step_s`."""

    calm_rate: float = 0.0
    stats: dict[str, Any] = field(default_factory=dict)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)  # restarts that no fault explains
    rests: int = 0
    rss_growth: int = 0
    fd_growth: int = 0
    seconds: float = 0.0
    rate_step_s: float = 0.5
    rates: list[float] = field(default_factory=list)
    http: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text()))
