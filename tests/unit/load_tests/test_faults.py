"""The fault suite's own parts: schedules, recovery, the checks that everything else rests on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dualpath_ray.errors import OverloadedError
from dualpath_ray.requests import GenerationDelta, GenerationRequest, SamplingParams
from load_tests.faults.faults import ALONE, PHASES, WEIGHTS, Targets, chain, possible, schedule
from load_tests.faults.load import Load
from load_tests.faults.reference import Session, Shape, Turn, make_sessions
from load_tests.faults.throughput import Throughput

TARGETS = Targets(["p0", "d0", "prefill-p0-0", "decode-d0-0"], ["p0", "d0"], ["p0-snic", "d0-cnic"], store=True, http=True)
SESSION = Session(SamplingParams(), (Turn((1, 2), (3, 4, 5)),))


def test_a_seed_fixes_the_schedule() -> None:
    assert list(schedule(TARGETS, 200, 7)) == list(schedule(TARGETS, 200, 7)) != list(schedule(TARGETS, 200, 8))


def test_a_long_schedule_has_every_kind_and_phase_and_exactly_as_many_faults_as_asked_for() -> None:
    faults = [fault for group in schedule(TARGETS, 1500, 1) for fault in group]
    assert len(faults) == 1500
    assert {fault.kind for fault in faults} == set(WEIGHTS) == set(possible(TARGETS))
    for target in TARGETS.engines:
        assert {fault.phase for fault in faults if (fault.kind, fault.target) == ("kill", target)} == set(PHASES)


def test_faults_at_the_same_time_touch_different_things() -> None:
    for group in schedule(TARGETS, 1500, 2):
        assert sum(fault.kind in ALONE for fault in group) <= 1
        apart = [fault for fault in group if fault.kind != "vanish"]
        for index, one in enumerate(apart):
            assert all(one.target != other.target or chain(one) == chain(other) for other in apart[index + 1 :])


def test_what_is_not_there_is_not_broken() -> None:
    kinds = set(possible(Targets(["p0"])))
    assert kinds == {"kill", "kill_scheduler", "hang", "hang_for_good", "vanish"}
    with pytest.raises(ValueError, match="kill_node"):
        next(schedule(Targets(["p0"]), 5, 1, only=["kill_node"]))


def test_recovery_is_the_start_of_the_first_window_at_the_calm_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("load_tests.faults.throughput.time.monotonic", lambda: clock[0])
    throughput = Throughput()
    for tick in range(400):  # 10 tokens/s, none between 20 s and 30 s
        clock[0] = tick / 10
        if not 200 <= tick < 300:
            throughput.add(1)
    throughput.note_calm(0.0, 20.0)
    assert throughput.calm_rate == 10.0
    assert throughput.recovered_after(25.0, 29.0) is None
    assert throughput.recovered_after(28.0, 40.0) == pytest.approx(2.0, abs=0.2)
    assert throughput.recovered_after(31.0, 40.0) == 0.0


@dataclass
class Emulated:
    """Emulates a cluster that answers `tokens`, or raises, or never answers."""

    tokens: tuple[int, ...] = (3, 4, 5)
    error: Exception | None = None
    silent: bool = False
    asked: list[GenerationRequest] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        self.asked.append(request)
        yield GenerationDelta(self.tokens[:1])
        if self.silent:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        yield GenerationDelta(self.tokens[1:], "length")


async def play(cluster: Emulated, timeout_s: float = 5.0, vanish: bool = False) -> Load:
    load = Load([cluster], [SESSION], agents=1, period_s=60.0, timeout_s=timeout_s, seed=1)
    async with load:
        while not cluster.asked:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        if vanish:
            assert load.vanish(1.0) == 1
        await load.pause()
    return load


@pytest.mark.parametrize("tokens", [(3, 4, 6), (3, 4), (3, 4, 5, 5)])
async def test_a_wrong_a_lost_and_a_repeated_token_are_found(tokens: tuple[int, ...]) -> None:
    stats = (await play(Emulated(tokens))).stats
    assert (stats.requests, stats.answered, stats.wrong_texts) == (1, 1, 1)


async def test_a_right_answer_is_right() -> None:
    stats = (await play(Emulated())).stats
    assert (stats.requests, stats.answered, stats.wrong_texts) == (1, 1, 0)


async def test_a_wrong_token_before_an_error_is_found_and_errors_are_told_apart() -> None:
    stats = (await play(Emulated((9,), OverloadedError("full")))).stats
    assert (stats.refused, stats.unclear, stats.wrong_texts) == (1, 0, 1)
    crash = (await play(Emulated((3,), RuntimeError("a bug")))).stats
    assert (crash.refused, crash.unclear, crash.wrong_texts) == (0, 1, 0)


async def test_a_request_that_does_not_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("load_tests.faults.load.LATE_S", 0.05)
    assert (await play(Emulated(silent=True), timeout_s=0.05)).stats.hung_requests == 1


async def test_a_client_that_vanishes_is_no_failure() -> None:
    stats = (await play(Emulated(silent=True), vanish=True)).stats
    assert (stats.vanished, stats.hung_requests, stats.wrong_texts) == (1, 0, 0)


def test_references_are_those_of_transformers(tiny_llama: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    (session,) = make_sessions(tiny_llama, 1, Shape(turns=2, first=40, append=10, generate=6), seed=3, vocabulary=500)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for turn in session.turns:
        out = plain.generate(torch.tensor([turn.prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tuple(out[0, len(turn.prompt) :].tolist()) == turn.answer
    assert session.turns[1].prompt[: len(session.turns[0].prompt) + 6] == session.turns[0].prompt + session.turns[0].answer
