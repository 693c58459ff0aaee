"""Twice the load that can be served: goodput holds, and what is too much is refused with a retryable error in time.

Requests (agents of one turn) arrive in a Poisson process at 0.8 and at 2 times what the storage NICs can read. Each has a deadline, until
which the client tries again what was refused (HTTP 429 for clients outside). No more requests are taken in than can be read within 70 % of
the deadline: a few at the prefill engine (scheduling.beta_tokens), the rest waiting (scheduling.max_queued_requests). `--require` bounds
goodput (answers per second within the deadline) at twice the capacity over that at 0.8.
"""

from __future__ import annotations

import collections
from dataclasses import replace
from pathlib import Path
from typing import Any

from load_tests.experiments.bench import open_bench
from load_tests.experiments.experiment import Result, Say, Setup
from load_tests.experiments.measure import Load, Run
from load_tests.experiments.modes import MODES, Mode
from load_tests.experiments.workload import Workload
from load_tests.replay.records import TurnRecord

CALM, TOO_MUCH = 0.8, 2.0
DEADLINE_S = 8.0
TAKEN_IN, AT_ENGINE = 0.7, 3  # share of the deadline that may be spent reading what was taken in; requests at the prefill engine
SETUP = Setup(modes=("basic", "split"), workload=Workload(agents=40, turns=1, context=384, stored=10, seed=4))
QUICK = replace(SETUP, modes=("split",), workload=Workload(agents=30, turns=1, context=384, stored=10, seed=4))


def in_time(record: TurnRecord) -> bool:
    return not record.error and record.finished - record.started <= DEADLINE_S


class OverloadResult(Result):
    def goodput(self, run: Run) -> float:
        """Answers within the deadline per second, from the start to the end of the last request."""
        return sum(map(in_time, run.records)) / run.replay.jct_s

    def pairs(self) -> dict[str, tuple[Run, Run]]:
        """Calm and overloaded run of each mode."""
        return {mode: (self._run(mode, CALM), self._run(mode, TOO_MUCH)) for mode in self.setup.modes}

    def _run(self, mode: str, utilisation: float) -> Run:
        return next(run for run in self.runs if (run.mode, run.load) == (mode, f"{utilisation:.0%}"))

    def figures(self) -> dict[str, Any]:
        return {
            "deadline_s": DEADLINE_S,
            "modes": {
                mode: {
                    "goodput_per_s": {run.load: self.goodput(run) for run in pair},
                    "goodput_ratio": self.goodput(pair[1]) / max(self.goodput(pair[0]), 1e-9),
                    "errors": dict(collections.Counter(record.error.partition(":")[0] for record in pair[1].records if record.error)),
                    "slowest_end_s": max(record.finished - record.started for record in pair[1].records),
                }
                for mode, pair in self.pairs().items()
            },
        }

    def lines(self) -> list[str]:
        return [
            f"{mode}: goodput {' -> '.join(f'{rate:.2f}/s' for rate in one['goodput_per_s'].values())} ({one['goodput_ratio']:.2f}), "
            f"errors {one['errors'] or 'none'}, slowest end {one['slowest_end_s']:.1f} s"
            for mode, one in self.figures()["modes"].items()
        ]

    def missed(self, bound: float) -> list[str]:
        modes = self.figures()["modes"]
        return [f"{mode} {one['goodput_ratio']:.2f}" for mode, one in modes.items() if one["goodput_ratio"] < bound]

    def plot(self, folder: Path) -> list[Path]:
        import numpy as np

        from load_tests.experiments.plots import COLOURS, figure, label

        path = folder / "overload_outcomes.png"
        with figure(path, size=(7.0, 4.0)) as (_, grid):
            axes = grid[0, 0]
            for mode, pair in self.pairs().items():
                for run, style in zip(pair, (":", "-"), strict=True):
                    ends = np.sort([record.finished - run.replay.started for record in run.records if in_time(record)])
                    name = f"{label(mode)}, {run.load} of capacity"
                    axes.plot(ends, np.arange(1, len(ends) + 1), style, color=COLOURS.get(mode), label=name)
            axes.set_xlabel("seconds since the first arrival")
            axes.set_ylabel("answers within their deadline")
            axes.legend(fontsize=8)
        return [path]


def run(setup: Setup, say: Say) -> OverloadResult:
    result = OverloadResult("overload", setup)
    with open_bench(setup, [Load(setup.workload)], say) as bench:
        shape = setup.shapes[0]
        for mode in setup.modes:
            reading_s = setup.reading_s(shape, setup.workload, all_nics=MODES[mode].read_mode != "prefill_only")
            capacity = setup.workload.agents / reading_s
            loads = [Load(setup.workload, f"{part:.0%}", part * capacity, DEADLINE_S) for part in (CALM, TOO_MUCH)]
            result.runs += bench.measure(shape, bounded(MODES[mode], setup.workload.longest, capacity), loads, failures=True)
    return result


def bounded(mode: Mode, request_tokens: int, per_s: float) -> Mode:
    """`mode` with queues as long as its capacity allows."""
    waiting = max(1, int(TAKEN_IN * DEADLINE_S * per_s) - AT_ENGINE)
    bounds = (f"scheduling.beta_tokens={(AT_ENGINE - 1) * request_tokens}", f"scheduling.max_queued_requests={waiting}")
    return replace(mode, settings=(*mode.settings, *bounds))
