"""The scheduler's state, as a plain object; its decisions are tested in tests/policies, real restarts in tests/cluster."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from actors.client_metrics import KEPT_S, SPEAKS_S
from actors.messages import Heard, Report, attempt_name
from actors.scheduler import UNCONFIRMED_S, SchedulerActor
from dualpath_ray.config import TelemetrySettings
from dualpath_ray.errors import CancelledError, ConfigError, DeadlineExceededError, InvalidRequestError, OverloadedError
from dualpath_ray.telemetry import tracing
from dualpath_ray.telemetry.span_file import read_spans
from tests.unit.actors.emulation import (
    BLOCK,
    FACTS,
    PARTS,
    DirectCalls,
    bring_up,
    load,
    make_scheduler,
    pass_time,
    registration,
    report,
    stop,
    submission,
)

CHAIN = [(b"k0", b"root"), (b"k1", b"k0"), (b"k2", b"k1")]
KEYS = tuple(key for key, _ in CHAIN)


@pytest.fixture
async def idle() -> AsyncIterator[tuple[SchedulerActor, DirectCalls]]:
    """A scheduler that knows nobody yet."""
    scheduler, calls = make_scheduler()
    yield scheduler, calls
    await stop(scheduler)


@pytest.fixture
async def scheduler(idle: tuple[SchedulerActor, DirectCalls]) -> SchedulerActor:
    """One prefill and one decode engine, each on a node with a gateway, all of them idle."""
    await bring_up(idle[0])
    return idle[0]


async def queue(scheduler: SchedulerActor, **fields: object) -> asyncio.Task[object]:
    """Submit a request for which no decode engine has memory now."""
    task = asyncio.ensure_future(scheduler.assign(submission("waits", prompt=4000, **fields)))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def fill(scheduler: SchedulerActor) -> str:
    """Take all decode memory. Returns the attempt that has it."""
    await scheduler.assign(submission("fills", prompt=4000))
    return attempt_name("fills", 0)


# ---- processes


async def test_reports_of_strangers_ask_for_a_registration(idle: tuple[SchedulerActor, DirectCalls]) -> None:
    scheduler, _ = idle
    assert await scheduler.report(report("p0", added=tuple(CHAIN))) == Heard("")
    await scheduler.register(registration("p0", "p0", None))
    assert await scheduler.report(report("p0", incarnation=2)) == Heard(""), "another incarnation must introduce itself, too"
    assert (await scheduler.status())["index_blocks"] == 0, "what strangers say is not taken"
    heard = await scheduler.report(report("p0"))
    assert heard.scheduler == await scheduler.start() and heard.scheduler


async def test_another_model_is_refused(scheduler: SchedulerActor) -> None:
    for facts in (replace(FACTS, fingerprint="other"), replace(FACTS, geometry=replace(FACTS.geometry, layers=3))):
        with pytest.raises(ConfigError, match="new-engine"):
            await scheduler.register(registration("new-engine", "p0", "prefill", facts=facts))
    assert "new-engine" not in (await scheduler.status())["processes"]


async def test_what_an_old_incarnation_served_needs_a_new_plan(scheduler: SchedulerActor) -> None:
    await fill(scheduler)
    await scheduler.register(registration("decode-0", "d0", "decode", incarnation=2))
    assert await scheduler.report(report("decode-0", incarnation=1)) == Heard("")
    status = await scheduler.status()
    assert (status["restarts"], status["running"]) == (1, 0), "what it served needs a new plan"
    assert not scheduler._assigned


async def test_prefill_engines_hear_at_once_of_a_gateway_that_is_over(
    idle: tuple[SchedulerActor, DirectCalls], scheduler: SchedulerActor
) -> None:
    """They wait for its streams; that it is dead they hear when nothing of it can arrive any more."""
    await scheduler.register(registration("p0", "p0", None, incarnation=2))
    assert idle[1].sent == [("actor-prefill-0", "peer_lost", ("p0-1",))]


async def test_registering_again_is_no_restart(idle: tuple[SchedulerActor, DirectCalls], scheduler: SchedulerActor) -> None:
    await scheduler.register(registration("decode-0", "d0", "decode"))
    assert not idle[1].sent and (await scheduler.status())["restarts"] == 0


# ---- the index


async def test_one_gateway_sends_the_index(idle: tuple[SchedulerActor, DirectCalls]) -> None:
    scheduler, _ = idle
    assert not (await scheduler.register(registration("prefill-0", "p0", "prefill"))).send_index, "engines have none"
    assert (await scheduler.register(registration("p0", "p0", None))).send_index
    assert not (await scheduler.register(registration("d0", "d0", None))).send_index


async def test_the_sender_is_asked_again_until_it_has_sent_all(idle: tuple[SchedulerActor, DirectCalls]) -> None:
    """It may not have heard the answer to its registration, or could not read its storage."""
    scheduler, _ = idle
    for _ in range(2):
        assert (await scheduler.register(registration("p0", "p0", None))).send_index
    await scheduler.report(report("p0", added=tuple(CHAIN), index_complete=True))
    assert not (await scheduler.register(registration("p0", "p0", None))).send_index
    assert not (await scheduler.register(registration("d0", "d0", None))).send_index


async def test_another_sends_the_index_when_the_sender_has_died(idle: tuple[SchedulerActor, DirectCalls]) -> None:
    scheduler, _ = idle
    await scheduler.register(registration("p0", "p0", None))
    assert (await scheduler.register(registration("p0", "p0", None, incarnation=2))).send_index
    assert not (await scheduler.register(registration("d0", "d0", None))).send_index


# ---- requests


async def test_nothing_is_served_before_an_engine_has_come(idle: tuple[SchedulerActor, DirectCalls]) -> None:
    with pytest.raises(OverloadedError, match="no engine"):
        await idle[0].describe()
    with pytest.raises(OverloadedError, match="no engine"):
        await idle[0].assign(submission())


async def test_a_route_names_everybody_with_an_address(scheduler: SchedulerActor) -> None:
    await scheduler.report(report("d0", added=tuple(CHAIN)))
    route = await scheduler.assign(submission(prompt=4 * BLOCK, keys=KEYS))
    assert (route.prefill_engine, route.decode_engine, route.prefill_node, route.decode_node) == ("prefill-0", "decode-0", "p0", "d0")
    assert route.hit_blocks == 3 == sum(part.blocks for part in route.reads)
    assert {name: peer.agent for name, peer in route.peers.items()} == {part[0]: f"{part[0]}-1" for part in PARTS}


@pytest.mark.parametrize(("prompt", "hits"), [(1, 0), (BLOCK, 0), (BLOCK + 1, 1), (3 * BLOCK, 2), (3 * BLOCK + 1, 3), (9 * BLOCK, 3)])
async def test_hits_leave_one_token_to_compute(scheduler: SchedulerActor, prompt: int, hits: int) -> None:
    await scheduler.report(report("p0", added=tuple(CHAIN)))
    assert (await scheduler.assign(submission(prompt=prompt, keys=KEYS))).hit_blocks == hits


async def test_removed_blocks_are_no_hits(scheduler: SchedulerActor) -> None:
    await scheduler.report(report("p0", added=tuple(CHAIN)))
    await scheduler.report(report("d0", removed=(b"k1",)))
    assert (await scheduler.assign(submission(prompt=100, keys=KEYS))).hit_blocks == 1


async def test_a_request_waits_until_engines_can_take_it(scheduler: SchedulerActor) -> None:
    attempt = await fill(scheduler)
    waiting = await queue(scheduler)
    await scheduler.report(report("decode-0", active=frozenset({attempt})))
    await asyncio.sleep(0)
    assert not waiting.done() and (await scheduler.status())["queued"] == 1
    await scheduler.report(report("decode-0", finished=(attempt,)))
    assert (await waiting).request_id == "waits"  # type: ignore[attr-defined]
    assert (await scheduler.status())["queued"] == 0


async def test_a_request_that_never_fits_is_refused(scheduler: SchedulerActor) -> None:
    with pytest.raises(InvalidRequestError, match="largest decode pool"):
        await scheduler.assign(submission(prompt=4096))
    assert (await scheduler.status())["queued"] == 0


async def test_a_full_queue_refuses(idle: tuple[SchedulerActor, DirectCalls]) -> None:
    scheduler, _ = make_scheduler(max_queued_requests=1)
    await bring_up(scheduler)
    await fill(scheduler)
    waiting = await queue(scheduler)
    with pytest.raises(OverloadedError, match="max_queued_requests"):
        await scheduler.assign(submission("one too many"))
    await scheduler.cancel("waits", 0)
    with pytest.raises(CancelledError):
        await waiting
    await stop(scheduler)


async def test_an_id_in_use_is_refused_and_the_first_request_goes_on(scheduler: SchedulerActor) -> None:
    await scheduler.assign(submission("r"))
    with pytest.raises(InvalidRequestError, match="in use"):
        await scheduler.assign(submission("r"))
    assert (await scheduler.status())["running"] == 1


async def test_a_cancelled_wait_leaves_the_queue(scheduler: SchedulerActor) -> None:
    await fill(scheduler)
    waiting = await queue(scheduler)
    await scheduler.cancel("waits", 1)
    await scheduler.cancel("nobody", 0)
    await asyncio.sleep(0)
    assert not waiting.done(), "another attempt's cancel is not ours"
    await scheduler.cancel("waits", 0)
    with pytest.raises(CancelledError, match="waits"):
        await waiting
    assert (await scheduler.status())["queued"] == 0 and not scheduler._waiting


async def test_a_wait_ends_at_its_deadline(scheduler: SchedulerActor) -> None:
    await fill(scheduler)
    with pytest.raises(DeadlineExceededError, match="waits"):
        await scheduler.assign(submission("waits", prompt=4000, timeout_s=0.05))
    assert (await scheduler.status())["queued"] == 0 and not scheduler._waiting


async def test_late_news_of_an_old_attempt_do_not_touch_the_new_one(scheduler: SchedulerActor) -> None:
    await scheduler.assign(submission("r", 0))
    assert (await scheduler.assign(submission("r", 1))).epoch == 1
    assert (await scheduler.status())["running"] == 1, "the earlier attempt is forgotten"
    await scheduler.report(report("prefill-0", prefilled=(attempt_name("r", 0),)))
    await scheduler.report(report("decode-0", finished=(attempt_name("r", 0),)))
    assert (await scheduler.status())["running"] == 1
    await scheduler.report(report("decode-0", finished=(attempt_name("r", 1), attempt_name("r", 1))))
    assert (await scheduler.status())["running"] == 0 and not scheduler._assigned


async def test_reads_that_have_ended_leave_the_queue_of_their_gateway_only(scheduler: SchedulerActor) -> None:
    await scheduler.report(report("p0", added=tuple(CHAIN)))
    route = await scheduler.assign(submission("r", prompt=len(CHAIN) * BLOCK + 1, keys=tuple(key for key, _ in CHAIN)))
    reader, other = route.reads[0].node_id, {"p0": "d0", "d0": "p0"}[route.reads[0].node_id]
    queue = scheduler._core.node_account
    assert queue(reader).read_tokens == route.reads[0].blocks * BLOCK > 0
    await scheduler.report(report(other, read=(attempt_name("r", 0),)))
    await scheduler.report(report(reader, read=(attempt_name("r", 1),)))
    assert queue(reader).read_tokens > 0
    await scheduler.report(report(reader, read=(attempt_name("r", 0), attempt_name("r", 0))))
    assert queue(reader).read_tokens == 0


async def test_a_route_reads_only_what_is_worth_reading() -> None:
    scheduler, _ = make_scheduler(recompute=True, prefill_token_s=1e-9)  # so light a model that reading never pays
    await bring_up(scheduler)
    await scheduler.report(report("p0", added=tuple(CHAIN)))
    route = await scheduler.assign(submission("r", prompt=len(CHAIN) * BLOCK + 1, keys=tuple(key for key, _ in CHAIN)))
    assert (route.hit_blocks, route.reads) == (0, ())
    await stop(scheduler)


async def test_an_engine_that_fell_behind_is_asked_for_what_it_has_not_begun() -> None:
    scheduler, calls = make_scheduler(rebalance=True)
    await bring_up(scheduler)
    await scheduler.register(registration("prefill-1", "p0", "prefill"))
    await scheduler.report(Report("prefill-1", "prefill-1-1", load("prefill-1", "p0", "prefill")))
    for i in range(6):
        await scheduler.assign(submission(f"r{i}", prompt=400))
    behind = list(scheduler._core.engine_account("prefill-0").request_ids)
    for i in range(6):
        if attempt_name(f"r{i}", 0) not in behind:
            scheduler._core.prefill_done(attempt_name(f"r{i}", 0))
    scheduler._rebalance()
    scheduler._rebalance()
    assert [message for message in calls.sent if message[1] == "give_back"] == [("actor-prefill-0", "give_back", (behind[-1][:-2], 0))]
    await stop(scheduler)


async def test_a_new_attempt_ends_the_wait_of_the_old_one(scheduler: SchedulerActor) -> None:
    await fill(scheduler)
    old = await queue(scheduler)
    new = await queue(scheduler, epoch=1)
    with pytest.raises(CancelledError):
        await old
    assert (await scheduler.status())["queued"] == 1
    await scheduler.cancel("waits", 1)
    with pytest.raises(CancelledError):
        await new


async def test_assignments_that_no_engine_has_heard_of_are_dropped(scheduler: SchedulerActor) -> None:
    for request_id in ("lost", "served", "fresh"):
        await scheduler.assign(submission(request_id))
    await scheduler.report(report("decode-0", active=frozenset({attempt_name("served", 0), "unknown/3"})))
    for request_id in ("lost", "served"):
        scheduler._assigned[attempt_name(request_id, 0)].since -= UNCONFIRMED_S + 1
    scheduler._drop_unconfirmed()
    assert set(scheduler._assigned) == {attempt_name("served", 0), attempt_name("fresh", 0)}
    assert (await scheduler.status())["running"] == 2


async def test_figures(scheduler: SchedulerActor) -> None:
    await scheduler.report(report("p0", added=tuple(CHAIN), figures={"read_bytes": 7.0}))
    await scheduler.assign(submission(prompt=3 * BLOCK, keys=KEYS))
    text = await scheduler.metrics()
    read = sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("dualpath_hit_tokens_total{"))
    assert read == 2 * BLOCK
    assert 'dualpath_hit_blocks_total{decision="load"} 2.0' in text
    assert 'dualpath_hit_blocks_total{decision="recompute"} 1.0' in text, "one token must be computed, so the last block is"
    status = await scheduler.status()
    assert set(status["processes"]) == {part[0] for part in PARTS}
    assert status["processes"]["p0"]["figures"] == {"read_bytes": 7.0}
    assert status["processes"]["decode-0"]["load"]["free_hbm_tokens"] == 4096
    (request,) = status["requests"]
    assert (request["phase"], request["hit_tokens"], request["decode_engine"]) == ("prefill", 2 * BLOCK, "decode-0")
    await scheduler.report(report("decode-0", prefilled=(request["id"],)))
    assert (await scheduler.status())["requests"][0]["phase"] == "decode"
    json.dumps(status)


async def test_events_say_what_happened(scheduler: SchedulerActor) -> None:
    await scheduler.register(registration("decode-0", "d0", "decode", incarnation=2))
    await scheduler.report(report("p0", removed=(b"k0",)))
    happened = [(event["kind"], event["who"]) for event in (await scheduler.status())["events"]]
    assert happened[: len(PARTS)] == [("joined", part[0]) for part in PARTS]
    assert happened[len(PARTS) :] == [("died", "decode-0"), ("joined", "decode-0"), ("corrupt", "p0")]


async def test_a_node_that_leaves_finishes_its_work_and_is_forgotten(
    idle: tuple[SchedulerActor, DirectCalls], scheduler: SchedulerActor
) -> None:
    attempt = await fill(scheduler)
    assert await scheduler.drain("d0") == 1
    await scheduler.report(report("decode-0", finished=(attempt,)))
    assert await scheduler.drain("d0") == 0
    waiting = await queue(scheduler)
    assert (await scheduler.status())["blocked_on"] == "decode", "a node that leaves gets nothing new"
    await scheduler.retire(["decode-0", "d0", "unknown"])
    status = await scheduler.status()
    assert set(status["processes"]) == {"p0", "prefill-0"}
    assert status["restarts"] == 0
    calls = idle[1]
    calls.pids |= {"actor-decode-0": None, "actor-d0": None}
    for _ in range(2):
        await pass_time(scheduler._supervisor, 10.0, frozenset(("p0", "prefill-0")))
    assert {agent for _, method, (agent,) in calls.sent if method == "peer_died"} == {"decode-0-1", "d0-1"}
    assert await scheduler.report(report("decode-0")) == Heard(""), "a report that was under way changes nothing"
    waiting.cancel()


async def test_an_assignment_is_part_of_its_request_s_trace(scheduler: SchedulerActor, tmp_path: Path) -> None:
    tracing.setup(TelemetrySettings(traces="file", trace_path=tmp_path), "scheduler", "0")
    try:
        carrier = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
        await scheduler.assign(submission(trace=carrier))
    finally:
        tracing.shutdown()
    (span,) = read_spans(tmp_path)
    assert (span.name, span.trace_id, span.parent_id) == ("scheduler.assign", "ab" * 16, "cd" * 8)
    assert span.attributes["decode_engine"] == "decode-0"


async def test_clients_leave_their_metrics_until_they_are_gone(scheduler: SchedulerActor) -> None:
    await scheduler.client_metrics("a", "1")
    assert await scheduler.client_metrics("b", "2") == {"a": "1", "b": "2"}
    scheduler._clients._kept["a"] = (time.monotonic() - KEPT_S - 1, "1")
    assert await scheduler.client_metrics("b", "3") == {"b": "3"}
    assert await scheduler.publish("a", "4") == 2
    scheduler._clients._kept["b"] = (time.monotonic() - SPEAKS_S - 1, "3")
    assert await scheduler.publish("a", "5") == 1
