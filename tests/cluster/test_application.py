"""The application with engines of its own, as `serve deploy` runs it: scaled, deployed anew, and robbed of its engines, under load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.schema import ServeDeploySchema

from deploy.app import application
from deploy.running_service import free_port
from dualpath_ray.config import Settings

pytestmark = pytest.mark.live
PROMPT = "Every block is read through the storage NIC that is idle. " * 4


def settings(model: Path, store: Path, *overrides: str) -> Settings:
    given = (f"model.spec={model}", f"storage.path={store}", "cluster.namespace=application", "model.threads=1", "model.max_context=1024")
    return Settings.load(None, [*given, "staging.slots=256", *overrides], environ={})


def replica(deployment: str) -> psutil.Process:
    (found,) = [one for one in psutil.Process().children(recursive=True) if f"ServeReplica:{deployment}" in " ".join(one.cmdline())]
    return found


@pytest.fixture
def api(local_ray: None) -> Callable[[], openai.AsyncOpenAI]:
    port = free_port("127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING", "enable_access_log": False})
    return lambda: openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0, timeout=120)


@asynccontextmanager
async def steady_load(api: openai.AsyncOpenAI, answers: list[str], clients: int = 2) -> AsyncIterator[None]:
    """Clients that ask the same again and again and collect the answers; none retries, and the first failure is raised."""
    over = asyncio.Event()

    async def ask() -> None:
        while not over.is_set():
            options: Any = {"max_tokens": 40, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
            chunks = [chunk async for chunk in await api.completions.create(model="served", prompt=PROMPT, **options)]
            assert chunks[-1].choices[0].finish_reason == "length"
            answers.append("".join(chunk.choices[0].text for chunk in chunks))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(ask())
        yield
        over.set()


async def page(api: openai.AsyncOpenAI, path: str) -> httpx.Response:
    return await asyncio.to_thread(httpx.get, str(api.base_url.join(path)), timeout=60)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(150):
        while not await condition():
            await asyncio.sleep(0.2)


async def answered(answers: list[str], more: int) -> None:
    wanted = len(answers) + more

    async def enough() -> bool:
        return len(answers) >= wanted

    await until(enough)


@pytest.mark.timeout(600)
async def test_no_request_fails_when_engines_are_replaced_or_die(
    api: Callable[[], openai.AsyncOpenAI], tiny_llama: Path, tmp_path: Path
) -> None:
    def deploy(*overrides: str) -> Awaitable[Any]:
        wanted = settings(tiny_llama, tmp_path / "store", "model.served_name=served", *overrides)
        return asyncio.to_thread(serve.run, application(wanted, start_engines=True), name="own", route_prefix="/")

    try:
        await deploy()
        answers: list[str] = []
        async with api() as client, steady_load(client, answers):
            await answered(answers, 4)
            first = replica("own:Engines")
            await deploy("prefill.window_layers=2")
            assert not first.is_running()
            await answered(answers, 4)
            replica("own:Engines").kill()
            await answered(answers, 8)
    finally:
        await asyncio.to_thread(serve.shutdown)
    assert len(set(answers)) == 1


@pytest.mark.timeout(600)
async def test_http_replicas_follow_the_load(api: Callable[[], openai.AsyncOpenAI], tiny_llama: Path, tmp_path: Path) -> None:
    """One replica for two clients, two for eight, one again for two; all are served throughout, by both while there are two."""
    wanted = settings(
        tiny_llama,
        tmp_path / "store",
        "model.served_name=served",
        "serving.max_concurrent_requests=4",
        "serving.most_replicas=2",
        "serving.more_replicas_after_s=1",
        "serving.fewer_replicas_after_s=2",
    )

    def running(replicas: int) -> Callable[[], Awaitable[bool]]:
        async def reached() -> bool:
            status = await asyncio.to_thread(serve.status)
            return dict(status.applications["own"].deployments["Http"].replica_states) == {"RUNNING": replicas}

        return reached

    async def both_answer() -> bool:
        metrics = (await page(client, "/metrics")).text
        samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
        served = [sample for sample in samples if sample.name == "dualpath_requests_total" and sample.value > 0]
        return len({sample.labels["instance"] for sample in served}) == 2

    try:
        await asyncio.to_thread(serve.run, application(wanted, start_engines=True), name="own", route_prefix="/")
        answers: list[str] = []
        async with api() as client, steady_load(client, answers):
            await answered(answers, 4)
            assert await running(1)()
            async with steady_load(client, answers, clients=6):
                await until(running(2))
                await until(both_answer)
            await until(running(1))
            await answered(answers, 8)
    finally:
        await asyncio.to_thread(serve.shutdown)
    assert len(set(answers)) == 1


@pytest.mark.timeout(600)
async def test_new_http_settings_leave_the_engines_alone(api: Callable[[], openai.AsyncOpenAI], tiny_llama: Path, tmp_path: Path) -> None:
    """By the shipped configuration file, with settings of a test's size in place of those that it names."""
    document = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "settings" / "serve.yaml").read_text())
    small = settings(tiny_llama, tmp_path / "store", "model.served_name=served").model_dump(mode="json", exclude_unset=True)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    engines, http = document["applications"]
    for one in (engines, http):
        one["args"]["config"] = str(tmp_path / "small.yaml")

    async def deploy() -> None:
        client: Any = serve.context._get_global_client()  # what the agent behind `serve deploy` does
        await asyncio.to_thread(client.deploy_apps, ServeDeploySchema.model_validate({"applications": [engines, http]}))

    async def both_run() -> bool:
        applications = (await asyncio.to_thread(serve.status)).applications
        return [applications[name].status for name in ("engines", "dualpath")] == ["RUNNING", "RUNNING"]

    async def one_other_http_replica() -> bool:
        status = (await asyncio.to_thread(serve.status)).applications["dualpath"]
        return status.status == "RUNNING" and replica("dualpath:Http").pid != first.pid

    try:
        await deploy()
        async with api() as client:
            await until(both_run)
            answers: list[str] = []
            async with steady_load(client, answers):
                await answered(answers, 4)
                owner, first = replica("engines:Engines"), replica("dualpath:Http")
                processes = (await page(client, "/status")).json()["processes"]
                http["args"]["overrides"] = ["serving.max_choices=4"]
                await deploy()
                await until(one_other_http_replica)
                await answered(answers, 8)
                after = (await page(client, "/status")).json()["processes"]
            refused = client.completions.create(model="served", prompt="x", n=5)
            with pytest.raises(openai.BadRequestError, match="4"):
                await refused
            assert owner.is_running() and {name: one["pid"] for name, one in after.items()} == {n: p["pid"] for n, p in processes.items()}
    finally:
        await asyncio.to_thread(serve.shutdown)
    assert len(set(answers)) == 1
