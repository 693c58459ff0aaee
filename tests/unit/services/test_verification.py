"""With `transfer.verify`, bytes that are damaged between processes never reach the text (architecture.md, invariants 2 and 4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from dualpath_ray.transfer.push import Push
from tests.unit.services.harness import running_system, shared_model
from tests.unit.services.test_one_process import agent_turns, reference
from tests.unit.transfer.damage import damage_pushes

KINDS = {"staging->window", "window->staging", "staging->staging", "staging->pool", "pool->staging"}


async def _answers(model, path: Path, verify: bool) -> tuple[list[list[int]], list[list[int]], int]:  # type: ignore[no-untyped-def]
    """Texts of a few turns, what they should be, and how many pushes were found to be damaged."""
    history: list[int] = []
    texts, expected = [], []
    async with running_system(model, path, endpoints=EndpointSettings(copy_threads=1, verify=verify), chunk_tokens=64) as system:
        for appended in agent_turns(3, 3):
            history += appended
            expected += [reference(model, history, 40)] * 2
            for side in ("split", "prefill"):
                texts.append((await system.ask(history, side, max_new=40)).tokens)
                await system.settle()
            history += expected[-1]
        return texts, expected, sum(endpoint.stats.mismatched_pushes for endpoint in system.endpoints)


async def test_damage_on_every_way_between_processes_is_repaired(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = damage_pushes(monkeypatch, lambda push: push.mismatches == 0)  # each push once
    texts, expected, found = await _answers(shared_model(tiny_llama), tmp_path, verify=True)
    assert texts == expected
    assert found == len(damaged)
    assert {push.kind for push in damaged} == KINDS


async def test_without_verification_that_damage_changes_the_text(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would prove nothing."""

    def hit(push: Push) -> bool:
        return push.kind == "staging->pool"

    damage_pushes(monkeypatch, hit)
    texts, expected, _ = await _answers(shared_model(tiny_llama), tmp_path, verify=False)
    assert texts != expected
