"""The simulator's commands."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dualpath_ray.commands.options import new_file, positive
from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation.compiled import compile_modules, compiled_folder, use_compiled
from dualpath_ray.simulation.kept_cells import KeptCells
from dualpath_ray.simulation.reference import EXPERIMENTS

if TYPE_CHECKING:  # what may be compiled is imported by each command, once it has said so
    from dualpath_ray.simulation.experiment import Experiment

TTFT_S, TPOT_S = 4.0, 0.05
MANY_AGENTS = 2048
FASTER = "runs like this end in less than half of the time after `dualpath compile`"


def _experiment(path: str | None, values: dict[str, Any]) -> Experiment:
    """Merge a YAML file with dotted overrides and validate; raises ConfigError that names the field."""
    from dualpath_ray.simulation.experiment import Experiment

    document: Any = _yaml(path, Path(path).read_bytes()) if path else {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a mapping of experiment fields")
    for dotted, value in values.items():
        target = document
        *parents, last = dotted.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{dotted}: {parent} is not a section")
        target[last] = value
    try:
        return Experiment.model_validate(document)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{_field(item)}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors())) from error


def _field(item: Any) -> str:
    return ".".join(str(part) for part in item["loc"] if part not in ("str", "MeasuredModel"))


def _pairs(settings: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, not {setting!r}")
        values[key] = _yaml(key, text)
    return values


def _yaml(name: str, text: str | bytes) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from None


def _show(document: dict[str, Any]) -> None:
    table = Table("result", "value")
    for key, value in document.items():
        table.add_row(key, _readable(value))
    Console().print(table)


def _readable(value: Any) -> str:
    """For people, four digits are enough; `--json` has them all."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_readable, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


