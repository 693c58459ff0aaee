"""`dualpath serve`: the OpenAI API over HTTP."""

from __future__ import annotations

import signal
from typing import Any

import click

from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.environment import set_ray_defaults


@click.command()
@with_settings
@click.option("--host", help="Address to listen on (serving.host).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on (serving.port).")
def command(settings: Settings, host: str | None, port: int | None) -> None:
    """Serve the OpenAI API over HTTP until interrupted."""
    given: dict[str, Any] = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = settings.model_copy(update={"serving": settings.serving.model_copy(update=given)})
    if settings.serving.api_keys is None and settings.serving.host not in ("127.0.0.1", "localhost", "::1"):
        click.echo(f"anybody who reaches {settings.serving.host} may call: there are no API keys (docs/security.md)", err=True)
    click.echo(f"starting {settings.model.name} ...", err=True)
    set_ray_defaults(settings.cluster.address)
    # Only now: importing Ray takes seconds, and it reads its environment then.
    from deploy.running_service import running_service
    from deploy.stop_signals import ending_with_ray, raise_on_signals

    raise_on_signals()
    try:
        with ending_with_ray(), running_service(settings) as address:
            click.echo(f"serving {settings.model.name} at {address}/v1", err=True)
            signal.pause()
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
