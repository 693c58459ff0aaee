"""`python -m load_tests.http`: the HTTP service under load, beside a Ray Serve application that does nothing.

Client and servers share the machine, so absolute figures say little; the ratios are from one run. Serve's proxy and everything behind it
are real; only where it says "emulated" the cluster is (emulated_cluster.py), so that the HTTP layer is measured and not a model.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.environment import set_ray_defaults
from dualpath_ray.models.resolve import resolve_model

PARTS = ("saturation", "idle", "drain", "fairness")


@click.command()
@with_settings
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="What to measure; default: everything.")
@click.option("--seconds", default=5.0, show_default=True, help="Length of each measurement.")
@click.option("--levels", default="1,4,16,64", show_default=True, help="Concurrencies of the saturation curve.")
@click.option("--tokens", default=32, show_default=True, help="Tokens of each stream.")
@click.option("--idle", default=1000, show_default=True, help="Idle streams to hold.")
@click.option("--engines/--no-engines", default=True, show_default=True, help="Also measure real engines (fairness needs them).")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Write the saturation curve here (PNG).")
def command(
    settings: Settings,
    parts: tuple[str, ...],
    seconds: float,
    levels: str,
    tokens: int,
    idle: int,
    engines: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Load on the HTTP service, beside a Ray Serve application that does nothing."""
    set_ray_defaults(settings.cluster.address)
    wanted = set(parts or PARTS)
    concurrencies = [int(level) for level in levels.split(",")]
    with tempfile.TemporaryDirectory(prefix="dualpath-load-") as store:
        document = _measure(_settings(settings, store), wanted, seconds, concurrencies, tokens, idle, engines)
    text = json.dumps(document, indent=1)
    if json_path is not None:
        json_path.write_text(text + "\n")
    if plot_path is not None and "saturation" in document:
        from load_tests.http.plot import plot_saturation

        plot_saturation(document["saturation"], plot_path)
    click.echo(text)


def _settings(settings: Settings, store: str) -> Settings:
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(
                update={"threads": settings.model.threads or 1, "max_context": settings.model.max_context or 2048}
            ),
            "storage": settings.storage.model_copy(update={"path": Path(store)}),
            "serving": settings.serving.model_copy(update={"port": 0}),
        }
    )


def _measure(
    settings: Settings, parts: set[str], seconds: float, levels: list[int], tokens: int, idle: int, engines: bool
) -> dict[str, Any]:
    from ray import serve

    from load_tests.http import applications, measure

    model, path = settings.model.name, str(resolve_model(settings.model.spec))
    document: dict[str, Any] = {"model": model}

    def redeploy() -> None:
        serve.run(applications.emulated(settings, path, version=1), name="emulated", route_prefix="/emulated")

    def note(name: str, work: Callable[[], Any]) -> None:
        if name in parts:
            click.echo(f"measuring: {name}", err=True)
            document[name] = asyncio.run(work())

    compared = engines and "saturation" in parts
    with _serving(settings, compared) as address:
        urls = {name: f"{address}/{name}" for name in ("nothing", "emulated", "each_token")} | ({"engines": address} if compared else {})
        serve.run(applications.nothing(), name="nothing", route_prefix="/nothing")
        serve.run(applications.emulated(settings, path), name="emulated", route_prefix="/emulated")
        serve.run(applications.emulated(_each_token(settings), path), name="each_token", route_prefix="/each_token")
        note("saturation", lambda: measure.saturation(urls, model, levels, tokens, seconds))
        note("idle", lambda: measure.idle_streams(urls["emulated"], model, idle, seconds))
        note("drain", lambda: measure.drain(urls["emulated"], model, redeploy, 4 * seconds))
        for name in ("nothing", "emulated", "each_token"):
            serve.delete(name)
    if engines and "fairness" in parts:
        with _serving(_scarce(settings, tokens), engines) as address:
            note("fairness", lambda: measure.fairness(address, model, tokens, 6 * seconds))
    return document


def _each_token(settings: Settings) -> Settings:
    """Every token is an event of its own, however fast they come."""
    return settings.model_copy(update={"serving": settings.serving.model_copy(update={"stream_interval_s": 0.0})})


def _scarce(settings: Settings, tokens: int) -> Settings:
    """Memory for eight requests at once, so that those of more clients wait where their order is decided; turns of about two requests."""
    context = 8 * settings.model.block_tokens
    values = settings.model_dump()
    values["model"]["max_context"] = context
    values["decode"] |= {"pool_blocks": 8, "pool_bytes": None}
    values["scheduling"]["tenant_quantum_tokens"] = 4 * tokens
    return Settings.model_validate(values)


def _serving(settings: Settings, engines: bool) -> Any:
    from deploy.running_service import running_serve, running_service

    return running_service(settings) if engines else running_serve(settings)


if __name__ == "__main__":
    command()
