"""The applications that are compared, on one Ray Serve: one that does nothing, and ours over an emulated cluster."""

# No `from __future__ import annotations`: Serve reads signatures.

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from ray.serve import Application
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp

from deploy.http_api.api import make_api
from deploy.openai_api.service import OpenAIService
from dualpath_ray.config import Settings
from dualpath_ray.serving.model_card import ModelCard
from dualpath_ray.serving.tokenizer import Tokenizer
from load_tests.http.emulated_cluster import EmulatedCluster

MOST_STREAMS = 4096
IDLE_PROMPT = 64  # tokens from which on the emulated cluster falls silent after the first token
# As long as one of ours
EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef-01234567","choices":[{"finish_reason":null,"index":0,"logprobs":null,'
    b'"text":" the"}],"created":1795529880,"model":"tiny-llama","object":"text_completion"}\n\n'
)


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MOST_STREAMS)
@serve.ingress()
class Nothing:
    """Streams as many events as asked for, of our size, and does nothing else."""

    def __serve_build_asgi_app__(self) -> ASGIApp:
        api = FastAPI()

        @api.post("/v1/completions")
        async def completions(request: Request) -> StreamingResponse:
            body = await request.json()

            async def events() -> AsyncIterator[bytes]:
                for _ in range(body["max_tokens"]):
                    await asyncio.sleep(0)
                    yield EVENT
                yield b"data: [DONE]\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")

        return api


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MOST_STREAMS, graceful_shutdown_timeout_s=30)
@serve.ingress()
class Emulated:
    """Our HTTP layer over `EmulatedCluster`."""

    def __init__(self, settings: Settings, model_path: str) -> None:
        card = ModelCard.from_directory(Path(model_path), settings.model.name, 2048)
        self._limits = settings.serving.model_copy(update={"max_concurrent_requests": MOST_STREAMS})
        self._service = OpenAIService(
            EmulatedCluster(card, 0.0, IDLE_PROMPT), Tokenizer.from_directory(Path(model_path)), card, self._limits
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_api(self._service, self._limits)


def nothing() -> Application:
    deployment: Any = Nothing
    application: Application = deployment.bind()
    return application


def emulated(settings: Settings, model_path: str, version: int = 0) -> Application:
    """A new `version` is a redeploy: Serve replaces a replica whose environment has changed."""
    deployment: Any = Emulated
    options = {"num_cpus": 0, "runtime_env": {"env_vars": {"DUALPATH_EMULATED_VERSION": str(version)}}}
    application: Application = deployment.options(ray_actor_options=options).bind(settings, model_path)
    return application
