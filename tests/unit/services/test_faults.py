"""Damaged blocks, failing stores, late layers and cancelled requests: right text or a retryable error, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from dualpath_ray.config.telemetry import TelemetrySettings
from dualpath_ray.errors import (
    BlockError,
    CancelledError,
    DualPathError,
    InvalidRequestError,
    OverloadedError,
    StaleEpochError,
    TransferError,
)
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.messages import LeaseRequest
from dualpath_ray.stores.base import BlockStore
from dualpath_ray.stores.emulated import EmulatedStore, EmulationSettings
from dualpath_ray.telemetry import tracing
from tests.unit.services.harness import Side, System, running_system, shared_model

PROMPT = [random.Random(7).randrange(3, 500) for _ in range(330)]


def emulated(settings: EmulationSettings):  # type: ignore[no-untyped-def]
    def wrap(store: BlockStore, geometry: KVGeometry) -> BlockStore:
        return EmulatedStore(store, geometry, settings)

    return wrap


async def warm(system: System, prompt: list[int] = PROMPT) -> list[int]:
    """Fill the store; returns the right continuation."""
    answer = await system.ask(prompt, "recompute")
    await system.settle()
    return answer.tokens


def block_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size > 8192)


@pytest.mark.parametrize("side", ["prefill", "decode", "split"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
async def test_a_damaged_block_is_never_served(tiny_llama: Path, tmp_path: Path, side: Side, damage: str) -> None:
    async with running_system(shared_model(tiny_llama), tmp_path) as system:
        expected = await warm(system)
        stored = len(system.index)
        for file in block_files(tmp_path)[::5]:
            if damage == "flip":
                content = bytearray(file.read_bytes())
                content[len(content) // 2] ^= 1
                file.write_bytes(content)
            elif damage == "truncate":
                file.write_bytes(file.read_bytes()[:5000])
            else:
                file.unlink()
        failures = 0
        while True:
            try:
                answer = await system.ask(PROMPT, side)
                break
            except BlockError as error:
                assert error.retryable
                failures += 1
                assert failures <= stored
        assert failures > 0
        assert answer.tokens == expected
        assert answer.usage.cached_tokens < 320


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_failing_store_gives_a_retryable_error_and_the_next_attempt_may_succeed(
    tiny_llama: Path, tmp_path: Path, side: Side
) -> None:
    async with running_system(shared_model(tiny_llama), tmp_path) as system:
        expected = await warm(system)
    faults = EmulationSettings(error_rate=0.4, seed=3)
    async with running_system(shared_model(tiny_llama), tmp_path, wrap=emulated(faults)) as system:
        errors = 0
        for _ in range(20):
            try:
                assert (await system.ask(PROMPT, side)).tokens == expected
            except DualPathError as error:
                assert error.retryable, error
                errors += 1
        assert 0 < errors < 20
        assert (await system.ask(PROMPT, "recompute")).tokens == expected


async def test_a_late_layer_delays_only_itself(tiny_llama: Path, tmp_path: Path) -> None:
    """Must hold 3: the layers before the late one are computed while it is on its way; the trace shows who waited."""
    store, traces = tmp_path / "store", tmp_path / "traces"
    async with running_system(shared_model(tiny_llama), store) as system:
        expected = await warm(system)
    late = EmulationSettings(delay_layer={2: 0.5})
    tracing.setup(TelemetrySettings(traces="file", trace_path=traces), "test", "0")
    try:
        async with running_system(shared_model(tiny_llama), store, window_layers=4, wrap=emulated(late)) as system:
            with tracing.span("request") as root:
                answer = await system.ask(PROMPT, "decode", trace=root.carrier())
            assert answer.tokens == expected
    finally:
        tracing.shutdown()
    spans = [json.loads(line) for file in traces.iterdir() for line in file.read_text().splitlines()]
    assert {span["name"] for span in spans} == {
        "request", "decode.arm", "gateway.read", "prefill", "prefill.queue", "prefill.layer", "decode.allocate", "gateway.deliver", "decode"
    }  # fmt: skip
    assert len({span["trace_id"] for span in spans}) == 1
    waited = {span["attributes"]["layer"]: span["attributes"]["waited_s"] for span in spans if span["name"] == "prefill.layer"}
    read = next(span for span in spans if span["name"] == "gateway.read")
    first = next(span for span in spans if span["name"] == "prefill.layer" and span["attributes"]["layer"] == 0)
    assert set(waited) == {0, 1, 2, 3}
    assert waited[2] > 0.3
    assert waited[2] > 5 * max(waited[1], waited[3])
    assert first["end_ns"] < read["end_ns"]  # layer 0 was computed before the read of the blocks had ended


async def test_a_lost_gateway_fails_what_waits_for_it_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    """It would have been answered, late. Here the gateway lives after all and says that nothing is under way: its rows are free again."""
    store = tmp_path / "store"
    async with running_system(shared_model(tiny_llama), store) as system:
        expected = await warm(system)
    late = EmulationSettings(delay_layer={2: 1.0})
    async with running_system(shared_model(tiny_llama), store, window_layers=4, wrap=emulated(late)) as system:
        asked = asyncio.create_task(system.ask(PROMPT, "prefill"))
        while not system.prefill_service._in_batch:
            await asyncio.sleep(0.001)
        system.prefill_service.peer_lost(system.gateways["p0"].endpoint.agent_name)
        assert system.prefill_service.sink.free_rows() == [range(20, system.prefill_service.capacity_blocks)]
        with pytest.raises(TransferError, match="lost"):
            await asked
        await system.settle()
        assert system.prefill_service.sink.free_rows() == [range(system.prefill_service.capacity_blocks)]
        assert (await system.ask(PROMPT, "prefill")).tokens == expected


async def test_an_engine_goes_on_beside_rows_that_a_lost_gateway_may_write_to(tiny_llama: Path, tmp_path: Path) -> None:
    """A prompt of 21 blocks in a window of 64: it goes where there is room for it, waits while there is none, and is refused by an engine
    that can use less than half of its window."""
    async with running_system(shared_model(tiny_llama), tmp_path) as system:
        expected = await warm(system)
        service = system.prefill_service
        rows = service.sink._rows
        rows.take("lost", range(2, 30))
        assert [(await system.ask(PROMPT, side)).tokens for side in ("prefill", "decode", "recompute")] == [expected] * 3
        rows.take("lost, too", range(50, 60))
        assert service.unfinished_tokens > service.capacity_blocks * 16
        with pytest.raises(OverloadedError, match="lost gateway"):
            await system.ask(PROMPT, "prefill")
        rows.give_back("lost")
        asked = asyncio.create_task(system.ask(PROMPT, "prefill"))
        while not service._jobs:
            await asyncio.sleep(0.001)
        rows.take("lost", range(2, 30))  # after the engine took the request: it has to wait
        done, _ = await asyncio.wait([asked], timeout=0.3)
        assert not done
        rows.give_back("lost")
        service.sink.on_rows_freed()
        assert (await asked).tokens == expected
        rows.give_back("lost, too")


@pytest.mark.parametrize("phase", ["waiting for slots", "reading", "prefilling", "first token", "decoding"])
@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_cancel_frees_everything(tiny_llama: Path, tmp_path: Path, phase: str, side: Side) -> None:
    """Must hold 4. `running_system` asserts at the end that nothing is held and all books balance."""
    async with running_system(shared_model(tiny_llama), tmp_path) as system:
        await warm(system)
    slow = EmulationSettings(latency_s=0.4) if phase == "reading" else EmulationSettings()
    async with running_system(shared_model(tiny_llama), tmp_path, chunk_tokens=16, wrap=emulated(slow)) as system:
        how: Side = "recompute" if phase == "prefilling" else side
        request = system.request(PROMPT, 600)
        stream = system.stream(request, how)
        blockers = []
        if phase == "waiting for slots":
            gateway = system.gateways["d0"]
            blockers = [await gateway.lease(LeaseRequest("hog", "test", gateway.staging.free_slots))]
        got: list[int] = []

        async def consume() -> None:
            async for delta in stream:
                got.extend(delta.tokens)

        consumer = asyncio.create_task(consume())
        wanted = {"waiting for slots": 0, "reading": 0, "prefilling": 0, "first token": 1, "decoding": 30}[phase]
        await asyncio.sleep(0.05)
        while len(got) < wanted:
            await asyncio.sleep(0.001)
        assert not consumer.done()
        system.decode_service.cancel(request.request_id, 0)
        with pytest.raises(CancelledError):
            await consumer
        assert len(got) < 600
        for grant in blockers:
            await asyncio.sleep(0.05)  # the withdrawn request is gone before slots come free
            assert not system.decode_service.unfinished_requests
            await system.gateways["d0"].release(grant.lease_id)
        await system.settle()


async def test_many_cancelled_requests_at_random_moments_leave_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    generator = random.Random(11)
    sides: list[Side] = ["prefill", "decode", "split", "recompute"]
    async with running_system(shared_model(tiny_llama), tmp_path, chunk_tokens=64) as system:
        expected = await warm(system)

        async def one(number: int) -> None:
            request = system.request(PROMPT, 12)
            delay = generator.random() * 0.3
            got: list[int] = []

            async def consume() -> None:
                async for delta in system.stream(request, sides[number % 4]):
                    got.extend(delta.tokens)

            task = asyncio.create_task(consume())
            await asyncio.sleep(delay)
            if number % 2:
                task.cancel()
            else:
                system.decode_service.cancel(request.request_id, 0)
            await asyncio.gather(task, return_exceptions=True)
            assert got == expected[: len(got)]

        for _ in range(3):
            await asyncio.gather(*(one(number) for number in range(16)))
        await system.settle()
        assert (await system.ask(PROMPT, "split")).tokens == expected


async def test_staging_smaller_than_the_load_makes_requests_wait_not_fail(tiny_llama: Path, tmp_path: Path) -> None:
    """Six requests of 21 blocks each through 48 slots per node."""
    async with running_system(shared_model(tiny_llama), tmp_path, slots=48) as system:
        expected = await warm(system)
        sides: list[Side] = ["prefill", "decode", "split"]
        answers = await asyncio.gather(*(system.ask(PROMPT, sides[i % 3]) for i in range(6)))
        assert all(answer.tokens == expected for answer in answers)


async def test_a_full_pool_and_full_staging_do_not_wait_for_each_other(tiny_llama: Path, tmp_path: Path) -> None:
    """Prompts in staging wait for pool blocks, which finished requests free only when their last blocks are out, through staging."""
    async with running_system(shared_model(tiny_llama), tmp_path, slots=40, pool_blocks=27) as system:
        prompts = [[random.Random(i).randrange(3, 500) for _ in range(320)] for i in range(8)]
        async with asyncio.timeout(25):  # a lease for persisting gives up after 30 s
            answers = await asyncio.gather(*(system.ask(prompt, "recompute", max_new=100) for prompt in prompts))
        assert all(len(answer.tokens) == 100 for answer in answers)
        assert system.decode_service.persister.skipped_blocks == 0


async def test_store_errors_while_persisting_do_not_hurt_the_answer(tiny_llama: Path, tmp_path: Path) -> None:
    async with running_system(shared_model(tiny_llama), tmp_path, wrap=emulated(EmulationSettings(error_rate=1.0))) as system:
        answer = await system.ask(PROMPT, "recompute", max_new=40)
        await system.settle()
        assert len(answer.tokens) == 40
        assert len(system.index) == 0


async def test_a_request_with_impossible_tokens_fails_alone(tiny_llama: Path, tmp_path: Path) -> None:
    async with running_system(shared_model(tiny_llama), tmp_path) as system:
        wrong, right = await asyncio.gather(system.ask([5, 6, 10**6], "recompute"), system.ask(PROMPT, "recompute"), return_exceptions=True)
        assert isinstance(wrong, InvalidRequestError)
        assert not isinstance(right, BaseException)


async def test_a_request_that_has_not_begun_can_be_taken_back(tiny_llama: Path, tmp_path: Path) -> None:
    slow = emulated(EmulationSettings(latency_s=0.5))
    async with running_system(shared_model(tiny_llama), tmp_path, wrap=slow) as system:
        expected = await warm(system)
        taken = asyncio.ensure_future(system.ask(PROMPT, "split"))
        async with asyncio.timeout(10):
            while not system.prefill_service.unfinished_requests:
                await asyncio.sleep(0.005)
        (job,) = system.prefill_service._jobs
        assert not system.prefill_service.give_back(job.task.request_id, 1), "that is another attempt"
        assert system.prefill_service.give_back(job.task.request_id, 0)
        assert not system.prefill_service.give_back(job.task.request_id, 0)
        with pytest.raises(StaleEpochError, match="taken back") as raised:
            await taken
        assert raised.value.retryable
        await system.settle()
        assert (await system.ask(PROMPT, "split")).tokens == expected
