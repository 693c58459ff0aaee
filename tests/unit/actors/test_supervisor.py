"""Verdicts on processes: never wrong, never forgotten. Ray's answers are given; time passes by moving what is compared with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from actors.messages import Registration
from actors.supervisor import Supervisor
from dualpath_ray.config import Settings
from tests.unit.actors.emulation import PARTS, DirectCalls, pass_time, registration

SETTINGS = Settings()
HEALTH_S, START_S = SETTINGS.cluster.health_timeout_s, SETTINGS.cluster.start_timeout_s
LATE_S, FENCE_S = SETTINGS.transfer.late_write_s, SETTINGS.cluster.node_fence_s


@dataclass
class World:
    """A supervisor that knows all of PARTS, and what it said."""

    calls: DirectCalls
    supervisor: Supervisor
    over: list[str]

    @classmethod
    async def of(cls, calls: DirectCalls) -> World:
        over: list[str] = []
        supervisor = Supervisor(calls, SETTINGS, lambda registration: over.append(registration.peer.agent), lambda *event: None)  # type: ignore[arg-type]
        return cls(calls, supervisor, over)

    async def pass_time(self, seconds: float, heard: frozenset[str] = frozenset()) -> None:
        await pass_time(self.supervisor, seconds, heard)

    async def fall_silent(self, engine_id: str, seconds: float) -> None:
        await self.pass_time(seconds, frozenset(part[0] for part in PARTS) - {engine_id})

    @property
    def told(self) -> set[tuple[str, str]]:
        return {(name, arguments[0]) for name, method, arguments in self.calls.sent if method == "peer_died"}


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = await World.of(DirectCalls())
    for part in PARTS:
        assert await made.supervisor.admit(registration(*part))
    yield made


async def test_the_more_processes_there_are_the_longer_each_may_be_silent(world: World) -> None:
    """Their reports shall leave the scheduler time; none may come so late that its sender is left out or taken for dead."""
    few = world.supervisor.report_pause_s
    assert 0 < few < 0.1
    for number in range(200):
        await world.supervisor.admit(registration(f"prefill-{number}", f"n{number}", "prefill"))
    many = world.supervisor.report_pause_s
    assert few < 1 <= many
    world.calls.pids["actor-prefill-7"] = None
    await world.pass_time(2 * many, frozenset())
    assert not world.over
    await world.pass_time(4 * many, frozenset())
    assert "prefill-7-1" in world.over
    for number in range(200, 5000):
        await world.supervisor.admit(registration(f"prefill-{number}", f"n{number}", "prefill"))
    assert world.supervisor.report_pause_s <= SETTINGS.scheduling.report_timeout_s / 3


def others(engine_id: str, agent: str) -> set[tuple[str, str]]:
    return {(f"actor-{part[0]}", agent) for part in PARTS if part[0] != engine_id}


async def test_a_silent_process_that_ray_still_has_is_not_given_up_but_killed_when_it_hangs(world: World) -> None:
    await world.fall_silent("prefill-0", HEALTH_S / 2)
    assert not world.calls.killed
    await world.fall_silent("prefill-0", HEALTH_S)
    await world.fall_silent("prefill-0", HEALTH_S / 2)
    assert world.calls.killed == ["actor-prefill-0"], "once: it is given time to end"
    assert not world.over
    assert not world.told


async def test_a_process_that_ended_is_over_at_once_and_dead_when_its_last_bytes_have_arrived(world: World) -> None:
    world.calls.pids["actor-prefill-0"] = None
    await world.fall_silent("prefill-0", 2.0)
    assert world.over == ["prefill-0-1"]
    assert world.supervisor.lost == ("prefill-0",)
    await world.fall_silent("prefill-0", LATE_S / 2)
    assert not world.told
    await world.fall_silent("prefill-0", LATE_S)
    assert world.told == others("prefill-0", "prefill-0-1")
    assert "prefill-0-1" not in world.calls.remembered


async def test_a_process_that_is_ended_on_purpose_did_not_die(world: World) -> None:
    """However long its ending takes: somebody looks before the last word of it comes."""
    world.supervisor.leaves("prefill-0")
    world.calls.pids["actor-prefill-0"] = None
    await world.fall_silent("prefill-0", 2 * HEALTH_S)
    await world.supervisor.suspect("actor-prefill-0")
    assert not world.over
    assert not world.calls.killed
    assert world.supervisor.retire("prefill-0") is not None
    assert not world.supervisor.lost
    await world.fall_silent("prefill-0", 2.0)
    await world.fall_silent("prefill-0", 2 * LATE_S)
    assert not world.over
    assert world.told == others("prefill-0", "prefill-0-1"), "its memory is free all the same"


async def test_a_process_that_did_not_answer_somebody_is_looked_after_at_once(world: World) -> None:
    await world.supervisor.suspect("actor-prefill-0")
    assert not world.over, "Ray has it still"
    world.calls.pids["actor-prefill-0"] = None
    await world.fall_silent("prefill-0", 0.6)
    assert not world.over, "nobody has complained again"
    await world.supervisor.suspect("actor-prefill-0")
    assert world.over == ["prefill-0-1"]


async def test_processes_of_a_lost_node_are_not_dead_before_they_must_have_ended_themselves(world: World) -> None:
    """The node may only be cut off: its processes live and write until its raylet ends them."""
    world.calls.pids["actor-decode-0"] = None
    world.calls.nodes = frozenset(["another"])
    await world.fall_silent("decode-0", 2.0)
    assert world.over == ["decode-0-1"], "requests need not wait"
    await world.fall_silent("decode-0", FENCE_S - 1)
    assert not world.told
    await world.fall_silent("decode-0", LATE_S + 2)
    assert world.told == others("decode-0", "decode-0-1")


async def test_the_same_holds_when_its_replacement_comes_first(world: World) -> None:
    world.calls.nodes = frozenset(["another"])
    assert await world.supervisor.admit(replace(registration("decode-0", "d0", "decode", incarnation=2), ray_node="another"))
    assert world.over == ["decode-0-1"]
    await world.pass_time(FENCE_S - 1, frozenset(part[0] for part in PARTS))
    assert not world.told
    await world.pass_time(LATE_S + 2, frozenset(part[0] for part in PARTS))
    assert world.told == others("decode-0", "decode-0-1") | {("actor-decode-0", "decode-0-1")}


async def test_who_was_given_up_is_not_taken_in_again(world: World) -> None:
    world.calls.pids["actor-p0"] = None
    await world.fall_silent("p0", 2.0)
    assert not await world.supervisor.admit(registration("p0", "p0", None))
    assert await world.supervisor.admit(registration("p0", "p0", None, incarnation=2))
    assert not world.supervisor.lost


async def test_a_replacement_that_does_not_come_up_is_started_again(world: World) -> None:
    world.calls.pids["actor-d0"] = 2  # Ray has started another one, which does not register
    await world.fall_silent("d0", 2.0)
    await world.fall_silent("d0", START_S)
    assert not world.calls.killed
    await world.fall_silent("d0", HEALTH_S + 1)
    assert world.calls.killed == ["actor-d0"]


async def test_who_has_not_yet_come_back_to_a_new_scheduler_hears_of_deaths_too(world: World) -> None:
    later = await World.of(world.calls)
    await later.supervisor.recall()
    assert await later.supervisor.admit(registration("prefill-0", "p0", "prefill", incarnation=2))  # in place of a dead one
    later.supervisor._end(later.supervisor._past["prefill-0-1"])
    silent = dict(later.supervisor._past)
    for incarnation in silent.values():
        incarnation.next_check = float("inf")  # nobody asks Ray about them yet
    await later.pass_time(LATE_S + 1, frozenset(["prefill-0"]))
    assert later.told == others("prefill-0", "prefill-0-1") | {("actor-prefill-0", "prefill-0-1")}


async def test_a_new_scheduler_buries_who_died_while_there_was_none(world: World) -> None:
    later = await World.of(world.calls)
    await later.supervisor.recall()
    for engine_id, node_id, role in PARTS:
        incarnation = 2 if engine_id == "prefill-0" else 1
        assert await later.supervisor.admit(registration(engine_id, node_id, role, incarnation))
    world.calls.pids["actor-prefill-0"] = 2
    living = frozenset(part[0] for part in PARTS)
    for incarnation in later.supervisor.current.values():
        incarnation.registration = replace(incarnation.registration, pid=2)
    for incarnation in later.supervisor._past.values():
        incarnation.heard_at -= 2.0
    await later.pass_time(0.0, living)
    assert not later.over, "what it served was not this scheduler's"
    await later.pass_time(LATE_S + 1, living)
    assert later.told == others("prefill-0", "prefill-0-1") | {("actor-prefill-0", "prefill-0-1")}


async def test_a_message_that_is_lost_is_said_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from actors import supervisor as module

    monkeypatch.setattr(module, "RECHECK_S", 0.0)
    world.calls.pids["actor-prefill-0"] = None
    await world.fall_silent("prefill-0", 2.0)
    world.calls.lose_call = "peer_died"
    await world.fall_silent("prefill-0", LATE_S)
    async with asyncio.timeout(5):
        while world.told != others("prefill-0", "prefill-0-1"):
            await asyncio.sleep(0.01)


def test_every_registration_can_be_kept() -> None:
    import pickle

    made: Registration = registration("p0", "p0", None)
    assert pickle.loads(pickle.dumps(made)) == made
