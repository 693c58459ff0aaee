"""`dualpath config`: look at the configuration without starting anything."""

from __future__ import annotations

import json

import click
import yaml

from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings


@click.group()
def command() -> None:
    """Check, show or describe the configuration."""


@command.command()
@with_settings
def check(settings: Settings) -> None:
    """Say whether the configuration is valid."""
    click.echo(f"valid: {settings.model.name} on {settings.cluster.prefill_nodes} prefill and {settings.cluster.decode_nodes} decode nodes")
    for warning in settings.cluster.warnings():
        click.echo(f"warning: cluster: {warning}", err=True)


@command.command()
@with_settings
def show(settings: Settings) -> None:
    """Print every setting in force, as YAML for --config."""
    click.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), nl=False)


@command.command()
def schema() -> None:
    """Print the JSON schema of the configuration file."""
    click.echo(json.dumps(Settings.model_json_schema(), indent=2))
