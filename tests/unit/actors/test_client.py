"""What a client asks for after an attempt has failed. The cluster is emulated: it fails as told, then answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from actors.client import ClusterClient
from actors.messages import Submission, attempt_name
from actors.outbox import Letter
from dualpath_ray.errors import BlockCorruptError, DualPathError, StoreError, TransferError, UnansweredError
from dualpath_ray.messages import DecodeTask, Route
from dualpath_ray.requests import GenerationDelta, GenerationRequest, GenerationUsage
from tests.unit.actors.emulation import BLOCK, FACTS

PROMPT = tuple(range(2 * BLOCK + 1))


class FailingCluster:
    """Emulates `actors.calls.ActorCalls` and a cluster behind it: attempts raise `errors`, one each, and then are answered."""

    def __init__(self, *errors: DualPathError) -> None:
        self.errors = list(errors)
        self.submissions: list[Submission] = []
        self.tasks: list[DecodeTask] = []

    async def call(self, name: str, method: str, *arguments: Any, timeout_s: float = 1.0) -> Any:
        if method == "describe":
            return FACTS
        if method == "begin":
            self.tasks.append(arguments[1])
            return "engine", len(self.tasks)
        (submission,) = arguments
        self.submissions.append(submission)
        return Route(submission.request_id, submission.epoch, "prefill-0", "decode-0", "p0", "d0", len(submission.keys), (), {})

    async def stream(self, name: str, method: str, *arguments: Any, timeout_s: float) -> AsyncGenerator[Letter, None]:
        request, route = self.tasks[-1].request, self.tasks[-1].route
        attempt, number = attempt_name(request.request_id, route.epoch), len(self.tasks)
        usage = GenerationUsage(len(PROMPT), BLOCK, BLOCK + 1, read_bytes={"decode_node": 9}, first_token_s={"compute": 0.0})
        if self.errors:
            yield Letter("engine", {attempt: self.errors.pop(0)}, number, 0)
        elif request.max_new_tokens == 1:
            yield Letter("engine", {attempt: GenerationDelta((7,), "length", usage)}, number, 0)
        else:
            yield Letter("engine", {attempt: GenerationDelta((7,), usage=usage)}, number, 1)
            await asyncio.Event().wait()

    def send(self, name: str, method: str, *arguments: Any) -> None:
        return


async def ask(cluster: FailingCluster) -> list[Submission]:
    client = ClusterClient("unit-test", cluster)  # type: ignore[arg-type]
    deltas = [delta async for delta in client.generate(GenerationRequest("r", PROMPT, 1))]
    assert [delta.tokens for delta in deltas] == [(7,)]
    return cluster.submissions


@pytest.mark.parametrize(
    ("error", "hits"), [(StoreError("503"), 0), (BlockCorruptError(b"key", "damaged"), 2), (TransferError("no way"), 2)]
)
async def test_only_a_store_that_fails_as_a_whole_is_left_alone(error: DualPathError, hits: int) -> None:
    submissions = await ask(FailingCluster(error, TransferError("once more")))
    assert [len(submission.keys) for submission in submissions] == [2, hits, hits]
    assert [submission.epoch for submission in submissions] == [0, 1, 2]


async def test_the_scheduler_is_told_who_did_not_answer() -> None:
    submissions = await ask(FailingCluster(UnansweredError("silence", "gateway-d0"), TransferError("no way")))
    assert [submission.suspect for submission in submissions] == ["", "gateway-d0", ""]


@pytest.mark.parametrize("enough", [False, True])
async def test_one_who_leaves_in_mid_stream_is_in_the_figures(enough: bool) -> None:
    """Who has enough, as the HTTP layer has at a stop string, did not cancel. What was read and cached for either is told."""
    client = ClusterClient("unit-test", FailingCluster())  # type: ignore[arg-type]
    said = asyncio.Event()
    deltas = client.generate(GenerationRequest("r", PROMPT, 5), said)
    await anext(deltas)
    if enough:
        said.set()
    await deltas.aclose()
    figures = client._metrics.render().splitlines()
    assert [line for line in figures if line.startswith("dualpath_requests_total")] == [
        f'dualpath_requests_total{{outcome="{"stop" if enough else "cancelled"}"}} 1.0'
    ]
    assert "dualpath_requests_active 0.0" in figures
    assert "dualpath_ttft_seconds_count 1.0" in figures
    assert 'dualpath_ttft_part_seconds_count{part="handshake"} 1.0' in figures
    assert 'dualpath_tokens_total{kind="generated"} 1.0' in figures
    assert f'dualpath_tokens_total{{kind="cached"}} {BLOCK}.0' in figures
    assert 'dualpath_kv_read_bytes_total{side="decode_node"} 9.0' in figures
