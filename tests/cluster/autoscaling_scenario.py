"""Machines follow the load: run as a program in namespaces of its own by test_autoscaling.py, prints what it saw as JSON.

long prompts -> a prefill machine joins -> long answers -> a decode machine joins, the prefill machine leaves
-> two long answers only -> the decode machine leaves when its answer is complete
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.client import ClusterClient
from actors.cluster import Cluster
from dualpath_ray.config import Settings
from dualpath_ray.errors import DualPathError
from dualpath_ray.requests import GenerationRequest
from tests.cluster.fake_machines import FakeMachines

PHASE_TIMEOUT_S = 150.0
CONTEXT = 2048


def settings_of(model: Path, store: Path) -> Settings:
    overrides = [
        f"model.spec={model}",
        f"storage.path={store}",
        f"model.max_context={CONTEXT}",
        "model.block_tokens=16",
        "model.threads=1",
        "staging.slots=2048",
        "decode.pool_blocks=2048",
        "cluster.placement=spread",
        "cluster.prefill_resources={dp_prefill: 1}",
        "cluster.decode_resources={dp_decode: 1}",
        "cluster.health_timeout_s=60",
        "transfer.tls='sysv,cma,tcp,self'",
        "autoscaling.enabled=true",
        "autoscaling.interval_s=0.5",
        "autoscaling.looks=4",
        "autoscaling.queue_target_s=30",
        "autoscaling.target_utilisation=0.4",
        "autoscaling.high_utilisation=0.5",
        "autoscaling.most_prefill_nodes=2",
        "autoscaling.most_decode_nodes=2",
    ]
    return Settings.load(None, overrides, environ={})


@dataclass
class Load:
    """Requests from clients that each send the next one when the last is answered."""

    client: ClusterClient
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    generator: random.Random = field(default_factory=lambda: random.Random(1))

    async def ask(self, prompt: int, answer: int) -> None:
        number = self.generator.getrandbits(48)
        tokens = tuple(self.generator.randrange(3, 500) for _ in range(prompt))
        got = 0
        try:
            async for delta in self.client.generate(GenerationRequest(f"r{number:x}", tokens, answer, timeout=PHASE_TIMEOUT_S)):
                got += len(delta.tokens)
        except DualPathError as error:
            self.failures.append(str(error))
            return
        if got != answer:
            self.failures.append(f"{got} tokens of {answer}")
        self.answered += 1

    @asynccontextmanager
    async def running(self, clients: int, prompt: int, answer: int) -> Any:
        ended = asyncio.Event()

        async def client() -> None:
            while not ended.is_set():
                await self.ask(prompt, answer)

        tasks = [asyncio.ensure_future(client()) for _ in range(clients)]
        yield
        ended.set()
        await asyncio.gather(*tasks)


async def until(what: str, seen: dict[str, Any], condition: Callable[[], Awaitable[bool]]) -> None:
    start = time.monotonic()
    while not await condition():
        if time.monotonic() - start > PHASE_TIMEOUT_S:
            raise TimeoutError(f"{what}: not within {PHASE_TIMEOUT_S:.0f} s")
        await asyncio.sleep(0.2)
    seen["seconds"][what] = round(time.monotonic() - start, 1)
    print(f"{what}: {seen['seconds'][what]} s", file=sys.stderr, flush=True)


async def play(cluster: Cluster, machines: FakeMachines, seen: dict[str, Any]) -> None:
    client = cluster_client = ClusterClient.connect(cluster.namespace)
    load = Load(client)

    async def serving(prefill: int, decode: int) -> bool:
        processes = (await cluster_client.status())["processes"].values()
        roles = [process["role"] for process in processes if not process["draining"]]
        return (roles.count("prefill"), roles.count("decode")) == (prefill, decode)

    async def there(prefill: int, decode: int) -> bool:
        return machines.roles() == {"prefill": prefill, "decode": decode}

    async with load.running(12, prompt=1500, answer=1):
        await until("long prompts: a prefill node joins", seen, lambda: serving(2, 1))
    seen["machines"].append(machines.roles())
    async with load.running(16, prompt=40, answer=200):
        await until("long answers: a decode node joins, a prefill node leaves", seen, lambda: serving(1, 2))
        await until("the prefill machine is given back", seen, lambda: there(1, 2))
    long_answers = [asyncio.ensure_future(load.ask(40, 1900)) for _ in range(2)]
    await until("little to do: the decode node leaves", seen, lambda: serving(1, 1))
    await asyncio.gather(*long_answers)
    await until("the decode machine is given back", seen, lambda: there(1, 1))
    await load.ask(200, 20)
    seen["answered"], seen["failures"] = load.answered, load.failures
    seen["events"] = [f"{event['who']} {event['kind']}: {event['text']}" for event in (await client.status())["events"]]
    seen["retries"] = client._metrics.retries._value.get()


def main(model: Path, directory: Path) -> None:
    seen: dict[str, Any] = {"seconds": {}, "machines": []}
    machines = FakeMachines(directory, most=2, idle_s=3.0)
    start = time.monotonic()
    machines.start()
    cluster = Cluster.start(settings_of(model, directory / "store"))
    seen["seconds"]["the first nodes serve"] = round(time.monotonic() - start, 1)
    seen["machines"].append(machines.roles())
    try:
        asyncio.run(play(cluster, machines, seen))
    finally:
        print(json.dumps(seen), flush=True)
        cluster.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
