"""Runs of one setting, offline (all agents start together) or online (agents arrive at a rate), with results as plain documents."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation.cluster_spec import ClusterSpec
from dualpath_ray.simulation.exports import write_chrome_trace, write_parquet
from dualpath_ray.simulation.measurements import max_over_mean, spread
from dualpath_ray.simulation.model_spec import MeasuredModel, model_spec
from dualpath_ray.simulation.simulator import Simulator
from dualpath_ray.simulation.timeline import STEP_S, Timeline
from dualpath_ray.simulation.trace_files import load_trajectories
from dualpath_ray.simulation.workload import PAPER_SETS, Trajectory, agents, paper_set
from policies.baselines import SYSTEMS
from policies.settings import SchedulingSettings

TTFT_LIMIT_S = 4.0
WINDOW_S = 150.0


class Experiment(BaseModel):
    """One run: the document that `dualpath simulate` reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str | MeasuredModel = Field(
        default="ds-660b",
        description="ds-660b, ds-27b, qwen-32b, a directory with the config.json of a dense model, or measured figures of a model.",
    )
    cluster: ClusterSpec = Field(default=ClusterSpec(prefill_nodes=2, decode_nodes=4), description="Nodes and their hardware.")
    mode: str = Field(default="ours", description="System to simulate, one of policies.baselines.SYSTEMS.")
    mal: str = Field(default="64K", description="Synthetic trace set with the paper's statistics: 32K, 48K or 64K.")
    trace: str | None = Field(default=None, description="Trace file to replay instead of a synthetic set.")
    agents: int = Field(
        default=512, ge=1, le=10_000_000, description="Agents that start together (offline), or the most that may arrive (online)."
    )
    aps: float | None = Field(default=None, gt=0, description="Agents arriving per second (Poisson); without it all start at 0.")
    duration_s: float = Field(default=3600.0, gt=0, description="Simulated time of an online run at most.")
    append_scale: float = Field(default=1.0, gt=0, description="Multiplies appended tokens of every turn.")
    generation_scale: float = Field(default=1.0, gt=0, description="Multiplies generated tokens of every turn.")
    scheduling: dict[str, Any] = Field(
        default={}, description="Settings of the decision core to override (policies/settings.py), e.g. {recompute: true}."
    )
    seed: int = Field(default=0, ge=0, description="Seed of trace synthesis and arrivals.")

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, value: str) -> str:
        if value not in SYSTEMS:
            raise ValueError(f"must be one of {', '.join(SYSTEMS)}")
        return value

    @field_validator("scheduling")
    @classmethod
    def _known_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        SchedulingSettings(**{"prefill_token_s": 1.0, **value})  # the simulator knows the curve
        return value

    @field_validator("mal")
    @classmethod
    def _known_set(cls, value: str) -> str:
        if value not in PAPER_SETS:
            raise ValueError(f"must be one of {', '.join(PAPER_SETS)}")
        return value

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str | MeasuredModel) -> str | MeasuredModel:
        try:
            model_spec(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("model: ")) from error
        return value


def run(
    experiment: Experiment,
    progress: Callable[[float], None] | None = None,
    chrome_trace: str | Path | None = None,
    parquet: str | Path | None = None,
    timeline: str | Path | None = None,
) -> dict[str, Any]:
    """Run one experiment; `progress` gets the finished share of agents (or of simulated time) now and then. Three files on request."""
    simulator = build(experiment)
    samples, total = Timeline(simulator), simulator.agents_left
    observers: list[Callable[[], None]] = []
    if timeline is not None:
        observers.append(samples.sample)
    if progress is not None and experiment.aps is None:
        observers.append(lambda: progress(1 - simulator.agents_left / total))
    if observers:
        simulator.loop.at(STEP_S, _observe, (simulator, observers))
    document = _offline(simulator) if experiment.aps is None else _online(experiment, simulator, progress)
    if chrome_trace is not None:
        write_chrome_trace(simulator.results, chrome_trace)
    if parquet is not None:
        write_parquet(simulator.results, parquet)
    if timeline is not None:
        samples.write(timeline)
    return document


