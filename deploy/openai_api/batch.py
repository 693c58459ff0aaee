"""OpenAI's batch format: a file of requests in, a file of results out, read and written line by line."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from deploy.openai_api.caller import Caller
from deploy.openai_api.errors import ApiError, api_error
from deploy.openai_api.finished_lines import FinishedLines
from deploy.openai_api.reply import JsonReply, Reply, on_one_line
from deploy.openai_api.rollouts import ROLLOUT, rollout
from deploy.openai_api.service import CHAT, TEXT, OpenAIService

RETRIED = (429, 503)  # a batch waits where an interactive client would be turned away
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
ATTEMPTS = 10
URLS = (CHAT, TEXT, ROLLOUT)
RESULT_ID = "batch_req_"
NOBODY = Caller("batch")


class BatchLine(BaseModel):
    """One line of the input."""

    model_config = ConfigDict(strict=True)

    custom_id: str
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LineDone:
    """A line is done with. `read_bytes` is its length; `skipped`: it had its result already."""

    failed: bool
    read_bytes: int
    tokens: int
    skipped: bool = False


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
    caller: Caller = NOBODY,
    errors: IO[str] | None = None,
    finished: FinishedLines | None = None,
    on_done: Callable[[LineDone], None] = lambda _: None,
) -> None:
    """Answer every line of `lines`, `concurrency` at a time, and write one result line each as they finish: to `results`, or where
    `errors` is given to that for what failed. `caller` is who asks.

    Results are found by `custom_id`; their order is not that of the input. What is wrong with one line fails that line only. Lines in
    `finished` are left out. Raises OSError when a result cannot be written; then, as when cancelled, all requests in progress are
    cancelled first.
    """
    places = asyncio.Semaphore(concurrency)
    finished = FinishedLines() if finished is None else finished
    earlier = len(finished)
    this_run = FinishedLines()

    async def answer(line: bytes, request: BatchLine | ApiError, name: str) -> None:
        try:
            result = await _result(service, request, name, caller)
            done = _summary(result, line)
            (errors if errors is not None and done.failed else results).write(on_one_line(json.dumps(result, ensure_ascii=False)) + "\n")
            on_done(done)
        finally:
            places.release()

    try:
        async with asyncio.TaskGroup() as group:
            for line in lines:
                if not line.strip():
                    continue
                request, name = _parsed(line)
                if earlier and name in finished:
                    on_done(LineDone(False, len(line), 0, skipped=True))
                    continue
                if not this_run.add(name) and isinstance(request, BatchLine):
                    request = ApiError(400, "another line has this custom_id", param="custom_id", code="duplicate_custom_id")
                await places.acquire()
                group.create_task(answer(line, request, name))
    except* OSError as failures:
        raise failures.exceptions[0] from None


def parse_line(line: bytes) -> BatchLine:
    """Raises ApiError for what is no request of a batch."""
    try:
        parsed = from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"not JSON: {error}", code="invalid_json") from error
    try:
        request = BatchLine.model_validate(parsed)
    except ValidationError as error:
        raise api_error(error) from error
    if request.url not in URLS:
        raise ApiError(400, f"url must be one of {', '.join(URLS)}, not {request.url[:100]!r}", param="url", code="invalid_url")
    if request.body.get("stream"):
        raise ApiError(400, "stream is not possible in a batch", param="stream", code="invalid_value")
    return request


def _parsed(line: bytes) -> tuple[BatchLine | ApiError, str]:
    """The request, or why it is none, and the name under which its result is found: `custom_id`, else a digest of the line."""
    try:
        request = parse_line(line)
    except ApiError as error:
        try:
            name = from_json(line)["custom_id"]
        except (ValueError, KeyError, TypeError):
            name = None
        return error, name if isinstance(name, str) and name else _unnamed(line)
    return request, request.custom_id


def _unnamed(line: bytes) -> str:
    return f"{RESULT_ID}{hashlib.blake2b(line.strip(), digest_size=16).hexdigest()}"


async def _result(service: OpenAIService, request: BatchLine | ApiError, name: str, caller: Caller) -> dict[str, Any]:
    if isinstance(request, ApiError):
        unnamed = name.startswith(RESULT_ID)
        return {
            "id": name if unnamed else f"{RESULT_ID}{uuid.uuid4().hex}",
            "custom_id": None if unnamed else name,
            "response": None,
            "error": {"code": request.code, "message": str(request)},
        }
    caller = replace(caller, request_id=uuid.uuid4().hex)
    reply = await _patiently(service, request, caller)
    response = {"status_code": reply.status, "request_id": caller.request_id, "body": json.loads(reply.body)}
    return {"id": f"{RESULT_ID}{caller.request_id}", "custom_id": request.custom_id, "response": response, "error": None}


async def _patiently(service: OpenAIService, request: BatchLine, caller: Caller) -> JsonReply:
    """The answer, after more attempts if the cluster is overloaded or recovering."""
    pause_s = FIRST_PAUSE_S
    attempts = 0
    while True:
        reply = await _answer(service, request, caller)
        attempts += 1
        assert isinstance(reply, JsonReply)  # streams were refused
        if reply.status not in RETRIED or attempts == ATTEMPTS:
            return reply
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


async def _answer(service: OpenAIService, request: BatchLine, caller: Caller) -> Reply:
    if request.url != ROLLOUT:
        return await service.generate(request.url, request.body, caller)
    try:
        return await rollout(service, request.body, caller)
    except Exception as error:
        return JsonReply.of_error(api_error(error))


def _summary(result: Mapping[str, Any], line: bytes) -> LineDone:
    response = result["response"]
    answers = (response["body"].get("turns") or [response["body"]]) if response else []
    tokens = sum((answer.get("usage") or {}).get("total_tokens", 0) for answer in answers)
    return LineDone(not response or response["status_code"] != 200, len(line), tokens)
