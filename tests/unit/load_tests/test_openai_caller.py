from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from click.testing import CliRunner

from load_tests.replay.__main__ import main
from load_tests.replay.agents import run_offline
from load_tests.replay.openai_caller import OpenAICaller
from load_tests.replay.trajectory import Trajectory, Turn

Seen = list[dict[str, object]]


@pytest.fixture
async def server() -> AsyncIterator[tuple[str, Seen]]:
    """A minimal OpenAI completions server on the loopback: streams `max_tokens` pieces of text, refuses prompts of 7 tokens."""
    seen: Seen = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length:")[1].split()[0])
        body = json.loads(await reader.readexactly(length))
        seen.append(body)
        if len(body["prompt"]) == 7:
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\nconnection: close\r\n\r\nfull")
        else:
            usage = {"completion_tokens": body["max_tokens"], "prompt_tokens_details": {"cached_tokens": 5}}
            chunks = [{"choices": [{"text": "x"}]}] * body["max_tokens"] + [{"choices": [], "usage": usage}]
            text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + text.encode())
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", seen


async def test_turns_over_http(server: tuple[str, Seen]) -> None:
    url, seen = server
    caller = OpenAICaller(url, "m")
    replay = await run_offline(caller, [Trajectory((Turn(20, 3), Turn(5, 2)))], 512)
    await caller.aclose()
    first, second = replay.records
    assert (first.generated, first.cached, second.generated) == (3, 5, 2)
    assert first.started < first.first_token <= first.second_token <= first.finished
    assert seen[1]["prompt"][:20] == seen[0]["prompt"]  # type: ignore[index]
    assert len(seen[1]["prompt"]) == 28  # type: ignore[arg-type]


async def test_refusals_are_recorded(server: tuple[str, Seen]) -> None:
    url, _ = server
    caller = OpenAICaller(url, "m")
    replay = await run_offline(caller, [Trajectory((Turn(7, 3), Turn(5, 2)))], 512)
    await caller.aclose()
    assert [record.error for record in replay.records] == ["HTTP 429: full"]


async def test_the_command_prints_its_figures(server: tuple[str, Seen]) -> None:
    url, seen = server
    arguments = ["--url", url, "--model", "m", "--agents", "2", "--turns", "2", "--max-tokens", "300", "--rate", "500"]
    result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["turns"] == 4
    assert len(seen) == 4
