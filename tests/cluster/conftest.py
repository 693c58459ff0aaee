"""A real local Ray for the whole session, and clusters on it. After every test nothing may have leaked."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.client import ClusterClient
from actors.cluster import Cluster, connect_ray
from deploy.http_api import proxy
from dualpath_ray.config import Settings
from dualpath_ray.errors import DualPathError
from dualpath_ray.requests import GenerationRequest, GenerationUsage

DUALPATH = [sys.executable, "-c", "from dualpath_ray.cli import main; main()"]


@dataclass(slots=True)
class Answer:
    tokens: list[int] = field(default_factory=list)
    usage: GenerationUsage | None = None
    finish_reason: str = ""


@dataclass(slots=True)
class RunningCluster:
    """A cluster and ways to use, hurt and examine it."""

    cluster: Cluster
    store: Path
    killed: bool = False  # since the last `check_no_leaks`, by SIGKILL

    def client(self) -> ClusterClient:
        return ClusterClient.connect(self.cluster.namespace)

    async def ask(self, client: ClusterClient, name: str, tokens: list[int], max_new: int = 8, **fields: Any) -> Answer:
        fields.setdefault("timeout", 90.0)
        answer = Answer()
        async for delta in client.generate(GenerationRequest(name, tuple(tokens), max_new, **fields)):
            answer.tokens += delta.tokens
            answer.usage = delta.usage or answer.usage
            answer.finish_reason = delta.finish_reason or answer.finish_reason
        return answer

    async def kill(self, client: ClusterClient, name: str) -> None:
        """SIGKILL a process of ours and wait until its next incarnation has registered."""
        before = (await client.status())["processes"][name]
        self.kill_process(before["pid"])
        await self.wait_for(client, lambda status: status["processes"][name]["agent"] != before["agent"])

    def kill_process(self, pid: int) -> None:
        """SIGKILL a process of ours. What it was writing at that moment stays behind until the store's sweep finds it old enough."""
        self.killed = True
        os.kill(pid, signal.SIGKILL)

    async def wait_for(self, client: ClusterClient, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if condition(await client.status()):
                    return
            except (DualPathError, KeyError):
                pass
            assert time.monotonic() < deadline, "the cluster did not reach the wanted state"
            await asyncio.sleep(0.05)

    async def settle(self, client: ClusterClient, timeout_s: float = 60.0) -> dict[str, dict[str, Any]]:
        """Wait until every process is idle; `inspect` checks each one's integrity. Returns their states."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                states = await client.inspect()
                status = await client.status()
                if all(state["idle"] for state in states.values()) and not status["running"] and not status["queued"]:
                    return states
            except DualPathError:
                if time.monotonic() > deadline:
                    raise
                states = {}
            assert time.monotonic() < deadline, f"not idle: { {name: state['idle'] for name, state in states.items()} }"
            await asyncio.sleep(0.05)

    async def check_no_leaks(self, client: ClusterClient) -> None:
        for name, state in (await self.settle(client)).items():
            if "free_slots" in state:
                assert state["free_slots"] == state["total_slots"], f"{name} leaks staging slots"
            if "free_tokens" in state:
                assert state["free_tokens"] == state["pool_tokens"], f"{name} leaks pool blocks"
            if "store" in state:
                assert state["store"]["open_files"] == 0, f"{name} leaks files"
        leftovers = [path for path in self.store.rglob("*") if path.is_file() and "tmp" in path.name]
        assert self.killed or not leftovers, f"temporary files left in the store: {leftovers}"
        for path in leftovers:
            path.unlink()
        self.killed = False


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for all cluster tests. What it leaves behind when it stops is ended by pid."""
    settings = Settings.load(None, [], environ={})
    proxy.install()
    connect_ray(settings)
    descendants = psutil.Process().children(recursive=True)
    yield
    descendants += psutil.Process().children(recursive=True)
    ray.shutdown()
    _, alive = psutil.wait_procs(descendants, timeout=10)
    for process in alive:
        process.kill()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The shared cluster starts after all tests that need none of it: idle processes take time from others, too."""
    items.sort(key=lambda item: "shared" in getattr(item, "fixturenames", ()))


@contextmanager
def running_cluster(namespace: str, store: Path, *overrides: str) -> Iterator[RunningCluster]:
    given = [
        f"cluster.namespace={namespace}",
        f"storage.path={store}",
        "model.threads=1",
        "model.max_context=1024",
        "model.block_tokens=16",
        "staging.slots=256",
        "staging.resident_share=0",
        "prefill.window_layers=2",
        "cluster.health_timeout_s=8",
    ]
    cluster = Cluster.start(Settings.load(None, [*given, *overrides], environ={}))
    try:
        yield RunningCluster(cluster, store)
    finally:
        cluster.stop()


@pytest.fixture
def start_cluster(local_ray: None, tmp_path: Path) -> Iterator[Callable[..., RunningCluster]]:
    """Starts a cluster for one test, by overrides."""
    with ExitStack() as stack:
        yield lambda *overrides: stack.enter_context(running_cluster("own", tmp_path / "store", *overrides))


@pytest.fixture(scope="session")
def shared(local_ray: None, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[RunningCluster]:
    """The cluster most tests use: one prefill and one decode node, the paper's read mode."""
    store = tmp_path_factory.mktemp("store")
    with running_cluster("shared", store, f"model.spec={tiny_llama}", "scheduling.read_mode=shorter_queue") as cluster:
        yield cluster


@pytest.fixture
async def client(shared: RunningCluster) -> AsyncIterator[ClusterClient]:
    """A client of the shared cluster; when the test ends nothing may be left of it."""
    client = shared.client()
    yield client
    await shared.check_no_leaks(client)
