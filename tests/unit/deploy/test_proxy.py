"""Around an emulation of Serve's proxy: its own answers, and what passes through it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import validate_http_proxy_callback_return
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.http_api.proxy import CALLBACK, ProxyAnswers, middlewares


def proxy(answer: Response | None) -> httpx.AsyncClient:
    """Emulates a proxy whose application gives `answer`; None: the replica died."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if answer is not None:
            answer.headers["x-request-id"] = Request(scope).headers["x-request-id"]
            await answer(scope, receive, send)

    wrapped: ASGIApp = ProxyAnswers(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(wrapped), base_url="http://test", headers={"X-Request-Id": "mine"})


@pytest.mark.parametrize(
    ("answer", "status", "code", "retry_after"),
    [
        (PlainTextResponse("dropped", 429, {"Retry-After": "7"}), 429, "overloaded", "7"),
        (PlainTextResponse("unavailable", 503), 503, "unavailable", "1"),
        (PlainTextResponse("timed out", 408), 504, "deadline_exceeded", None),
        (None, 503, "unavailable", "1"),
    ],
)
async def test_the_proxy_s_own_answers_have_openai_s_shape(
    answer: Response | None, status: int, code: str, retry_after: str | None
) -> None:
    async with proxy(answer) as http:
        reply = await http.post("/v1/completions")
    error: dict[str, Any] = reply.json()["error"]
    assert (reply.status_code, error["code"], reply.headers.get("retry-after")) == (status, code, retry_after)
    assert error["message"] and error["type"] and "param" in error
    assert reply.headers.get_list("x-request-id") == ["mine"]


async def test_the_application_s_answers_pass_as_they_are() -> None:
    async def parts() -> Any:
        yield b"a"
        yield b"b"

    for answer, text in ((JSONResponse({"error": {}}, 429), '{"error":{}}'), (StreamingResponse(parts()), "ab")):
        async with proxy(answer) as http:
            reply = await http.post("/v1/completions")
        assert (reply.status_code, reply.text) == (answer.status_code, text)


async def test_other_applications_of_the_cluster_are_left_alone() -> None:
    async with proxy(PlainTextResponse("tea", 429)) as http:
        assert (await http.get("/theirs")).text == "tea"


async def test_an_unfit_request_id_is_replaced_before_the_proxy_returns_it() -> None:
    async with proxy(JSONResponse({})) as http:
        reply = await http.get("/v1/models", headers={"X-Request-Id": "not fit"})
    assert len(reply.headers["x-request-id"]) == 32


def test_serve_takes_the_callback() -> None:
    module, _, name = CALLBACK.partition(":")
    assert (module, name) == (middlewares.__module__, middlewares.__name__)
    assert validate_http_proxy_callback_return(middlewares())
