"""A cluster that stops does not kill a gateway in the middle of removing blocks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from actors.cluster import CLOSE_TIMEOUT_S, Cluster
from actors.gateway import StorageGatewayActor
from dualpath_ray.config import Settings
from dualpath_ray.store_keeper import KeeperSettings, StoreKeeper
from dualpath_ray.stores.directory import DirectoryStore
from tests.unit.stores.conftest import FINGERPRINT, PAGED, make_blocks


def stopped(**storage: object) -> list[str]:
    """What is asked of Ray, in order, when a cluster stops. Ray is emulated."""
    calls: list[str] = []
    names = ("scheduler", "gateway-p0", "gateway-d0", "decode-d0-0")
    actors = {
        name: SimpleNamespace(name=name, close=SimpleNamespace(remote=lambda name=name: calls.append(f"close {name}"))) for name in names
    }
    cluster = Cluster(Settings.model_validate({"storage": storage}), "test", actors=actors)  # type: ignore[arg-type]
    group = SimpleNamespace(id="group")
    cluster.nodes.update({node_id: SimpleNamespace(group=group) for node_id in ("p0", "d0")})  # type: ignore[misc]
    with (
        mock.patch("actors.cluster.ray") as ray,
        mock.patch.multiple("actors.cluster", forget_all=mock.DEFAULT, remove_placement_group=mock.DEFAULT),
    ):
        ray.wait.side_effect = lambda references, num_returns, timeout: calls.append(f"wait for {num_returns}, {timeout:.0f} s")
        ray.kill.side_effect = lambda handle, no_restart: calls.append(f"kill {handle.name}")
        cluster.stop()
        cluster.stop()
    return calls


def test_gateways_are_asked_to_close_before_anything_is_killed() -> None:
    killed = ["kill scheduler", "kill gateway-p0", "kill gateway-d0", "kill decode-d0-0"]
    asked = ["close gateway-p0", "close gateway-d0", f"wait for 2, {CLOSE_TIMEOUT_S:.0f} s"]
    assert stopped(capacity_bytes="1GiB") == asked + killed
    assert stopped() == killed


async def test_a_gateway_that_is_closed_removes_nothing_any_more(tmp_path: Path) -> None:
    """It is closed while the index is being told what will go: nothing has been removed yet, and nothing will be."""
    store = DirectoryStore(tmp_path, PAGED, FINGERPRINT)
    assert store.write(make_blocks(PAGED, 8, 1)).result(10) == [None] * 8
    asked, answer = asyncio.Event(), asyncio.Event()

    async def told(timeout_s: float) -> bool:
        asked.set()
        return await answer.wait()

    capacity = sum(entry.nbytes for entry in store.inventory().entries()) // 2
    actor = StorageGatewayActor.__new__(StorageGatewayActor)  # without Ray
    actor._keeper = StoreKeeper(store, KeeperSettings(capacity, grace_s=0.0), lambda added, removed: None, told)
    actor._keeper.start()
    async with asyncio.timeout(20):
        await asked.wait()
        closing = asyncio.ensure_future(actor.close())
        await asyncio.sleep(0)
        answer.set()
        await closing
        await asyncio.sleep(0.1)  # enough to remove four blocks, if anybody still did
    assert len(list(store.scan())) == 8
    store.close()