@click.command()
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a field, e.g. cluster.node.snic_bytes_per_s=25e9.")
@click.option("--model", help="ds-660b, ds-27b, qwen-32b or a model directory.")
@click.option("--nodes", help="Cluster as xPyD, e.g. 2P4D.")
@click.option("--mal", help="Synthetic trace set: 32K, 48K or 64K.")
@click.option("--trace", help="Trace file to replay instead.")
@click.option("--agents", type=int, help="Agents that start together.")
@click.option("--aps", type=float, help="Agents per second (Poisson); makes the run online.")
@click.option("--mode", help="System: basic, layerwise, layerwise_dual_path, ours, split, pool, oracle, ...")
@click.option("--append-scale", type=float, help="Multiplies appended tokens.")
@click.option("--generation-scale", type=float, help="Multiplies generated tokens.")
@click.option("--seed", type=int, help="Seed of traces and arrivals.")
@click.option(
    "--chrome-trace",
    type=click.Path(dir_okay=False),
    callback=new_file,
    help="Write the turns of a short run as a trace that Perfetto opens.",
)
@click.option("--parquet", type=click.Path(dir_okay=False), callback=new_file, help="Write one row per turn.")
@click.option(
    "--timeline",
    type=click.Path(dir_okay=False),
    callback=new_file,
    help="Write NIC use, queues and free staging every 10 simulated seconds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def simulate(
    config: str | None,
    settings: tuple[str, ...],
    nodes: str | None,
    chrome_trace: str | None,
    parquet: str | None,
    timeline: str | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Simulate one run of a cluster."""
    compiled = use_compiled()
    from dualpath_ray.simulation.cluster_spec import parse_nodes
    from dualpath_ray.simulation.experiment import run

    values = {key: value for key, value in fields.items() if value is not None}
    if nodes is not None:
        values["cluster.prefill_nodes"], values["cluster.decode_nodes"] = parse_nodes(nodes)
    experiment = _experiment(config, {**values, **_pairs(settings)})
    console = Console(stderr=True)
    if experiment.agents >= MANY_AGENTS and not compiled:
        console.print(FASTER, highlight=False)
    with Progress(console=console, disable=as_json or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("simulating", total=1.0)
        document = run(experiment, lambda share: bar.update(task, completed=share), chrome_trace, parquet, timeline)
    if as_json:
        click.echo(json.dumps(document))
    else:
        _show(document)


@click.command()
@click.argument("experiment", default="all", type=click.Choice(["all", *EXPERIMENTS]))
@click.option("--max-agents", type=click.IntRange(1), help="Leave out settings with more agents (quicker).")
@click.option(
    "--online-seconds", type=float, callback=positive, default=2400.0, show_default=True, help="Simulated length of each online run."
)
@click.option("--jobs", type=click.IntRange(1), help="Settings simulated at once.  [default: the number of cores]")
@click.option("--resume", type=click.Path(dir_okay=False), help="Keep finished settings in this file, and do not simulate those it has.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--plots", type=click.Path(file_okay=False), help="Write plots to this directory.")
def reproduce(
    experiment: str,
    max_agents: int | None,
    online_seconds: float,
    jobs: int | None,
    resume: str | None,
    as_json: bool,
    plots: str | None,
) -> None:
    """Run the paper's experiments and print ours beside the paper's."""
    compiled = use_compiled()
    from dualpath_ray.simulation import reproduce as module

    console = Console(stderr=True)
    if not compiled:
        console.print(FASTER, highlight=False)
    jobs = jobs or os.cpu_count() or 1
    kept = KeptCells(resume, online_seconds) if resume else None
    reproduction = module.Reproduction(lambda line: console.print(line, highlight=False), online_seconds, jobs, kept)
    cells = reproduction.cells(experiment, max_agents)
    document = module.document(cells)
    if plots:
        from dualpath_ray.simulation.plots import plot_reproduction

        plot_reproduction(cells, plots)
    if as_json:
        click.echo(json.dumps(document))
        return
    table = Table("experiment", "setting", "mode", "metric", "ours", "paper", "error")
    for c in cells:
        setting = f"{c['model']} {c['prefill_nodes']}P{c['decode_nodes']}D {c['mal']} {c['agents'] or ''}"
        error = "" if c["relative_error"] is None else f"{c['relative_error']:+.1%}"
        table.add_row(
            c["experiment"], setting, c["mode"], c["metric"], "" if c["ours"] is None else f"{c['ours']:.4g}", f"{c['paper']:.4g}", error
        )
    Console().print(table)
    _show(document["mean_abs_rel_error"])


@click.command()
@click.option("--model", required=True, help="ds-660b, ds-27b, qwen-32b or a model directory.")
@click.option("--gpus", required=True, type=click.IntRange(16), help="Most GPUs the plan may use.")
@click.option("--aps", required=True, type=float, help="Agents arriving per second.")
@click.option("--slo", default=f"ttft={TTFT_S:g},tpot={TPOT_S:g}", show_default=True, help="Mean latencies to meet, in seconds.")
@click.option("--mal", default="64K", show_default=True, help="Synthetic trace set.")
@click.option("--trace", help="Trace file to serve instead.")
@click.option("--duration", default=900.0, show_default=True, help="Simulated seconds per candidate.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def plan(model: str, gpus: int, aps: float, slo: str, mal: str, trace: str | None, duration: float, as_json: bool) -> None:
    """Find the cheapest cluster that serves a workload within its latency targets."""
    use_compiled()
    from dualpath_ray.simulation import planner

    limits = _slo(slo)
    base = _experiment(None, {"model": model, "aps": aps, "mal": mal, "trace": trace, "duration_s": duration})
    console = Console(stderr=True)
    document = planner.plan(base, gpus, limits["ttft"], limits["tpot"], note=lambda line: console.print(line, highlight=False))
    choice = document["choice"]
    if choice is None:
        raise ConfigError(f"gpus: {gpus} are too few: {document['too_small']}")
    if as_json:
        click.echo(json.dumps(document))
        return
    click.echo("cheapest plan:" if document["found"] else f"no plan with {gpus} GPUs meets the targets; nearest miss:")
    _show(choice)


def _slo(text: str) -> dict[str, float]:
    limits = {"ttft": TTFT_S, "tpot": TPOT_S}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            raise ConfigError(f"--slo takes ttft=SECONDS,tpot=SECONDS, not {text!r}") from None
        if name not in ("ttft", "tpot") or not 0 < limits[name] < math.inf:
            raise ConfigError(f"--slo takes positive ttft and tpot, not {part!r}")
    return limits


@click.command("compile")
def compile_simulator() -> None:
    """Compile the simulator for this machine: the same results in less than half of the time."""
    folder = compiled_folder()
    with Console(stderr=True).status("compiling, once for these sources: about a minute"):
        compile_modules(folder)
    click.echo(folder)


@click.command()
@click.option("--engines", default=1152, show_default=True, type=click.IntRange(16), help="GPUs of the cluster.")
@click.option("--rate", type=float, callback=positive, help="Requests per second [default: the paper's, by size].")
@click.option("--seconds", default=10.0, show_default=True, callback=positive, help="Length of the driven clock.")
@click.option("--read-mode", default="split", show_default=True, type=click.Choice(["prefill_only", "shorter_queue", "split", "pool"]))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench_scheduler(engines: int, rate: float | None, seconds: float, read_mode: Any, as_json: bool) -> None:
    """Measure the scheduler's decision core at the scale of the paper's largest run."""
    from dualpath_ray.simulation.scheduler_bench import bench

    document = bench(engines, rate, seconds, read_mode)
    if as_json:
        click.echo(json.dumps(document))
    else:
        _show(document)
