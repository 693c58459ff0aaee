"""The paper's experiments, simulated and put beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from dualpath_ray.simulation.cluster_spec import ClusterSpec
from dualpath_ray.simulation.compiled import use_compiled
from dualpath_ray.simulation.experiment import Experiment, run
from dualpath_ray.simulation.kept_cells import KeptCells
from dualpath_ray.simulation.reference import ReferenceCell, reference_cells

APS_GRID = {"ds-660b": tuple(round(0.05 * i, 2) for i in range(2, 13)), "ds-27b": (0.25, 0.3, 0.4, 0.5, 0.6, 0.75)}
TTFT_LIMIT_S, TPOT_LIMIT_S = 4.0, 0.05
ONLINE_COUNTS_AS = 2048  # agents, when the longest runs are begun first

Cell = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reproduction:
    """Simulates the paper's experiments, each distinct setting once, in `jobs` processes.

    `online_s` is the simulated length of an online run; `note` gets a line whenever a setting is done. With `kept`, settings it has are not
    simulated, and it gets those that are.
    """

    note: Callable[[str], None] = lambda _: None
    online_s: float = 3600.0
    jobs: int = 1
    kept: KeptCells | None = None

    def cells(self, experiment: str, most_agents: int | None = None) -> list[Cell]:
        """All cells of an experiment (or `all`) with `ours` filled in; settings with more agents than `most_agents` are left out."""
        return self.fill([c for c in reference_cells(experiment) if most_agents is None or c.agents <= most_agents])

    def fill(self, wanted: Sequence[ReferenceCell]) -> list[Cell]:
        """The cells, by number of agents, with what is simulated beside the paper's number; after Ctrl-C those that are done."""
        settings: dict[tuple[Any, ...], list[ReferenceCell]] = {}
        for cell in wanted:
            settings.setdefault(_setting(cell), []).append(cell)
        largest_first = sorted(settings.values(), key=lambda cells: -(cells[0].agents or ONLINE_COUNTS_AS))
        filled: dict[ReferenceCell, Cell] = {}
        left = []
        for cells in largest_first:
            known = self.kept.find(cells) if self.kept else None
            if known is None:
                left.append(cells)
            else:
                filled |= zip(cells, known, strict=True)
        if len(left) < len(settings):
            self.note(f"{len(settings) - len(left)} of {len(settings)} were simulated before")
        try:
            for number, (cells, results) in enumerate(self._simulated(left), 1):
                filled |= zip(cells, results, strict=True)
                if self.kept:
                    self.kept.add(results)
                self.note(f"{number} of {len(left)}: {_describe(cells[0])}")
        except KeyboardInterrupt:
            self.note("interrupted: the settings above are all there is")
        return [filled[cell] for cell in sorted(wanted, key=lambda c: (c.agents, c.mal)) if cell in filled]

    def _simulated(self, settings: Sequence[list[ReferenceCell]]) -> Iterator[tuple[list[ReferenceCell], list[Cell]]]:
        """As they end. A setting is simulated in one process, since whether the next rate is run depends on the one before."""
        if self.jobs == 1:
            yield from ((cells, _simulate(cells, self.online_s)) for cells in settings)
            return
        with ProcessPoolExecutor(self.jobs, get_context("spawn"), initializer=use_compiled) as pool:
            running = {pool.submit(_simulate, cells, self.online_s): cells for cells in settings}
            try:
                yield from ((running[done], done.result()) for done in as_completed(running))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _setting(cell: ReferenceCell) -> tuple[Any, ...]:
    return cell.model, cell.prefill_nodes, cell.decode_nodes, cell.mal, cell.agents, cell.mode


def _describe(cell: ReferenceCell) -> str:
    return f"{cell.model} {cell.prefill_nodes}P{cell.decode_nodes}D {cell.mal} {cell.agents or 'arriving'} agents, {cell.mode}"


def _simulate(cells: Sequence[ReferenceCell], online_s: float) -> list[Cell]:
    """Cells of one setting: offline one run, online one per rate."""
    first, runs = cells[0], dict[float | None, dict[str, Any]]()

    def result(aps: float | None) -> dict[str, Any]:
        if aps not in runs:
            runs[aps] = run(
                Experiment(
                    model=first.model,
                    cluster=ClusterSpec(prefill_nodes=first.prefill_nodes, decode_nodes=first.decode_nodes),
                    mode=first.mode,
                    mal=first.mal,
                    agents=max(1, first.agents),
                    aps=aps,
                    duration_s=online_s,
                )
            )
        return runs[aps]

    return [_fill(cell, result) for cell in cells]


