"""`dualpath keys`: the API keys of the HTTP service (serving.api_keys)."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from deploy.access.api_keys import new_key, read_keys, write_keys
from dualpath_ray.errors import ConfigError

FILE = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


@click.group()
def command() -> None:
    """Make, list and revoke API keys."""


@command.command()
@FILE
@click.argument("tenant")
@click.option("--requests-per-minute", type=float, help="Most requests of the tenant in a minute; default: no limit.")
@click.option("--concurrency", type=int, help="Most requests of the tenant at once; default: no limit.")
@click.option("--priority", type=int, default=0, show_default=True, help="Highest priority of its requests (-100 to 100).")
@click.option(
    "--salt", default="", help="Part of its block keys; keys of one tenant with one salt share cached prompts. Default: the tenant's."
)
def create(file: Path, tenant: str, requests_per_minute: float | None, concurrency: int | None, priority: int, salt: str) -> None:
    """Add a key for TENANT to FILE, which is made if missing, and print it. It cannot be shown again."""
    keys = read_keys(file) if file.exists() else []
    known = next((key.salt for key in keys if key.tenant == tenant), "")
    presented, key = new_key(
        tenant, salt=salt or known, requests_per_minute=requests_per_minute, concurrency=concurrency, priority=priority
    )
    write_keys(file, [*keys, key])
    click.echo(presented)


@command.command("list")
@FILE
def list_(file: Path) -> None:
    """Show the keys of FILE, without their secrets."""
    table = Table("id", "tenant", "requests/min", "concurrency", "priority", "state")
    for key in read_keys(file):
        limits = [f"{limit:g}" if limit is not None else "-" for limit in (key.requests_per_minute, key.concurrency)]
        table.add_row(f"dp-{key.id}", key.tenant, *limits, str(key.priority), "disabled" if key.disabled else "active")
    Console().print(table)


@command.command()
@FILE
@click.argument("key_id")
@click.option("--disable", is_flag=True, help="Keep it listed: callers get 403 instead of 401.")
def revoke(file: Path, key_id: str, disable: bool) -> None:
    """Take the key KEY_ID (dp-XXXXXXXX) out of FILE. Running services notice with their next request."""
    keys = read_keys(file)
    name = key_id.removeprefix("dp-").partition("-")[0]
    if name not in {key.id for key in keys}:
        raise ConfigError(f"{file} has no key dp-{name[:20]}")
    kept = [key.model_copy(update={"disabled": True}) if key.id == name else key for key in keys if disable or key.id != name]
    write_keys(file, kept)
    click.echo(f"{'disabled' if disable else 'revoked'} dp-{name}")
