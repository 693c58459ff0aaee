"""Fixtures for all tests. Variables that NIXL, UCX, Ray and the thread pools read at import are set here, before any test module."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dualpath_ray.environment import set_ray_defaults
from dualpath_ray.transfer.nixl_api import set_environment_defaults

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
set_ray_defaults("local")
set_environment_defaults()
os.environ.setdefault("UCX_TLS", "sysv,cma,tcp,self")
os.environ.setdefault("UCX_SYSV_ERROR_HANDLING", "y")
for _name in [name for name in os.environ if name.startswith("DUALPATH__") or name == "DUALPATH_CONFIG"]:
    del os.environ[_name]  # the developer's own settings are no part of the tests

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from dualpath_ray.models.smollm2 import fetch  # noqa: E402
from dualpath_ray.models.tiny import TinyKind, make_tiny_model  # noqa: E402

# Machines that run tests are shared and slow at times: how long an example takes is not what a property test is about.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("DUALPATH_TEST_LIVE"):
        return
    skip = pytest.mark.skip(reason="minutes of two cores; make test-live")
    for item in items:
        if item.get_closest_marker("live") is not None:
            item.add_marker(skip)


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory of the test's own with a short path (Ray's sockets in it must stay under 108 bytes), removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="dp-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[TinyKind, Path]:
    """The tiny model of each family, made once per session."""
    root = tmp_path_factory.mktemp("models")
    kinds: tuple[TinyKind, ...] = ("llama", "qwen2", "qwen3")
    return {kind: make_tiny_model(kind, root / f"tiny-{kind}") for kind in kinds}


@pytest.fixture(scope="session")
def tiny_llama(tiny_models: dict[TinyKind, Path]) -> Path:
    return tiny_models["llama"]


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, fetched into the user's cache the first time."""
    return fetch()
