from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from rich.console import Console

from deploy.top import View, command, fetch
from dualpath_ray.cli import main
from dualpath_ray.errors import DualPathError
from tests.unit.deploy.pictures import pictures


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    """A real HTTP server with an emulated cluster's status; the second value changes what it answers."""
    states = pictures()
    answer: dict[str, Any] = {"code": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answer.get("body", next(states))).encode()
            self.send_response(answer["code"])
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answer
    server.shutdown()
    thread.join()
    server.server_close()


def shown(view: View, width: int = 160) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view.render())
    return console.export_text()


def test_rates_come_from_two_looks() -> None:
    first, second = itertools.islice(pictures(), 2)
    view = View(first)
    assert "path 1 0 B/s" in shown(view)
    view.update(second)
    text = shown(view)
    assert "emulated-model   2 running, 3 queued   460 tokens/s   path 1 40.0 MiB/s   path 2 120 MiB/s   new KV 5.0 MiB/s" in text
    (row,) = [line for line in text.splitlines() if line.startswith("p0")]
    assert "70 %" in row and "69 %" in row and "96.0 MiB" in row and "80 %" in row
    assert "chatcmpl-agent-7-turn-31/0" in text and "99 %" in text
    assert "decode-d1-0 died" in text


def test_eighty_columns_are_enough() -> None:
    """Bars and long names give way, no figure does."""
    first, second = itertools.islice(pictures(), 2)
    second["requests"][0]["id"] = "chatcmpl-" + "0123456789abcdef" * 4
    view = View(first)
    view.update(second)
    lines = shown(view, 80).splitlines()
    (row,) = [line for line in lines if line.startswith("p0")]
    assert all(figure in row for figure in ("prefill", "40.0 MiB/s", "70 %", "69 %", "96.0 MiB", "80 %")) and row.split()[-1] == "3"
    assert max(map(len, lines)) <= 80
    (request,) = [line for line in lines if line.startswith("chatcmpl-0123")]
    assert "decode" in request and "52312" in request and "99 %" in request and request.endswith("14.2 s")


def test_a_restarted_process_has_no_rate() -> None:
    first, second = itertools.islice(pictures(), 2)
    second["processes"]["p0"]["agent"] = "p0-2"
    view = View(first)
    view.update(second)
    assert view.rate("p0", "read_bytes") == 0.0


def test_the_command_draws_and_ends(server: tuple[str, dict[str, Any]]) -> None:
    result = CliRunner().invoke(command, ["--url", server[0], "--interval", "0.2", "--count", "2"])
    assert result.exit_code == 0, result.output
    assert "path 2 120 MiB/s" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"code": 401, "body": {}}, "--key"),
        ({"code": 503, "body": {"reason": "no scheduler"}}, "no scheduler"),
        ({"code": 200, "body": {"other": 1}}, "is it this service"),
        ({"code": 200, "body": [1]}, "is it this service"),
    ],
)
def test_what_is_wrong_is_said(server: tuple[str, dict[str, Any]], answer: dict[str, Any], message: str) -> None:
    server[1].update(answer)
    with httpx.Client(base_url=server[0]) as http, pytest.raises(DualPathError, match=message):
        fetch(http)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "http://[::1"], "http://[::1 is no address"),
        (["--url", "http://127.0.0.1:1", "--key", "é"], "does not answer"),
        (["--interval", "nan"], "--interval"),
    ],
)
def test_impossible_options_are_one_line(options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["top", "--count", "1", *options])
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_nobody_there() -> None:
    with httpx.Client(base_url="http://127.0.0.1:1") as http, pytest.raises(DualPathError, match="--url"):
        fetch(http)
