"""Stands in front of the storage server and lies when told to: `python -m load_tests.faults.store_proxy PORT UPSTREAM MODE_FILE`.

MODE_FILE holds one word, read at every request: `honest`, `errors` (status 503), `garbage` (bodies of reads are damaged) or `silence`
(nothing comes back until the mode changes; then the connection is closed).
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from aiohttp import ClientError, ClientSession, DummyCookieJar, TCPConnector, web
from multidict import CIMultiDict
from yarl import URL

MAX_BODY_BYTES = 256 << 20
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "date", "server"}


class StoreProxy:
    """One upstream. Bodies are small (a block), so they are held whole."""

    def __init__(self, upstream: str, mode_file: Path) -> None:
        self._upstream, self._mode_file = upstream, mode_file
        self._session: ClientSession

    @property
    def mode(self) -> str:
        try:
            return self._mode_file.read_text().strip()
        except FileNotFoundError:
            return "honest"

    async def serve(self, port: int) -> None:
        self._session = ClientSession(connector=TCPConnector(limit=0), cookie_jar=DummyCookieJar(), auto_decompress=False)
        server = web.Server(self._handle)
        runner = web.ServerRunner(server)
        await runner.setup()
        await web.TCPSite(runner, "0.0.0.0", port).start()
        await asyncio.Event().wait()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        if self.mode == "errors":
            return web.Response(
                status=503, text="<Error><Code>SlowDown</Code><Message>injected</Message></Error>", content_type="application/xml"
            )
        if self.mode == "silence":
            while self.mode == "silence":
                await asyncio.sleep(0.05)
            return _hang_up(request)
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP)
        url = URL(f"{self._upstream}{request.raw_path}", encoded=True)
        try:
            async with self._session.request(request.method, url, headers=headers, data=body or None, allow_redirects=False) as answer:
                data = await answer.read()
                kept = CIMultiDict((name, value) for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP)
                if request.method == "HEAD":
                    kept["Content-Length"] = answer.headers.get("Content-Length", "0")
                elif request.method == "GET" and "list-type" not in request.query and self.mode == "garbage":
                    data = _damaged(data)
                return web.Response(status=answer.status, body=data, headers=kept)
        except (ClientError, OSError):
            return _hang_up(request)


def _hang_up(request: web.BaseRequest) -> web.StreamResponse:
    """The server is gone: so is the connection."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=502)


def _damaged(data: bytes) -> bytes:
    """Every 97th byte is another one."""
    damaged = bytearray(data)
    damaged[::97] = bytes(byte ^ 0x5A for byte in damaged[::97])
    return bytes(damaged)


if __name__ == "__main__":
    asyncio.run(StoreProxy(sys.argv[2], Path(sys.argv[3])).serve(int(sys.argv[1])))
