"""The fault suite's fast part: processes of a local cluster are killed and stopped at chosen phases of requests, under load."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.client import ClusterClient
from load_tests.faults.books import Books
from load_tests.faults.faults import Fault
from load_tests.faults.injector import Injector
from load_tests.faults.load import Load
from load_tests.faults.reference import Shape, make_sessions
from load_tests.faults.watch import WatchedCalls
from tests.cluster.conftest import RunningCluster

SESSIONS, AGENTS, PERIOD_S, TIMEOUT_S = 4, 4, 1.5, 60.0
ROUNDS = (
    (
        Fault("kill", "decode-d0-0", "assigned"),
        Fault("kill", "p0", "reading"),
        Fault("hang", "prefill-p0-0", "prefilling", 0.5),
        Fault("vanish", "clients"),
    ),
    (Fault("kill", "d0", "persisting"), Fault("kill", "prefill-p0-0", "arming"), Fault("hang", "decode-d0-0", "decoding", 0.5)),
    (Fault("kill_scheduler", "scheduler", "decoding"), Fault("kill", "d0", "handing_over"), Fault("kill", "decode-d0-0", "decoding")),
)


@pytest.mark.timeout(600)  # processes start slowly where many tests run at once
async def test_faults_at_every_phase_cost_no_token_and_leave_nothing(shared: RunningCluster, tiny_llama: Path) -> None:
    calls = WatchedCalls(shared.cluster.namespace)
    client = ClusterClient(shared.cluster.namespace, calls)
    sessions = make_sessions(tiny_llama, SESSIONS, Shape(turns=3), seed=1, vocabulary=500)
    load = Load([client], sessions, AGENTS, PERIOD_S, TIMEOUT_S, seed=1)
    injector, books = Injector(calls, client, load), Books()
    shared.killed = True
    trouble: list[str] = []
    async with load:
        for faults in ROUNDS:
            for outcome in await injector.inject(faults):
                trouble += outcome.trouble
        await load.pause()
        leaks = await books.check(client, injector.ended)
    stats = load.stats
    assert not load.trouble
    assert (stats.wrong_texts, stats.hung_requests, stats.unclear) == (0, 0, 0)
    assert not trouble
    assert not leaks
    assert stats.answered >= AGENTS
    assert sum(count for attempts, count in stats.attempts.items() if attempts > 1) >= 2, "faults hit requests, which were planned again"
    assert stats.refused <= stats.requests // 10, "deadlines are long enough for nearly all"
