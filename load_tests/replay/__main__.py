"""`python -m load_tests.replay`: agents against any OpenAI server that takes token ids as prompt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import click

from load_tests.replay.agents import run_offline, run_online, run_requests
from load_tests.replay.openai_caller import OpenAICaller
from load_tests.replay.paper_workload import PAPER_TRACES, paper_trajectories
from load_tests.replay.records import Replay, summary
from load_tests.replay.request_traces import read_requests
from load_tests.replay.trace_files import read_trajectories


@click.command()
@click.option("--url", required=True, help="Server, e.g. http://127.0.0.1:8000.")
@click.option("--model", required=True, help="Model name in its API.")
@click.option("--agents", type=click.IntRange(1), default=8, show_default=True)
@click.option(
    "--rate", type=click.FloatRange(0), default=0.0, show_default=True, help="Agents that arrive per second (Poisson); 0: all at once."
)
@click.option("--trace", type=click.Choice(sorted(PAPER_TRACES)), default="32k", show_default=True, help="Statistics of the sessions.")
@click.option("--trace-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Sessions (JSON lines) instead.")
@click.option("--turns", type=click.IntRange(1), help="Turns of each agent; default: the trace's.")
@click.option("--max-tokens", type=click.IntRange(16), default=4096, show_default=True, help="Tokens of a whole session, at most.")
@click.option(
    "--requests", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Trace of requests with block hashes (Mooncake's)."
)
@click.option("--hash-block", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a block of --requests.")
@click.option("--block", type=click.IntRange(1), help="Replay --requests with blocks of this size, lengths in proportion.")
@click.option("--speed", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Speed of --requests' clock.")
@click.option("--pauses", is_flag=True, help="Keep the trace file's tool delays.")
@click.option("--vocabulary", type=click.IntRange(32), default=512, show_default=True, help="Token ids of prompts are below this.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    url: str,
    model: str,
    agents: int,
    rate: float,
    trace: str,
    trace_file: Path | None,
    turns: int | None,
    max_tokens: int,
    requests: Path | None,
    hash_block: int,
    block: int | None,
    speed: float,
    pauses: bool,
    vocabulary: int,
    seed: int,
) -> None:
    """Replay agents' sessions and print what was measured as JSON. Exits with status 1 if any turn failed.

    With --requests, the first --agents requests of a trace are sent at their times instead.
    """
    try:
        if requests is not None:
            traced = [request.scaled(block or hash_block) for request in read_requests(requests, hash_block, agents)]
            fitting = [request for request in traced if request.input_tokens + request.output_tokens <= max_tokens]
            replay = _replay(OpenAICaller(url, model), lambda caller: run_requests(caller, fitting, vocabulary, speed))
        else:
            if trace_file is not None:
                sessions = [session.cut(max_tokens, turns) for session in read_trajectories(trace_file, agents, pauses)]
            else:
                sessions = paper_trajectories(agents, trace, min(1.0, max_tokens / PAPER_TRACES[trace].total), turns, seed)
            run = partial(run_online, agents_per_s=rate) if rate else run_offline
            replay = _replay(OpenAICaller(url, model), lambda caller: run(caller, sessions, vocabulary=vocabulary, seed=seed))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    figures = summary(asyncio.run(replay))
    click.echo(json.dumps(figures, indent=1))
    if figures["failed_turns"]:
        raise SystemExit(1)


async def _replay(caller: OpenAICaller, run: Callable[[OpenAICaller], Awaitable[Replay]]) -> Replay:
    try:
        return await run(caller)
    finally:
        await caller.aclose()


if __name__ == "__main__":
    main()
