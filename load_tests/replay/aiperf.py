"""`python -m load_tests.replay.aiperf`: a stock load generator, aiperf, against an OpenAI endpoint, twice.

One run replays a trace of requests in Mooncake's format at its own times (`--custom-dataset-type mooncake_trace --fixed-schedule
--goodput ...`), the other sessions of several turns, in which every real answer becomes part of the next prompt. aiperf has a virtual
environment of its own (about 1.2 GB, `--make-venv` makes it); nothing of it is imported here. Without `--url` the command starts `dualpath
serve` with a tiny model itself.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import click

from dualpath_ray.errors import ConfigError
from dualpath_ray.models.resolve import resolve_model
from load_tests.replay.aiperf_tool import (
    REQUIREMENT,
    AiperfError,
    Endpoint,
    common_arguments,
    figures,
    hub_cache,
    make_venv,
    run_aiperf,
    schedule_arguments,
    session_arguments,
    session_rows,
    write_rows,
)
from load_tests.replay.own_server import own_server, served_name
from load_tests.replay.paper_workload import PAPER_TRACES, paper_trajectories
from load_tests.replay.request_traces import TraceRequest, read_requests, requests_of
from load_tests.replay.trajectory import Trajectory

BLOCK_TOKENS = 64


@click.command(help=__doc__)
@click.option("--venv", type=click.Path(path_type=Path, file_okay=False), required=True, help="aiperf's virtual environment.")
@click.option("--make-venv", "wanted", is_flag=True, help="Make the environment if it is not there (1.2 GB from PyPI).")
@click.option("--url", help="A server that runs already, e.g. http://127.0.0.1:8000.")
@click.option("--model", default="tiny-llama", show_default=True, help="Model to serve; with --url, the directory of its tokenizer.")
@click.option("--requests", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Trace in Mooncake's format to replay.")
@click.option("--hash-block", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a block of --requests.")
@click.option("--count", type=click.IntRange(1), default=24, show_default=True, help="Requests of the fixed schedule.")
@click.option("--sessions", type=click.IntRange(1), default=4, show_default=True, help="Sessions of the multi-turn run.")
@click.option("--turns", type=click.IntRange(1), default=4, show_default=True, help="Turns of each session.")
@click.option("--max-tokens", type=click.IntRange(64), default=1024, show_default=True, help="Tokens of a whole session, at most.")
@click.option(
    "--goodput", default="time_to_first_token:4000 inter_token_latency:250", show_default=True, help="SLO by which goodput is counted, ms."
)
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON on stdout.")
def main(
    venv: Path,
    wanted: bool,
    url: str | None,
    model: str,
    requests: Path | None,
    hash_block: int,
    count: int,
    sessions: int,
    turns: int,
    max_tokens: int,
    goodput: str,
    as_json: bool,
) -> None:
    program = venv / "bin" / "aiperf"
    try:
        if not program.exists():
            if not wanted:
                raise click.UsageError(f"there is no {program}; --make-venv makes it")
            click.echo(f"installing {REQUIREMENT} into {venv} ...", err=True)
            make_venv(venv)
        scale = min(1.0, max_tokens / PAPER_TRACES["32k"].total)
        trace = _trace(requests, hash_block, count, scale, turns, max_tokens)
        trajectories = paper_trajectories(sessions, scale=scale, turns=turns, seed=2)
        result = _both(program, url, model, trace, trajectories, goodput)
    except (AiperfError, ConfigError, OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(result, indent=1))


def _trace(path: Path | None, hash_block: int, count: int, scale: float, turns: int, max_tokens: int) -> list[TraceRequest]:
    if path is None:
        return requests_of(paper_trajectories(-(-count // turns), scale=scale, turns=turns, seed=1), BLOCK_TOKENS, 0.5, 2.0)[:count]
    traced = [request.scaled(BLOCK_TOKENS) for request in read_requests(path, hash_block, count)]
    fitting = [request for request in traced if request.input_tokens + request.output_tokens <= max_tokens]
    if not fitting:
        raise ValueError(f"no request of {path} fits into {max_tokens} tokens (--max-tokens)")
    return fitting


def _both(
    program: Path, url: str | None, model: str, trace: list[TraceRequest], trajectories: list[Trajectory], goodput: str
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="aiperf-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        hub_cache(folder / "hf", resolve_model(model))
        click.echo("starting the server ..." if url is None else f"using {url}", err=True)
        address = url or stack.enter_context(own_server(folder, model))
        endpoint = Endpoint(address, served_name(address))
        runs = {
            "fixed_schedule": ([request.as_row() for request in trace], schedule_arguments(BLOCK_TOKENS, goodput)),
            "sessions": (session_rows(trajectories), session_arguments(len(trajectories), len(trajectories))),
        }
        result: dict[str, Any] = {}
        for kind, (rows, arguments) in runs.items():
            click.echo(f"{kind}: {len(rows)} requests", err=True)
            path, artifacts = folder / f"{kind}.jsonl", folder / kind
            write_rows(path, rows)
            export = run_aiperf(program, folder / "hf", [*common_arguments(endpoint, path, artifacts), *arguments], artifacts)
            result[kind] = figures(export, len(rows))
            click.echo("  " + ", ".join(f"{figure} {value:.4g}" for figure, value in result[kind].items()), err=True)
        return result


if __name__ == "__main__":
    main()
