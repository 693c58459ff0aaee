from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest

from dualpath_ray.config import TelemetrySettings
from dualpath_ray.telemetry import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in logs.LOGGERS]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


log = logging.getLogger("actors.test")


def test_json_records_are_one_line_with_process_and_request(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(TelemetrySettings(log_format="json"), "prefill", "p0/0")
    with logs.request("r-1"):
        log.info("hit %d of %d\nblocks", 3, 4)
    log.debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "level": "INFO",
        "logger": "actors.test",
        "service": "prefill",
        "instance": "p0/0",
        "request_id": "r-1",
        "message": "hit 3 of 4\nblocks",
    }


def test_text_records_are_one_line_of_key_value(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(TelemetrySettings(), "gateway", "p0")
    logs.setup(TelemetrySettings(), "gateway", "p0")  # does not double the records
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        log.exception('say "no"', extra={"request_id": "r-2"})
    (line,) = capsys.readouterr().err.splitlines()
    assert ' level=ERROR logger=actors.test service=gateway instance=p0 request_id=r-2 message="say \\"no\\"" error="Traceback' in line


@pytest.mark.parametrize("character", ["\r", "\x85", "\u2028", "\x1b", "\x9b"])
def test_no_value_ends_its_line_or_commands_a_terminal(capsys: pytest.CaptureFixture[str], character: str) -> None:
    logs.setup(TelemetrySettings(), "gateway", "p0")
    log.info("x", extra={"request_id": f"r{character}level=ERROR"})
    log.info("größer")
    first, second = capsys.readouterr().err.splitlines()
    assert character not in first and first.endswith("message=x")
    assert second.endswith("message=größer")


def test_tasks_keep_their_own_request_id(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(TelemetrySettings(log_format="json"), "decode", "d0/0")

    async def work(request_id: str, turn: asyncio.Event, next_turn: asyncio.Event) -> None:
        with logs.request(request_id):
            await turn.wait()
            log.info("x")
            next_turn.set()

    async def main() -> None:
        first, second = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(work("a", first, second)), asyncio.create_task(work("b", second, first))]
        await asyncio.sleep(0)
        first.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert [json.loads(line)["request_id"] for line in capsys.readouterr().err.splitlines()] == ["a", "b"]
