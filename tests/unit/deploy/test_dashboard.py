"""The status page in a real browser without a window: what it shows of a known cluster, and that it needs nothing from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from deploy.dashboard import page
from deploy.running_service import free_port
from tests.unit.deploy.pictures import pictures

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")


@pytest.fixture
def address() -> Iterator[str]:
    """The page in front of an emulated cluster that moves on by a second whenever it is asked."""
    states = pictures()
    lock = threading.Lock()

    async def status(_: Request) -> JSONResponse:
        with lock:
            return JSONResponse(next(states))

    async def dashboard(_: Request) -> HTMLResponse:
        return HTMLResponse(page())

    port = free_port("127.0.0.1")
    app = Starlette(routes=[Route("/status", status), Route("/dashboard", dashboard)])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/dashboard"
    server.should_exit = True
    thread.join()


def browse(address: str, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--window-size=1400,980", "--virtual-time-budget=8000", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)


def test_the_page_needs_nothing_from_outside() -> None:
    assert not re.findall(r"""(?:src|href|url\(|import)\s*=?\s*["'(]*\s*(?:https?:)?//""", page())
    sources = re.findall(r"https?://[^\s\"'<]+", page())
    assert sources == ["http://www.w3.org/2000/svg"], "the name of the SVG language, which nobody fetches"


@needs_browser
def test_what_was_measured_is_shown(address: str, tmp_path: Path) -> None:
    result = browse(address, tmp_path, "--dump-dom")
    assert "Uncaught" not in result.stderr, result.stderr
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", result.stdout.partition("<body>")[2].partition("<script>")[0]))
    assert "serving" in text and "emulated-model" in text
    assert "path 1: prefill nodes 40 MiB/s path 2: decode nodes 120 MiB/s" in text
    assert "97.5%" in text, "hit share: 19,500 of 20,000 prompt tokens"
    assert "460 tokens/s" in text
    for node in ("p0", "d0", "d1"):
        assert f'data-node="{node}"' in result.stdout
    assert "1.13" in text, "busiest storage NIC over the mean of 40, 60 and 60"
    assert "chatcmpl-agent-2-turn-8/1 prefill" in text
    assert "decode-d1-0 died" in text
    moving = re.findall(r'stroke-dashoffset="-[1-9][0-9.]*"', result.stdout)
    assert len(moving) >= 6, "bytes run along both paths"


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_are_drawn(address: str, tmp_path: Path, theme: str) -> None:
    """The two pictures must differ where nothing but the background is."""
    from PIL import Image

    shot = tmp_path / "page.png"
    browse(f"{address}?theme={theme}", tmp_path / "profile", f"--screenshot={shot}")
    with Image.open(shot) as image:
        corner = image.convert("RGB").getpixel((5, 5))
        colours = len(image.convert("RGB").getcolors(1 << 20) or [])
    assert isinstance(corner, tuple)
    assert (sum(corner) < 120) == (theme == "dark")
    assert colours > 200, "more than an empty page"
