"""`dualpath model`: models on this machine."""

from __future__ import annotations

import click

from dualpath_ray.models import smollm2
from dualpath_ray.models.resolve import resolve_model


@click.group()
def command() -> None:
    """Fetch or convert a model into the user's cache."""


@command.command()
@click.argument("spec", default=smollm2.NAME)
def fetch(spec: str) -> None:
    """Make SPEC (default: the demo model) available and print its directory."""
    click.echo(resolve_model(spec))
