"""/v1/files and /v1/batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response

from deploy.access.access import Access
from deploy.batches.batch_store import BatchRequest, BatchStore
from deploy.batches.file_store import PURPOSE, FileStore
from deploy.http_api.body import json_response, read_body
from deploy.http_api.document import body_of
from deploy.openai_api.batch import URLS
from deploy.openai_api.caller import Caller
from deploy.openai_api.errors import CLIENT_CLOSED_REQUEST, ApiError
from deploy.openai_api.reply import json_object

PART_BYTES = 1 << 20
MOST_LISTED = 100
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": [PURPOSE]}},
                }
            }
        },
    }
}


def add_batch_api(api: FastAPI, root: Path, access: Access, max_file_bytes: int, max_body_bytes: int, body_timeout_s: float) -> None:
    """Serve the files and batches under `root`, each tenant its own."""
    files, batches = FileStore(root), BatchStore(root)

    def who(request: Request) -> Caller:
        return access.caller(request.headers, request.state.request_id)

    @api.post("/v1/files", summary="Upload a file of batch requests, one per line", openapi_extra=UPLOAD)
    async def upload(request: Request) -> Response:
        tenant = who(request).tenant
        name, path = await asyncio.to_thread(files.begin, tenant)
        try:
            filename = await _receive(request, path, max_file_bytes)
            return json_response(json_object(await asyncio.to_thread(files.add, tenant, name, filename)))
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    @api.get("/v1/files", summary="The tenant's files, newest first")
    async def list_files(request: Request) -> Response:
        return json_response(_page(await asyncio.to_thread(files.of_tenant, who(request).tenant), request))

    @api.get("/v1/files/{file_id}", summary="One file")
    async def file(file_id: str, request: Request) -> Response:
        return json_response(json_object(files.get(who(request).tenant, file_id)))

    @api.delete("/v1/files/{file_id}", summary="Remove a file")
    async def remove(file_id: str, request: Request) -> Response:
        await asyncio.to_thread(files.remove, who(request).tenant, file_id)
        return json_response(json_object({"id": file_id, "object": "file", "deleted": True}))

    @api.get("/v1/files/{file_id}/content", summary="A file's content")
    async def content(file_id: str, request: Request) -> Response:
        tenant = who(request).tenant
        files.get(tenant, file_id)
        return FileResponse(files.content_path(tenant, file_id), media_type="application/jsonl")

    @api.post("/v1/batches", summary="Order a batch", openapi_extra=body_of(BatchRequest))
    async def create(request: Request) -> Response:
        caller = who(request)
        order = BatchRequest.model_validate(_parsed(await read_body(request, max_body_bytes, body_timeout_s)))
        if order.endpoint not in URLS:
            raise ApiError(400, f"endpoint must be one of {', '.join(URLS)}", param="endpoint", code="invalid_value")
        files.get(caller.tenant, order.input_file_id)
        kept = {"salt": caller.salt, "priority": caller.priority(None)}
        return json_response(json_object(await asyncio.to_thread(batches.create, caller.tenant, order, kept)))

    @api.get("/v1/batches", summary="The tenant's batches, newest first")
    async def list_batches(request: Request) -> Response:
        return json_response(_page(await asyncio.to_thread(batches.of_tenant, who(request).tenant), request))

    @api.get("/v1/batches/{batch_id}", summary="One batch, with its progress")
    async def batch(batch_id: str, request: Request) -> Response:
        return json_response(json_object(batches.get(who(request).tenant, batch_id)))

    @api.post("/v1/batches/{batch_id}/cancel", summary="Stop a batch; what is done stays done")
    async def cancel(batch_id: str, request: Request) -> Response:
        return json_response(json_object(batches.cancel(who(request).tenant, batch_id)))


async def _receive(request: Request, path: Path, limit: int) -> str:
    """Write the form's file to `path`; returns its name. Raises ApiError."""

    async def bounded() -> AsyncGenerator[bytes, None]:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limit + PART_BYTES:
                raise _too_large(limit)
            yield part

    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "send the file as multipart/form-data, with the fields file and purpose", code="invalid_form")
    try:
        form = await MultiPartParser(request.headers, bounded(), max_files=1, max_fields=8, max_part_size=PART_BYTES).parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}", code="invalid_form") from error
    except (KeyError, UnicodeError, ValueError) as error:  # what the parser lets through of a malformed header
        raise ApiError(400, "the form cannot be read", code="invalid_form") from error
    except ClientDisconnect as error:
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client left before its file was complete", type="cancelled") from error
    try:
        file = form.get("file")
        if form.get("purpose") != PURPOSE:
            raise ApiError(400, f"purpose must be {PURPOSE}", param="purpose", code="invalid_value")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "the form has no file", param="file", code="missing_required_parameter")
        if (file.size or 0) > limit:
            raise _too_large(limit)
        await asyncio.to_thread(_copy, file, path)
        return file.filename or "file.jsonl"
    finally:
        await form.close()


def _copy(file: UploadFile, path: Path) -> None:
    with path.open("wb") as target:
        while part := file.file.read(PART_BYTES):
            target.write(part)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the file is larger than {limit} bytes (serving.max_file_bytes)", param="file", code="request_too_large")


def _page(items: list[dict[str, Any]], request: Request) -> Any:
    """At most `limit` items after the one called `after`."""
    given, after = request.query_params.get("limit", ""), request.query_params.get("after", "")
    limit = min(int(given), MOST_LISTED) if given.isascii() and given.isdecimal() and int(given[:6]) > 0 else MOST_LISTED
    names = [item["id"] for item in items]
    rest = items[names.index(after) + 1 :] if after in names else items
    page = rest[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return json_object({"object": "list", "data": page, "has_more": len(rest) > len(page), **ends})


def _parsed(body: bytes) -> Any:
    try:
        return from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
