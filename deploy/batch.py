"""Offline inference: `python -m deploy.batch requests.jsonl results.jsonl`, on its own or under `ray job submit`.

Input and output are OpenAI's batch lines, and rollouts of several turns (openai_api/rollouts.py). A killed job goes on with --resume:
lines that have a result are not asked again. A running cluster of the configured namespace is used if there is one; otherwise one is
started for the job and stopped after it.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from pydantic_core import from_json
from rich.console import Console

from deploy.batch_progress import BatchProgress
from deploy.openai_api.finished_lines import FinishedLines
from deploy.stop_signals import INTERRUPTED, ending_with_ray, raise_on_signals
from dualpath_ray.cli import Failure
from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.environment import set_ray_defaults
from dualpath_ray.errors import ConfigError, DualPathError


class OneLineErrors(click.Command):
    """Shows the package's own errors as one line, with exit status 2, as `dualpath` does for its commands."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DualPathError as error:
            raise Failure(" ".join(str(error).split())) from error


@click.command(cls=OneLineErrors)
@click.argument("requests", type=click.Path(path_type=Path))
@click.argument("results", type=click.Path(path_type=Path))
@with_settings
@click.option("--concurrency", type=click.IntRange(1), default=64, show_default=True, help="Requests in progress at once.")
@click.option("--tenant", default="", help="Tenant whose cached prompts the requests share.")
@click.option("--overwrite", is_flag=True, help="Replace an existing results file.")
@click.option("--resume", is_flag=True, help="Go on with an existing results file: only lines without a result are asked.")
def command(requests: Path, results: Path, settings: Settings, concurrency: int, tenant: str, overwrite: bool, resume: bool) -> None:
    """Answer the requests of a JSON-lines file. A request that fails has its error in the results; the job goes on."""
    check_input(requests)
    if overwrite and resume:
        raise ConfigError("give --overwrite or --resume, not both")
    if results.exists() and (not (overwrite or resume) or results.samefile(requests)):
        raise ConfigError(f"{results} exists already; name another file, or give --resume or --overwrite")
    finished = FinishedLines()
    if resume:
        finished.add_results([results])
    set_ray_defaults(settings.cluster.address)
    try:
        _run(requests, results, settings, concurrency, tenant, finished)
    except KeyboardInterrupt:
        click.echo("stopped; with --resume the job goes on where it was", err=True)
        sys.exit(INTERRUPTED)


def check_input(path: Path) -> None:
    """Raise ConfigError unless `path` is a readable file whose first line is a JSON object: found out before anything is started."""
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), None)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if first is None:
        raise ConfigError(f"{path} has no requests")
    try:
        is_object = isinstance(from_json(first), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise ConfigError(f"{path} is not a file of JSON lines: its first line is no JSON object")


def _run(requests: Path, results: Path, settings: Settings, concurrency: int, tenant: str, finished: FinishedLines) -> None:
    import ray

    from actors.cluster import Cluster, connect_ray

    raise_on_signals()
    with ending_with_ray(INTERRUPTED), ExitStack() as stack:
        if connect_ray(settings):
            stack.callback(ray.shutdown)
        if not _is_running(settings):
            stack.callback(Cluster.start(settings).stop)
        asyncio.run(_answer(requests, results, settings, concurrency, tenant, finished))


def _is_running(settings: Settings) -> bool:
    from actors.client import ClusterClient

    try:
        ClusterClient.connect(settings.cluster.namespace)
    except DualPathError:
        return False
    return True


async def _answer(requests: Path, results: Path, settings: Settings, concurrency: int, tenant: str, finished: FinishedLines) -> None:
    from actors.client import ClusterClient
    from deploy.openai_api.batch import bounded_lines, run_batch
    from deploy.openai_api.caller import Caller
    from deploy.openai_api.service import OpenAIService
    from dualpath_ray.serving.tokenizer import Tokenizer

    client = ClusterClient.connect(settings.cluster.namespace)
    card = await client.describe()
    limits = settings.serving.model_copy(update={"max_concurrent_requests": concurrency * settings.serving.max_choices})
    service = OpenAIService(client, Tokenizer.from_directory(Path(card.model_path)), card, limits)
    console = Console(stderr=True)
    with BatchProgress(console, requests.stat().st_size) as progress:
        try:
            # Line by line, so that a killed job repeats no more than what was under way
            with results.open("a" if len(finished) else "w", encoding="utf-8", buffering=1) as file, requests.open("rb") as source:
                lines = bounded_lines(source, limits.max_body_bytes)
                await run_batch(
                    service,
                    lines,
                    file,
                    concurrency=concurrency,
                    caller=Caller("batch", tenant),
                    finished=finished,
                    on_done=progress.advance,
                )
        except OSError as error:
            raise ConfigError(f"{error.filename or results}: {error.strerror}; the job stopped") from error
        finally:
            await client.aclose()
    console.print(f"{progress.summary()}; results in {results}")


if __name__ == "__main__":
    command()
