"""`dualpath doctor`: whether this machine, and the cluster if one is named, are fit to serve."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from importlib import metadata

import click
from rich.console import Console
from rich.text import Text

from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.config.storage import DEFAULT_STAGING_BYTES
from dualpath_ray.doctor.check import Check, failed, skipped
from dualpath_ray.doctor.machine import check_clock, check_devices, check_huge_pages, check_memlock
from dualpath_ray.doctor.store import check_store
from dualpath_ray.doctor.transfers import check_loopback, check_transfers
from dualpath_ray.environment import set_ray_defaults
from dualpath_ray.errors import DualPathError
from dualpath_ray.rdma.sysfs import read_machine

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@with_settings
def command(settings: Settings, as_json: bool) -> None:
    """Check this machine and the cluster: devices, memory, clocks, NIXL, store, bandwidth; exit status 1 if something fails."""
    console = Console(stderr=as_json)
    checks = []
    for check in run_checks(settings):
        checks.append(check)
        if not as_json:
            console.print(_line(check))
    wrong = sum(check.status == "failed" for check in checks)
    if as_json:
        click.echo(json.dumps({"ok": not wrong, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        warnings = sum(check.status == "warning" for check in checks)
        console.print(f"{len(checks)} checks, {wrong} failed, {warnings} with warnings")
    if wrong:
        raise SystemExit(1)


def run_checks(settings: Settings) -> Iterator[Check]:
    """All checks, each as soon as it is done. A check that breaks is a failure and ends no other."""
    machine = read_machine()
    staging = int(settings.staging.bytes or DEFAULT_STAGING_BYTES)
    parts: list[tuple[str, Callable[[], list[Check]]]] = [
        ("rdma", lambda: check_devices(machine, settings.transfer)),
        ("locked memory", lambda: [check_memlock(machine, staging)]),
        ("huge pages", lambda: [check_huge_pages()]),
        ("clock", lambda: [check_clock()]),
        ("nixl", lambda: check_transfers(settings, machine)),
        ("loop-back", lambda: check_loopback(settings, machine)),
        ("store", lambda: check_store(settings.storage)),
        ("ray", lambda: _check_ray(settings, staging)),
    ]
    for name, part in parts:
        try:
            yield from part()
        except Exception as error:
            yield failed(name, f"{type(error).__name__}: {error}", "the check itself broke; run it again with dualpath --debug doctor")


def _check_ray(settings: Settings, staging: int) -> list[Check]:
    address = os.environ.get("RAY_ADDRESS", settings.cluster.address)
    if address == "local":
        version = metadata.version("ray")
        return [skipped("ray", f"Ray {version}; no cluster is named (cluster.address, RAY_ADDRESS): each run starts its own")]
    set_ray_defaults(address)
    import ray

    from actors.cluster import connect_ray
    from actors.diagnosis import check_cluster

    try:
        connect_ray(settings)
    except DualPathError as error:
        return [failed("ray", str(error), "start it (ray start --head), or set cluster.address")]
    try:
        return check_cluster(settings, staging)
    finally:
        ray.shutdown()


def _line(check: Check) -> Text:
    text = Text(f"{check.status:8}", style=COLOURS[check.status])
    text.append(f"{check.node}: " if check.node else "", style="default")
    text.append(f"{check.name}: {check.text}", style="default")
    if check.remedy:
        text.append(f"\n{'':8}-> {check.remedy}", style="bold")
    return text
