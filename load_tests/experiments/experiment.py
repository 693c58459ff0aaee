"""What all experiments share: what they are told, and what they answer.

An experiment is a module of this package with `SETUP` (its defaults), `QUICK` (a shorter version) and `run(setup, say) -> Result`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from load_tests.experiments.measure import Run
from load_tests.experiments.workload import Model, Workload
from load_tests.testbed.spec import TestbedSpec, parse_shape

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Setup:
    """What to run. `shapes` are `1P1D` and the like, `modes` names of `modes.MODES`; `overrides` are settings of every cluster.

    `testbed` gives the rates; its numbers of hosts are whatever the shapes need.
    """

    shapes: tuple[str, ...] = ("1P1D",)
    modes: tuple[str, ...] = ("basic", "shorter_queue", "split")
    repeats: int = 1
    testbed: TestbedSpec = field(default_factory=TestbedSpec)
    model: Model = field(default_factory=Model)
    workload: Workload = field(default_factory=Workload)
    overrides: tuple[str, ...] = ()
    run_timeout_s: float = 900.0

    def reading_s(self, shape: str, workload: Workload, all_nics: bool = False) -> float:
        """How long the hits of `workload` take at least over the prefill hosts' storage NICs, or over those of all hosts."""
        prefill, decode = parse_shape(shape)
        nics = prefill + decode if all_nics else prefill
        return workload.hit_bytes(self.model.geometry) / (nics * self.testbed.snic_bits / 8)


@dataclass(slots=True)
class Result:
    """The runs of an experiment; experiments add figures, plots and what counts as missed."""

    experiment: str
    setup: Setup
    runs: list[Run] = field(default_factory=list)

    def jct(self, shape: str, mode: str, load: str = "") -> float | None:
        """Median over the repetitions; None if it was not measured."""
        found = [run.figures["jct_s"] for run in self.runs if (run.testbed, run.mode, run.load) == (shape, mode, load)]
        return statistics.median(found) if found else None

    def ratio(self, shape: str, over: str, mode: str, load: str = "") -> float | None:
        """How many times as fast as `over` a mode is."""
        first, second = self.jct(shape, over, load), self.jct(shape, mode, load)
        return first / second if first and second else None

    def figures(self) -> dict[str, Any]:
        """The experiment's own figures, for JSON."""
        return {}

    def lines(self) -> list[str]:
        """The same in a few lines for people."""
        return []

    def plot(self, folder: Path) -> list[Path]:
        """Write plots; returns their paths."""
        return []

    def missed(self, bound: float) -> list[str]:
        """What is below `bound`, in the measure that the experiment's docstring names."""
        raise ValueError(f"--require means nothing for {self.experiment}")

    def as_json(self) -> dict[str, Any]:
        return {
            "experiment": self.experiment,
            **self.figures(),
            "testbed": {**asdict(self.setup.testbed), "prefill_hosts": None, "decode_hosts": None},
            "model": {**asdict(self.setup.model), "kv_bytes_per_token": self.setup.model.geometry.token_bytes},
            "workload": asdict(self.setup.workload),
            "overrides": list(self.setup.overrides),
            "runs": [run.as_json() for run in self.runs],
        }
