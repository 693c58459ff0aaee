"""One request and its reply, ended at once when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deploy.openai_api.reply import JsonReply, Reply, StreamReply

STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class Exchange(Response):
    """An ASGI response that makes its reply itself, while it watches the connection.

    Starlette notices a lost client when it next sends something. Here work may go on for minutes before there is anything to send,
    so the connection is watched from the start, and a disconnect cancels the work: the generation is closed and its resources freed.
    """

    def __init__(self, make_reply: Callable[[], Awaitable[Reply]], leave: Callable[[], None] = lambda: None) -> None:
        """`leave` is called when all is over, in whatever way."""
        super().__init__()
        self._make_reply = make_reply
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._run(send))
        watch = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self._leave()
            for task in (work, watch):
                task.cancel()
            # Both end here, also when the server cancels this call: nothing of a request outlives it.
            with suppress(asyncio.CancelledError):
                await asyncio.gather(work, watch, return_exceptions=True)

    async def _run(self, send: Send) -> None:
        reply = await self._make_reply()
        if isinstance(reply, JsonReply):
            await _send_json(reply, send)
            return
        try:
            await _send_stream(reply, send)
        finally:
            await reply.aclose()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_json(reply: JsonReply, send: Send) -> None:
    body = reply.body.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in reply.headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_stream(reply: StreamReply, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
    async with aclosing(reply.events()) as events:
        async for event in events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b""})
