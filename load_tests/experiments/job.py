"""One run on a testbed, as the process on the head host gets it and answers it (JSON files)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import msgspec


class _File(msgspec.Struct, frozen=True):
    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.encode(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        return msgspec.json.decode(path.read_bytes(), type=cls)


class Phase(msgspec.Struct, frozen=True):
    """The agents of `trajectories` (lists of [append, generate, pause]), all at once or arriving at `agents_per_s`.

    Agent i begins after context i modulo their number; `contexts` are lengths. `context_seed` makes the contexts' tokens, `seed` all
    others, `arrival_seed` the times of arrival. A turn that takes longer than `timeout_s` has failed. With `store_only` the contexts
    are stored and nothing else is done.
    """

    trajectories: list[list[tuple[int, int, float]]]
    contexts: list[int]
    context_seed: int = 0
    seed: int = 0
    arrival_seed: int = 0
    share_nothing: bool = False
    agents_per_s: float = 0.0
    timeout_s: float = 600.0
    store_only: bool = False


class Job(_File, frozen=True):
    """Start a cluster with `overrides`, go through the phases and stop it."""

    overrides: list[str]
    vocabulary: int
    phases: list[Phase]


class PhaseAnswer(msgspec.Struct, frozen=True):
    """Times are time.monotonic(), which all hosts of a testbed share. `quiet_after_s`: until nothing was held any more after the end."""

    started: float
    finished: float
    records: list[dict[str, Any]]
    quiet_after_s: float


class Answer(_File, frozen=True):
    """`processes` is what each process of the cluster told about itself after the last phase, when all was quiet.

    Not when that phase is `share_nothing`: it leaves much to be stored, for nobody.
    """

    phases: list[PhaseAnswer]
    processes: dict[str, dict[str, Any]]
