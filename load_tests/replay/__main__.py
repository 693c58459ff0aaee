"""`python -m load_tests.replay`: agents against any OpenAI server that takes token ids as prompt."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import click

from load_tests.replay.agents import run_offline, run_online
from load_tests.replay.openai_caller import OpenAICaller
from load_tests.replay.paper_workload import PAPER_TRACES, paper_trajectories
from load_tests.replay.records import Replay, summary
from load_tests.replay.trace_files import read_trajectories
from load_tests.replay.trajectory import Trajectory


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
    pauses: bool,
    vocabulary: int,
    seed: int,
) -> None:
    """Replay agents' sessions and print what was measured as JSON. Exits with status 1 if any turn failed."""
    if trace_file is not None:
        sessions = [session.cut(max_tokens, turns) for session in read_trajectories(trace_file, agents, pauses)]
    else:
        sessions = paper_trajectories(agents, trace, min(1.0, max_tokens / PAPER_TRACES[trace].total), turns, seed)
    figures = summary(asyncio.run(_replay(OpenAICaller(url, model), sessions, rate, vocabulary, seed)))
    click.echo(json.dumps(figures, indent=1))
    if figures["failed_turns"]:
        raise SystemExit(1)


async def _replay(caller: OpenAICaller, sessions: list[Trajectory], rate: float, vocabulary: int, seed: int) -> Replay:
    try:
        if rate:
            return await run_online(caller, sessions, rate, vocabulary, seed)
        return await run_offline(caller, sessions, vocabulary, seed)
    finally:
        await caller.aclose()


if __name__ == "__main__":
    main()
