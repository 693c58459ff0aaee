"""What work in the background raises is told when it happens, not when somebody collects garbage."""

from __future__ import annotations

import asyncio

import pytest

from dualpath_ray.background import Background


async def fail() -> None:
    raise ValueError("a bug")


async def test_an_error_is_logged_at_once_and_names_its_owner(caplog: pytest.LogCaptureFixture) -> None:
    background = Background("gateway n0")
    kept = background.spawn(fail())
    await asyncio.wait([kept])
    await asyncio.sleep(0)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "gateway n0: work in the background failed")
    ]
    assert "a bug" in caplog.text
    assert not background


async def test_closing_ends_what_is_still_under_way(caplog: pytest.LogCaptureFixture) -> None:
    background = Background("gateway n0")
    tasks = [background.spawn(asyncio.sleep(60)) for _ in range(2)]
    assert len(background) == 2
    await background.close()
    assert all(task.cancelled() for task in tasks)
    assert not background
    assert not caplog.records
