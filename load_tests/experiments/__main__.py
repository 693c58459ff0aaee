"""`python -m load_tests.experiments NAME`."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from load_tests.experiments.experiment import Setup
from load_tests.experiments.modes import MODES
from load_tests.testbed.errors import TestbedError
from load_tests.testbed.network import unavailable
from load_tests.testbed.spec import parse_shape

SKIPPED = 3  # exit status where there can be no testbed
NAMES = ("gain", "ablation", "online", "append", "generation", "balance", "read_tail", "interference", "overload", "compute_bound")


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


OPTIONS = (
    click.Option(["--quick"], is_flag=True, help="A shorter version, about three minutes."),
    click.Option(["--json", "as_json"], is_flag=True, help="Print all figures as JSON on stdout."),
    click.Option(["--plots"], type=click.Path(path_type=Path, file_okay=False), help="Write plots into this folder."),
    click.Option(["--shapes"], callback=_names, help="Hosts, e.g. 1P1D,1P2D."),
    click.Option(["--modes"], callback=_names, help=f"Systems, of {', '.join(MODES)}."),
    click.Option(["--repeats"], type=click.IntRange(1), help="Repetitions of each run; medians are reported."),
    click.Option(["--snic"], type=click.IntRange(1), help="Rate of each storage NIC, Mbit/s."),
    click.Option(["--cnic"], type=click.IntRange(1), help="Rate of each compute NIC, Mbit/s."),
    click.Option(["--agents"], type=click.IntRange(1), help="Agents."),
    click.Option(["--turns"], type=click.IntRange(1), help="Turns of each agent."),
    click.Option(["--context"], type=click.IntRange(64), help="Mean tokens before a turn."),
    click.Option(["--trace-file"], type=click.Path(exists=True, dir_okay=False), help="Sessions (JSON lines) instead of the paper's."),
    click.Option(["--require"], type=float, help="Fail when the experiment's measure is below this bound."),
    click.Option(["--nice"], type=click.IntRange(-20, 19), help="Priority of the testbed's processes."),
    click.Option(["--set", "overrides"], multiple=True, help="Setting of the cluster, e.g. storage.read_threads=8."),
)


class Experiments(click.Group):
    """Experiments by name: a module each, loaded when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(NAMES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in NAMES:
            return None
        module = importlib.import_module(f"load_tests.experiments.{name}")

        def callback(**given: Any) -> None:
            run(module, **given)

        return click.Command(name, callback=callback, params=list(OPTIONS), help=module.__doc__)


main = Experiments(help="Measurements on a testbed of network namespaces (docs/experiments.md).")


def run(module: Any, *, as_json: bool, plots: Path | None, require: float | None, **given: Any) -> None:
    reason = unavailable()
    if reason is not None:
        click.echo(f"skipped: {reason}", err=True)
        sys.exit(SKIPPED)
    try:
        result = module.run(setup_of(module, **given), lambda text: click.echo(text, err=True))
    except (TestbedError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for line in result.lines():
        click.echo(line, err=True)
    if plots is not None:
        for path in result.plot(plots):
            click.echo(f"wrote {path}", err=True)
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=1))
    if require is not None and (missed := result.missed(require)):
        raise click.ClickException(f"below {require}: {', '.join(missed)}")


def setup_of(module: Any, *, quick: bool, overrides: tuple[str, ...], **given: Any) -> Setup:
    """The experiment's defaults with what was given on the command line. Raises ValueError for a wrong shape."""
    setup: Setup = module.QUICK if quick else module.SETUP
    given = {name: value for name, value in given.items() if value is not None}
    rates = {f"{nic}_bits": given.pop(nic) * 10**6 for nic in ("snic", "cnic") if nic in given}
    nice = {"nice": given.pop("nice")} if "nice" in given else {}
    workload = {name: given.pop(name) for name in ("agents", "turns", "context", "trace_file") if name in given}
    for shape in given.get("shapes", ()):
        parse_shape(shape)
    return replace(
        setup,
        testbed=replace(setup.testbed, **rates, **nice),
        workload=replace(setup.workload, **workload),
        overrides=(*setup.overrides, *overrides),
        **given,
    )


if __name__ == "__main__":
    main()
