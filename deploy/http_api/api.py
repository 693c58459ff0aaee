"""The routes of the HTTP service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from deploy.access.access import Access
from deploy.batches.batch_store import BatchRequest
from deploy.dashboard import page
from deploy.http_api.batch_api import add_batch_api
from deploy.http_api.body import json_response, read_body
from deploy.http_api.document import add_schemas, body_of
from deploy.http_api.exchange import Exchange
from deploy.http_api.request_ids import RequestIds
from deploy.openai_api.errors import ApiError, api_error
from deploy.openai_api.reply import JsonReply
from deploy.openai_api.requests import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from deploy.openai_api.service import CHAT, TEXT, OpenAIService
from dualpath_ray.config.serving import ServingSettings


def make_api(
    service: OpenAIService, serving: ServingSettings, access: Access | None = None, *, request_ids_returned: bool = False
) -> FastAPI:
    """The ASGI application in front of `service`; `access` defaults to no authentication. `request_ids_returned`: by who is in front.

    Bodies are parsed by the service and not by FastAPI: batch files take the same way, and every error has OpenAI's shape.
    """
    api = FastAPI(title="dualpath_ray", description="OpenAI-compatible API", docs_url=None, redoc_url=None, redirect_slashes=False)
    api.add_middleware(RequestIds, returned=request_ids_returned)
    door = access or Access()
    max_body_bytes, body_timeout_s = int(serving.max_body_bytes), serving.body_timeout_s

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
    if serving.files is not None:
        add_batch_api(api, serving.files, door, int(serving.max_file_bytes), max_body_bytes, body_timeout_s)
    add_schemas(api, BatchRequest, ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)

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
    async def status(request: Request) -> Response:
        door.caller(request.headers, request.state.request_id)
        return json_response(await service.status())

    @api.get("/dashboard", summary="The same as a page that keeps itself up to date")
    async def dashboard() -> Response:
        return HTMLResponse(page())

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{error.detail}: {request.method} {request.url.path}"
        return json_response(JsonReply.of_error(ApiError(error.status_code, message, code=code, headers=error.headers)))

    @api.exception_handler(ValidationError)
    async def invalid(_: Request, error: ValidationError) -> Response:
        return json_response(JsonReply.of_error(api_error(error)))

    @api.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return json_response(JsonReply.of_error(error))

    @api.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return json_response(JsonReply.of_error(api_error(error)))

    return api