def _observe(what: tuple[Simulator, Sequence[Callable[[], None]]]) -> None:
    """Call the observers every `STEP_S` simulated seconds, as long as anything else is going to happen."""
    simulator, observers = what
    for observer in observers:
        observer()
    if simulator.agents_left and simulator.loop.pending:
        simulator.loop.at(simulator.loop.now + STEP_S, _observe, what)


def _offline(simulator: Simulator) -> dict[str, Any]:
    simulator.run()
    return {"jct_s": simulator.finished_at, "agents_done": len(simulator.results.trajectory), **_summary(simulator)}


def build(experiment: Experiment) -> Simulator:
    """The simulator of an experiment, ready to run."""
    base = _trajectories(experiment)
    if experiment.aps is None:
        chosen: Sequence[Trajectory] = agents(base, experiment.agents, experiment.seed)
        arrivals = None
    else:
        rng = random.Random(experiment.seed + 1)
        arrivals = []
        time = rng.expovariate(experiment.aps)
        while time < experiment.duration_s:
            arrivals.append(time)
            time += rng.expovariate(experiment.aps)
        chosen = [base[rng.randrange(len(base))] for _ in arrivals]
    return Simulator(
        model_spec(experiment.model),
        experiment.cluster,
        SYSTEMS[experiment.mode],
        chosen,
        arrivals,
        experiment.append_scale,
        experiment.generation_scale,
        experiment.scheduling,
    )


def _trajectories(experiment: Experiment) -> list[Trajectory]:
    if experiment.trace is not None:
        return load_trajectories(experiment.trace)
    return paper_set(experiment.mal, seed=experiment.seed)


def _online(experiment: Experiment, simulator: Simulator, progress: Callable[[float], None] | None) -> dict[str, Any]:
    """Run until a window's TTFT passes the limit or the duration ends; figures are of the last sixth of the run."""
    end = WINDOW_S
    overloaded = False
    while True:
        simulator.run(until=min(end, experiment.duration_s))
        waiting = simulator.oldest_waiting_s()
        ttft, arrived = simulator.results.ttft(), simulator.results.column("arrived")
        recent = ttft[arrived > end - 2 * WINDOW_S]
        overloaded = waiting > 4 * TTFT_LIMIT_S or (len(recent) > 0 and float(recent.mean()) > TTFT_LIMIT_S)
        if progress is not None:
            progress(min(1.0, end / experiment.duration_s))
        if overloaded or end >= experiment.duration_s:
            break
        end += WINDOW_S
    summary = _summary(simulator, after=simulator.loop.now * 5 / 6)
    return {"aps": experiment.aps, "overloaded": overloaded, "stopped_at_s": simulator.loop.now, **summary}


def _summary(simulator: Simulator, after: float = 0.0) -> dict[str, Any]:
    results, now = simulator.results, max(simulator.finished_at, 1e-9)
    kept = results.column("arrived") >= after
    parts = {name: results.column(name)[kept] for name in ("queued", "allocated", "read", "prefill")}
    ttft = results.ttft()[kept]
    total = float(ttft.mean()) if len(ttft) else 0.0
    groups = simulator.prefill_groups
    return {
        "turns": len(results.arrived),
        "ttft_s": spread(ttft),
        "ttst_s": spread(results.column("second_token")[kept]),
        "tpot_s": spread(results.column("per_token")[kept]),
        "read_s": spread(parts["read"]),
        "ttft_share": {name: float(values.mean()) / total for name, values in parts.items()} if total else {},
        "trajectory_s": spread(results.column("trajectory")),
        "prompt_tokens_per_s": results.prompt_tokens / now,
        "snic_utilisation": [link.bytes / link.bandwidth / now for link in simulator.snics],
        "snic_max_over_mean": max_over_mean(simulator.snics, 0.8 * now),
        "snic_write_utilisation": [link.bytes / link.bandwidth / now for link in simulator.snics_up],
        "prefill_busy": sum(group.busy_s for group in groups) / len(groups) / now,
        "prefill_full": sum(group.full_s for group in groups) / len(groups) / now,
        "decode_full": sum(group.full_s for group in simulator.decode_groups) / len(simulator.decode_groups) / now,
        "prefill_pass_s": sum(group.busy_s for group in groups) / max(1, sum(group.passes for group in groups)),
        "persisted_bytes": results.persisted_bytes,
        "moved": results.moved,
        "events": simulator.loop.events,
    }
