from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest

from deploy.http_api.api import make_api
from deploy.openai_api.service import OpenAIService
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.models.tiny import make_tiny_model
from dualpath_ray.serving.model_card import ModelCard
from dualpath_ray.serving.tokenizer import Tokenizer
from tests.unit.deploy.emulation import EmulatedCluster

ANSWER = "The answer is 42, ü€🙂."


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(model_directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(model_directory)


@pytest.fixture
def limits() -> ServingSettings:
    # Each token by itself: the emulated cluster has no pace of its own
    return ServingSettings(max_body_bytes=100_000, max_concurrent_requests=4, default_max_tokens=64, stream_interval_s=0)  # type: ignore[arg-type]


@pytest.fixture
def cluster(model_directory: Path, tokenizer: Tokenizer) -> EmulatedCluster:
    card = ModelCard.from_directory(model_directory, "tiny", max_context=200)
    return EmulatedCluster(card, tokenizer.encode(ANSWER, special_tokens=False))


@pytest.fixture
def service(cluster: EmulatedCluster, tokenizer: Tokenizer, limits: ServingSettings) -> OpenAIService:
    return OpenAIService(cluster, tokenizer, cluster.card, limits)


@pytest.fixture
async def http(service: OpenAIService, limits: ServingSettings) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_api(service, limits), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def client(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="unused", http_client=http, max_retries=0)  # type: ignore[arg-type]
