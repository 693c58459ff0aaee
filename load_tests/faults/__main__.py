"""`python -m load_tests.faults --faults N --seed S`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import click

from load_tests.faults.job import Job
from load_tests.faults.report import figures, sound
from load_tests.testbed.errors import TestbedError
from load_tests.testbed.network import unavailable


@click.command()
@click.option("--faults", type=click.IntRange(1), default=40, show_default=True, help="How many faults to inject.")
@click.option("--seed", type=int, default=1, show_default=True, help="Fixes the schedule, the sessions and which clients vanish.")
@click.option("--local", is_flag=True, help="On this machine alone, without faults of network, storage server and whole nodes.")
@click.option("--agents", type=click.IntRange(1), default=8, show_default=True, help="Agents that take turns at the same time.")
@click.option("--period", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Seconds from one turn of an agent to its next.")
@click.option("--timeout", type=click.FloatRange(1.0), default=60.0, show_default=True, help="Deadline of each request in seconds.")
@click.option("--only", multiple=True, help="Kinds of faults, e.g. kill; default: all that are possible.")
@click.option("--rest-every", type=click.IntRange(1), default=10, show_default=True, help="Rounds between two checks of the books at rest.")
@click.option("--minutes", type=click.FloatRange(0.1), help="Begin no round later than this after the load began.")
@click.option("--nice", type=click.IntRange(-20, 19), default=0, show_default=True, help="Priority of the hosts' processes.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON on stdout.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Write a plot into this folder.")
@click.option("--logs", type=click.Path(path_type=Path, file_okay=False), help="Copy the hosts' Ray logs into this folder at the end.")
@click.option("--set", "overrides", multiple=True, help="Setting of the cluster, e.g. storage.layer_groups=1.")
def main(
    faults: int,
    seed: int,
    local: bool,
    agents: int,
    period: float,
    timeout: float,
    only: tuple[str, ...],
    rest_every: int,
    minutes: float | None,
    nice: int,
    as_json: bool,
    plots: Path | None,
    logs: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Break a cluster under load, and check that nobody was answered wrongly, forgotten or left without (docs/faults.md)."""
    from load_tests.faults.place import SPEC, run_local, run_testbed

    reason = None if local else unavailable()
    if reason is not None:
        click.echo(f"without hosts of their own, so without faults of network, storage server and nodes: {reason}", err=True)
        local = True
    job = Job(list(overrides), "", faults, seed, agents, period, timeout, only=list(only), rest_every=rest_every, minutes=minutes)
    try:
        answer = run_local(job) if local else run_testbed(job, replace(SPEC, nice=nice), logs)
    except TestbedError as error:
        raise click.ClickException(str(error)) from error
    shown = figures(answer)
    if plots is not None:
        from load_tests.faults.plots import plot

        click.echo(f"wrote {plot(answer, plots)}", err=True)
    if as_json:
        click.echo(json.dumps(shown, indent=1))
    else:
        for name in ("faults", "requests", "wrong_texts", "leaks", "hung_requests", "recovery_s_max", "recovery_s_p95", "not_recovered"):
            click.echo(f"{name}: {shown[name]}")
    if not sound(answer):
        for line in (answer.leaks + answer.trouble)[:20]:
            click.echo(line, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
