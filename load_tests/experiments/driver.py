"""Runs on the head host of a testbed: starts a cluster, replays the agents, asks every process for its figures, stops the cluster.

`python -m load_tests.experiments.driver JOB ANSWER`
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from actors.client import ClusterClient
from actors.cluster import Cluster, connect_ray
from dualpath_ray.config import Settings
from load_tests.experiments.job import Answer, Job, Phase, PhaseAnswer
from load_tests.replay.agents import run_offline, run_online
from load_tests.replay.cluster_caller import ClusterCaller
from load_tests.replay.records import Replay, TurnRecord
from load_tests.replay.trajectory import Trajectory, Turn, made_up_tokens

QUIET_TIMEOUT_S = 60.0
WARM_UP = [Trajectory((Turn(100, 2), Turn(40, 2), Turn(40, 2)))] * 4
WARM_UP_SEED = 7_777


async def _run(settings: Settings, job: Job) -> Answer:
    client = ClusterClient.connect(settings.cluster.namespace)
    # Connections are made, memory is touched and code is loaded before the clock starts; the blocks are of other tokens.
    await run_offline(ClusterCaller(client), WARM_UP, job.vocabulary, WARM_UP_SEED)
    processes = await _quiet(client)
    answers = []
    for phase in job.phases:
        replay = await _replay(ClusterCaller(client, phase.timeout_s, phase.share_nothing), phase, job.vocabulary)
        ended = time.monotonic()
        if phase.share_nothing and phase is job.phases[-1]:
            processes = await client.inspect()  # all of its KV is still on its way to storage, for nobody
        else:
            processes = await _quiet(client)
        answers.append(
            PhaseAnswer(replay.started, replay.finished, [asdict(record) for record in replay.records], time.monotonic() - ended)
        )
    return Answer(answers, processes)


async def _replay(caller: ClusterCaller, phase: Phase, vocabulary: int) -> Replay:
    trajectories = [Trajectory(tuple(Turn(*turn) for turn in session)) for session in phase.trajectories]
    stored = [
        made_up_tokens(phase.context_seed * 1_000_003 + number, length, vocabulary).tolist() for number, length in enumerate(phase.contexts)
    ]
    if phase.store_only:
        return await _store(caller, stored)
    contexts = [stored[agent % len(stored)] for agent in range(len(trajectories))]
    if phase.agents_per_s:
        return await run_online(caller, trajectories, phase.agents_per_s, vocabulary, phase.seed, contexts, phase.arrival_seed)
    return await run_offline(caller, trajectories, vocabulary, phase.seed, contexts)


async def _store(caller: ClusterCaller, contexts: list[list[int]]) -> Replay:
    """Have all contexts computed once, so that their blocks are stored."""
    started = time.monotonic()
    records = [TurnRecord(agent, 0, len(context), 1, time.monotonic()) for agent, context in enumerate(contexts)]
    await asyncio.gather(*(caller.turn(record, tuple(context)) for record, context in zip(records, contexts, strict=True)))
    failed = next((record.error for record in records if record.error), None)
    if failed is not None:
        raise RuntimeError(f"contexts could not be stored: {failed}")
    return Replay(started, time.monotonic(), tuple(records))


async def _quiet(client: ClusterClient) -> dict[str, dict[str, Any]]:
    """Wait until no process holds anything any more; returns their states (whose integrity has been checked)."""
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    while True:
        processes = await client.inspect()
        busy = [name for name, state in processes.items() if not state["idle"]]
        if not busy:
            return processes
        if time.monotonic() > deadline:
            raise RuntimeError(f"not idle {QUIET_TIMEOUT_S:.0f} s after the last request: {', '.join(busy)}")
        await asyncio.sleep(0.2)


def main() -> None:
    job_path, answer_path = map(Path, sys.argv[1:3])
    job = Job.read(job_path)
    settings = Settings.load(None, job.overrides)
    connect_ray(settings)
    cluster = Cluster.start(settings)
    try:
        asyncio.run(_run(settings, job)).write(answer_path)
    finally:
        cluster.stop()
        ray.shutdown()


if __name__ == "__main__":
    main()