def _fill(cell: ReferenceCell, result: Callable[[float | None], dict[str, Any]]) -> Cell:
    names = ("experiment", "model", "prefill_nodes", "decode_nodes", "mal", "agents", "mode", "metric")
    ours = _capacity(cell, result) if cell.metric == "capacity_aps" else _pick(cell.metric, result(cell.aps))
    error = (ours - cell.paper) / cell.paper if ours is not None and cell.paper else None
    filled = {name: getattr(cell, name) for name in names}
    return {**filled, "ours": ours, "paper": cell.paper, "relative_error": error, "reading_error": cell.reading_error}


def _capacity(cell: ReferenceCell, result: Callable[[float | None], dict[str, Any]]) -> float:
    """The last rate of the paper's grid at which TTFT and TPOT meet the SLO."""
    last = 0.0
    for aps in APS_GRID[cell.model]:
        measured = result(aps)
        if measured["overloaded"] or measured["ttft_s"]["mean"] > TTFT_LIMIT_S or measured["tpot_s"]["mean"] > TPOT_LIMIT_S:
            break
        last = aps
    return last


def _pick(metric: str, result: dict[str, Any]) -> float | None:
    """The number a cell asks for; None where the run was overloaded and the paper has none to compare."""
    name = metric.partition("@")[0]
    if name.endswith("_share"):
        share = result["ttft_share"].get(name.removesuffix("_share"))
        return None if share is None else float(share)
    value = result.get(name)
    if isinstance(value, dict):
        value = None if result.get("overloaded") else value.get("mean")
    return None if value is None else float(value)


def document(cells: Sequence[Cell]) -> dict[str, Any]:
    """Cells with mean absolute relative errors: per figure as the project states its goals, and over all."""
    jct = [c for c in cells if c["experiment"] == "fig7" and c["mode"] in ("basic", "ours")]
    errors: dict[str, float | None] = {
        "fig7_jct": _mean([c["relative_error"] for c in jct]),
        "fig7_oracle_jct": _mean([c["relative_error"] for c in cells if c["experiment"] == "fig7" and c["mode"] == "oracle"]),
        "fig7_ratio": _mean([r["relative_error"] for r in ratios(cells)]),
        "ablation": _mean([s["ours"] - s["paper"] for s in ablation_steps(cells)]),
        "fig10_capacity": _mean([c["relative_error"] for c in cells if c["metric"] == "capacity_aps"]),
        "fig10_latency": _mean([c["relative_error"] for c in cells if c["experiment"] == "fig10" and c["metric"] != "capacity_aps"]),
        "fig13": _mean([c["relative_error"] for c in cells if c["experiment"] == "fig13"]),
        "table3_jct": _mean([c["relative_error"] for c in cells if c["experiment"] == "table3"]),
        "all": _mean([c["relative_error"] for c in cells if not c["metric"].partition("@")[0].endswith("_share")]),
    }
    return {"mean_abs_rel_error": errors, "ablation_steps": ablation_steps(cells), "fig7_ratios": ratios(cells), "cells": list(cells)}


def ratios(cells: Sequence[Cell]) -> list[Cell]:
    """Basic / Ours of each setting of Figure 7."""
    found = {(c["model"], c["mal"], c["agents"], c["mode"]): c for c in cells if c["experiment"] == "fig7"}
    result: list[Cell] = []
    for (model, mal, count, mode), basic in found.items():
        ours = found.get((model, mal, count, "ours"))
        if mode == "basic" and ours is not None:
            mine, paper = basic["ours"] / ours["ours"], basic["paper"] / ours["paper"]
            result.append({"model": model, "mal": mal, "agents": count, "ours": mine, "paper": paper, "relative_error": mine / paper - 1})
    return result


def ablation_steps(cells: Sequence[Cell]) -> list[Cell]:
    """Mean reduction of JCT against Basic after each step, over the agent counts at hand (fractions)."""
    found = {(c["agents"], c["mode"]): c for c in cells if c["experiment"] == "ablation"}
    steps: list[Cell] = []
    for mode in ("layerwise", "layerwise_dual_path", "ours"):
        counts = [n for n, m in found if m == mode and (n, "basic") in found]
        if counts:
            mean = {who: sum(1 - found[n, mode][who] / found[n, "basic"][who] for n in counts) / len(counts) for who in ("ours", "paper")}
            steps.append({"step": mode, **mean})
    return steps


def _mean(errors: Sequence[float | None]) -> float | None:
    known = [abs(error) for error in errors if error is not None]
    return sum(known) / len(known) if known else None
