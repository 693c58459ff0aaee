"""OpenAI's batch format: a file of requests in, a file of results out, in constant memory."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from deploy.openai_api.caller import Caller
from deploy.openai_api.errors import ApiError, api_error
from deploy.openai_api.reply import JsonReply
from deploy.openai_api.service import CHAT, TEXT, OpenAIService

RETRIED = (429, 503)  # a batch waits where an interactive client would be turned away
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
ATTEMPTS = 10


class BatchLine(BaseModel):
    """One line of the input."""

    model_config = ConfigDict(strict=True)

    custom_id: str
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LineDone:
    """One result has been written. `read_bytes` is the length of its input line."""

    failed: bool
    read_bytes: int
    tokens: int


def bounded_lines(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """The lines of `file`; of one that is longer than `limit` bytes only the beginning, which is then no JSON and fails as such."""
    while line := file.readline(limit):
        yield line
        while len(line) == limit and not line.endswith(b"\n"):
            line = file.readline(limit)


async def run_batch(
    service: OpenAIService,
    lines: Iterable[bytes],
    results: IO[str],
    *,
    concurrency: int,
    tenant: str = "",
    on_done: Callable[[LineDone], None] = lambda _: None,
) -> None:
    """Answer every line of `lines`, `concurrency` at a time, and write one result line each to `results`, as they finish.

    Results are found by `custom_id`; their order is not that of the input. What is wrong with one line fails that line only. Raises
    OSError when `results` cannot be written; then, as when cancelled, all requests in progress are cancelled first.
    """
    places = asyncio.Semaphore(concurrency)

    async def answer(line: bytes) -> None:
        try:
            result = await _result(service, line, tenant)
            results.write(json.dumps(result, ensure_ascii=False) + "\n")
            on_done(_summary(result, line))
        finally:
            places.release()

    try:
        async with asyncio.TaskGroup() as group:
            for line in lines:
                if not line.strip():
                    continue
                await places.acquire()
                group.create_task(answer(line))
    except* OSError as failures:
        raise failures.exceptions[0] from None


async def _result(service: OpenAIService, line: bytes, tenant: str) -> dict[str, Any]:
    caller = Caller(uuid.uuid4().hex, tenant)
    parsed: Any = None
    try:
        parsed = from_json(line, allow_inf_nan=False)
        request = BatchLine.model_validate(parsed)
        if request.url not in (CHAT, TEXT):
            raise ApiError(400, f"url must be {CHAT} or {TEXT}, not {request.url[:100]!r}", param="url", code="invalid_url")
        if request.body.get("stream"):
            raise ApiError(400, "stream is not possible in a batch", param="stream", code="invalid_value")
    except (ValueError, ApiError) as error:  # ValidationError is a ValueError
        custom_id = parsed.get("custom_id") if isinstance(parsed, dict) else None
        return _unanswered(caller, custom_id, error)
    reply = await _patiently(service, request, caller)
    response = {"status_code": reply.status, "request_id": caller.request_id, "body": json.loads(reply.body)}
    return {"id": f"batch_req_{caller.request_id}", "custom_id": request.custom_id, "response": response, "error": None}


async def _patiently(service: OpenAIService, request: BatchLine, caller: Caller) -> JsonReply:
    """The answer, after more attempts if the cluster is overloaded or recovering."""
    pause_s = FIRST_PAUSE_S
    attempts = 0
    while True:
        reply = await service.generate(request.url, request.body, caller)
        attempts += 1
        assert isinstance(reply, JsonReply)  # streams were refused
        if reply.status not in RETRIED or attempts == ATTEMPTS:
            return reply
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _unanswered(caller: Caller, custom_id: Any, error: Exception) -> dict[str, Any]:
    """The result of a line that is no request."""
    failure = (
        api_error(error) if isinstance(error, ApiError | ValidationError) else ApiError(400, f"not JSON: {error}", code="invalid_json")
    )
    return {
        "id": f"batch_req_{caller.request_id}",
        "custom_id": custom_id if isinstance(custom_id, str) else None,
        "response": None,
        "error": {"code": failure.code, "message": str(failure)},
    }


def _summary(result: Mapping[str, Any], line: bytes) -> LineDone:
    response = result["response"]
    usage = response["body"].get("usage") if response else None
    return LineDone(not response or response["status_code"] != 200, len(line), usage["total_tokens"] if usage else 0)
