"""The Ray Serve application.

`serve run deploy.app:build config=dualpath.yaml` starts everything; in a Serve configuration file the same is
`import_path: deploy.app:build` with `args: {config: ...}`. `dualpath serve` deploys it too.
"""

# No `from __future__ import annotations`: Serve reads the type of `build`'s argument from its signature, unresolved.

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from actors.client import ClusterClient
from actors.cluster import Cluster
from deploy.access.access import Access
from deploy.batches.runner import BatchRunner
from deploy.http_api.api import make_api
from deploy.openai_api.errors import RETRY_AFTER_S
from deploy.openai_api.service import OpenAIService
from dualpath_ray.config import ServingSettings, Settings
from dualpath_ray.errors import DualPathError
from dualpath_ray.serving.model_card import ModelCard
from dualpath_ray.serving.tokenizer import Tokenizer
from dualpath_ray.telemetry import logs, tracing

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.2
TARGET_SHARE = 0.6  # of the requests a replica serves at once: above it, there shall be one more


class Args(BaseModel):
    """Arguments of `build`."""

    model_config = ConfigDict(extra="forbid")

    config: Path | None = Field(default=None, description="YAML file with settings.")
    overrides: list[str] | Mapping[str, Any] = Field(default=[], description="Single settings, as `section.field=value` or a mapping.")
    engines: Literal["start", "attach", "only"] = Field(
        default="start",
        description="start: the application runs the engines too; attach: others do, in cluster.namespace; only: it runs nothing else.",
    )

    def settings(self) -> Settings:
        given = self.overrides
        return Settings.load(self.config, given if isinstance(given, list) else [f"{name}={value}" for name, value in given.items()])


def build(args: Args) -> Application:
    """The application of `args`. Raises ConfigError."""
    settings = args.settings()
    if args.engines == "only":
        engines: Any = Engines  # as in `application`
        alone: Application = engines.bind(settings)
        return alone
    return application(settings, start_engines=args.engines == "start")


def application(settings: Settings, *, start_engines: bool, drain_s: float | None = None) -> Application:
    """`drain_s`: how long requests in progress may take to finish when an HTTP replica is stopped; by default as long as requests may
    take at all, because engines that are replaced at the same time finish none before they are back.
    """
    serving = settings.serving
    http: Any = Http  # what the decorators made of the classes, which type checkers do not see
    engines: Any = Engines
    http = http.options(
        **_replicas(serving),
        graceful_shutdown_timeout_s=serving.request_timeout_s if drain_s is None else drain_s,
        max_ongoing_requests=serving.max_concurrent_requests,
        max_queued_requests=serving.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
    )
    cluster = engines.bind(settings) if start_engines else None
    batches: Any = Batches
    bound: Application = http.bind(settings, cluster, batches.bind(settings, cluster) if serving.files is not None else None)
    return bound


def _replicas(serving: ServingSettings) -> dict[str, Any]:
    if serving.most_replicas is None:
        return {"num_replicas": serving.replicas}
    wanted = TARGET_SHARE * serving.max_concurrent_requests
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=serving.replicas,
            max_replicas=serving.most_replicas,
            target_ongoing_requests=wanted,
            upscale_delay_s=serving.more_replicas_after_s,
            downscale_delay_s=serving.fewer_replicas_after_s,
        )
    }


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0}, max_constructor_retry_count=3)
class Engines:
    """Owns the cluster's actors: they live as long as this replica, and Serve makes a new one, with a new cluster, when it dies."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._cluster = await asyncio.to_thread(Cluster.start, settings)

    async def __del__(self) -> None:
        if hasattr(self, "_cluster"):
            await asyncio.to_thread(self._cluster.stop)


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_constructor_retry_count=3, graceful_shutdown_wait_loop_s=0.5)
@serve.ingress()
class Http:
    """One HTTP replica: tokenises, asks the cluster, streams text."""

    async def __init__(  # type: ignore[misc]
        self, settings: Settings, engines: DeploymentHandle[Any] | None, batches: DeploymentHandle[Any] | None
    ) -> None:
        """`engines` and `batches` only say that these are parts of the application; requests do not pass through them."""
        instance = serve.get_replica_context().replica_id.unique_id
        logs.setup(settings.telemetry, "http", instance)
        tracing.setup(settings.telemetry, "http", instance)
        self._settings = settings
        self._client = ClusterClient(settings.cluster.namespace)
        self._client.publish_metrics()
        # Of HTTP replicas alone the clients publish; with autoscaling there may be more than were asked for.
        self._access = Access(settings.serving.api_keys, lambda: max(settings.serving.replicas, self._client.publishing))
        self._service = await _service(self._client, settings, settings.serving)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve after the constructor."""
        return make_api(self._service, self._settings.serving, self._access, request_ids_returned=True)

    async def __del__(self) -> None:
        if hasattr(self, "_client"):
            await self._client.aclose()
        tracing.shutdown()


# Serve notices a dead replica that nobody calls by its checks alone.
@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0}, max_constructor_retry_count=3, health_check_period_s=2)
class Batches:
    """Works off the orders of /v1/batches. One for all HTTP replicas; Serve starts another one when it dies, which goes on."""

    async def __init__(self, settings: Settings, engines: DeploymentHandle[Any] | None) -> None:  # type: ignore[misc]
        logs.setup(settings.telemetry, "batches", "0")
        tracing.setup(settings.telemetry, "batches", "0")
        serving = settings.serving
        assert serving.files is not None
        self._client = ClusterClient(settings.cluster.namespace)
        limits = serving.model_copy(update={"max_concurrent_requests": serving.batch_concurrency * serving.max_choices})
        service = await _service(self._client, settings, limits)
        runner = BatchRunner(service, serving.files, serving.batch_concurrency, int(serving.max_body_bytes))
        self._running = asyncio.get_running_loop().create_task(runner.run())

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if self._running.done():
            raise RuntimeError(f"the batch runner has ended: {self._running.exception()}")

    async def __del__(self) -> None:
        if hasattr(self, "_running"):
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            await self._client.aclose()


async def _service(client: ClusterClient, settings: Settings, limits: ServingSettings) -> OpenAIService:
    card = await _described(client, settings.cluster.start_timeout_s)
    tokenizer = await asyncio.to_thread(Tokenizer.from_directory, Path(card.model_path))
    return OpenAIService(client, tokenizer, card, limits)


async def _described(client: ClusterClient, timeout_s: float) -> ModelCard:
    """The served model, as soon as engines that start at the same time can tell."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            return await client.describe()
        except DualPathError as error:
            if not error.retryable or asyncio.get_running_loop().time() > deadline:
                raise
            logger.info("waiting for the engines: %s", error)
            await asyncio.sleep(RETRY_PAUSE_S)
