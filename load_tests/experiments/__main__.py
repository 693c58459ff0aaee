"""`python -m load_tests.experiments NAME`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from load_tests.experiments.gain import DUAL, GainPlan, parse_shape, run_gain
from load_tests.experiments.measure import MODES
from load_tests.experiments.workload import Model, Workload
from load_tests.testbed.errors import TestbedError
from load_tests.testbed.network import unavailable
from load_tests.testbed.spec import TestbedSpec

SKIPPED = 3  # exit status where there can be no testbed


@click.group()
def main() -> None:
    """Measurements on a testbed of network namespaces (docs/experiments.md)."""


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


@main.command()
@click.option("--quick", is_flag=True, help="About three minutes: 1P1D only, fewer turns.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON on stdout.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Write plots into this folder.")
@click.option("--shapes", callback=_names, help="Hosts, e.g. 1P1D,1P2D.")
@click.option("--modes", callback=_names, help=f"Systems, of {', '.join(MODES)}.")
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Repetitions of each run; medians are reported.")
@click.option("--snic", type=click.IntRange(1), help="Rate of each storage NIC, Mbit/s.")
@click.option("--cnic", type=click.IntRange(1), help="Rate of each compute NIC, Mbit/s.")
@click.option("--agents", type=click.IntRange(1), help="Agents at once.")
@click.option("--turns", type=click.IntRange(1), help="Turns of each agent.")
@click.option("--context", type=click.IntRange(64), help="Mean tokens before a turn.")
@click.option("--trace-file", type=click.Path(exists=True, dir_okay=False), help="Sessions (JSON lines) instead of the paper's.")
@click.option("--require", type=float, help="Fail unless every dual-path mode is at least this many times as fast as Basic.")
@click.option("--nice", type=click.IntRange(-20, 19), default=0, show_default=True, help="Priority of the testbed's processes.")
@click.option("--set", "overrides", multiple=True, help="Setting of the cluster, e.g. storage.read_threads=8.")
def gain(
    quick: bool,
    as_json: bool,
    plots: Path | None,
    shapes: tuple[str, ...] | None,
    modes: tuple[str, ...] | None,
    repeats: int,
    snic: int | None,
    cnic: int | None,
    agents: int | None,
    turns: int | None,
    context: int | None,
    trace_file: str | None,
    require: float | None,
    nice: int,
    overrides: tuple[str, ...],
) -> None:
    """Job completion time of dual-path reads over Basic's, on hosts with separate storage and compute NICs."""
    reason = unavailable()
    if reason is not None:
        click.echo(f"skipped: {reason}", err=True)
        sys.exit(SKIPPED)
    plan = GainPlan(repeats=repeats, overrides=overrides)
    if quick:
        plan = replace(plan, shapes=("1P1D",), modes=("basic", "shorter_queue"), workload=replace(plan.workload, turns=2))
    given: dict[str, Any] = {"agents": agents, "turns": turns, "context": context, "trace_file": trace_file}
    workload: Workload = replace(plan.workload, **{name: value for name, value in given.items() if value is not None})
    rates = {"snic_bits": snic, "cnic_bits": cnic}
    testbed: TestbedSpec = replace(plan.testbed, nice=nice, **{name: rate * 10**6 for name, rate in rates.items() if rate is not None})
    plan = replace(plan, workload=workload, testbed=testbed, shapes=shapes or plan.shapes, modes=modes or plan.modes, model=Model())
    try:
        for shape in plan.shapes:
            parse_shape(shape)
        result = run_gain(plan, lambda text: click.echo(text, err=True))
    except (TestbedError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for shape, ratios in result.speedups().items():
        for mode, ratio in ratios.items():
            click.echo(f"{shape} {mode}: {ratio:.2f} x Basic", err=True)
    if plots is not None:
        from load_tests.experiments.plots import plot_gain

        for path in plot_gain(result, plots):
            click.echo(f"wrote {path}", err=True)
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=1))
    if require is not None:
        dual = {f"{shape} {mode}": ratio for shape, ratios in result.speedups().items() for mode, ratio in ratios.items() if mode in DUAL}
        slow = [name for name, ratio in dual.items() if ratio < require]
        if slow:
            raise click.ClickException(f"less than {require} x Basic: {', '.join(slow)}")


if __name__ == "__main__":
    main()
