"""The routes of the HTTP service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response

from deploy.access.access import Access
from deploy.dashboard import page
from deploy.http_api.document import add_schemas, body_of
from deploy.http_api.exchange import Exchange
from deploy.http_api.request_ids import RequestIds
from deploy.openai_api.errors import CLIENT_CLOSED_REQUEST, ApiError, api_error
from deploy.openai_api.reply import JsonReply
from deploy.openai_api.requests import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from deploy.openai_api.service import CHAT, TEXT, OpenAIService


def make_api(service: OpenAIService, max_body_bytes: int, access: Access | None = None, body_timeout_s: float = 60.0) -> FastAPI:
    """The ASGI application in front of `service`; `access` defaults to no authentication.

    Bodies are parsed by the service and not by FastAPI: batch files take the same way, and every error has OpenAI's shape.
    """
    api = FastAPI(title="dualpath_ray", description="OpenAI-compatible API", docs_url=None, redoc_url=None)
    api.add_middleware(RequestIds)
    door = access or Access()

    def generation(path: str, model: type[BaseModel]) -> None:
        async def endpoint(request: Request) -> Response:
            # Before the body is read: who may not come in sends nothing.
            caller, leave = door.enter(request.headers, request.state.request_id)
            try:
                body = await read_body(request, max_body_bytes, body_timeout_s)
            except BaseException:
                leave()
                raise
            return Exchange(lambda: service.generate(path, body, caller), leave)

        api.post(path, summary=model.__doc__, openapi_extra=body_of(model), response_model=None)(endpoint)

    generation(CHAT, ChatCompletionRequest)
    generation(TEXT, CompletionRequest)

    def plain(path: str, model: type[BaseModel], answer: Callable[[bytes], Awaitable[JsonReply]]) -> None:
        async def endpoint(request: Request) -> Response:
            door.caller(request.headers, request.state.request_id)
            return json_response(await answer(await read_body(request, max_body_bytes, body_timeout_s)))

        api.post(path, summary=model.__doc__, openapi_extra=body_of(model), response_model=None)(endpoint)

    plain("/tokenize", TokenizeRequest, service.tokenize)
    plain("/detokenize", DetokenizeRequest, service.detokenize)
    add_schemas(api, ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)

    @api.get("/v1/models", summary="The served model")
    async def models(request: Request) -> Response:
        door.caller(request.headers, request.state.request_id)
        return json_response(service.models())

    @api.get("/v1/models/{name:path}", summary="The served model, by name")
    async def model(name: str, request: Request) -> Response:
        door.caller(request.headers, request.state.request_id)
        return json_response(service.model(name))

    @api.get("/health", summary="200 while requests can be served, otherwise 503")
    async def health() -> Response:
        return json_response(await service.health())

    @api.get("/metrics", summary="Metrics in Prometheus' text format")
    async def metrics(request: Request) -> Response:
        exposition = await service.metrics(request.headers.get("accept", ""))
        return Response(exposition.text, headers={"content-type": exposition.content_type})

    @api.get("/status", summary="What runs where, queues, bytes moved and recent events")
    async def status() -> Response:
        return json_response(await service.status())

    @api.get("/dashboard", summary="The same as a page that keeps itself up to date")
    async def dashboard() -> Response:
        return HTMLResponse(page())

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{error.detail}: {request.method} {request.url.path}"
        return json_response(JsonReply.of_error(ApiError(error.status_code, message, code=code, headers=error.headers)))

    @api.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return json_response(JsonReply.of_error(error))

    @api.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return json_response(JsonReply.of_error(api_error(error)))

    return api


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The whole body. Stops reading past `limit` bytes and raises ApiError (413); 408 if it does not come within `timeout_s`."""
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    parts: list[bytes] = []
    if size <= limit:
        size = 0
        try:
            async with asyncio.timeout(timeout_s):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        break
        except ClientDisconnect as error:
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client left before its body was complete", type="cancelled") from error
        except TimeoutError as error:
            message = f"the body was not complete after {timeout_s:g} s (serving.body_timeout_s)"
            raise ApiError(408, message, type="timeout_error", code="request_timeout") from error
    if size > limit:
        raise ApiError(413, f"the body is larger than {limit} bytes (serving.max_body_bytes)", code="request_too_large")
    return b"".join(parts)


def json_response(reply: JsonReply) -> Response:
    return Response(reply.body, reply.status, dict(reply.headers), media_type="application/json")
