"""A whole system over a real S3 service that fails: answers stay right, or fail retryably in time, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from dualpath_ray.errors import BlockCorruptError, DualPathError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores.base import BlockStore
from dualpath_ray.stores.directory import DirectoryStore
from dualpath_ray.stores.s3 import S3Settings, S3Store
from tests.s3_service import BUCKET, FaultProxy, running_weed
from tests.unit.services.harness import running_system, shared_model

PROMPT = [random.Random(7).randrange(3, 500) for _ in range(90)]
REQUEST_TIMEOUT_S = 1.0


async def test_faults_of_the_service(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    (tmp_path / "weed").mkdir()
    with running_weed(tmp_path / "weed") as endpoint:
        proxy = FaultProxy(endpoint)

        def over_s3(store: BlockStore, geometry: KVGeometry) -> BlockStore:
            assert isinstance(store, DirectoryStore)
            store.close()
            settings = S3Settings(BUCKET, proxy.endpoint, anonymous=True, request_timeout_s=REQUEST_TIMEOUT_S)
            return S3Store(geometry, store.format.fingerprint, settings)

        try:
            async with running_system(shared_model(tiny_llama), tmp_path / "unused", wrap=over_s3) as system:
                expected = (await system.ask(PROMPT, "recompute")).tokens
                await system.settle()
                # The service's first writes may take longer than a request is given here.
                for _ in range(10):
                    if (await system.ask(PROMPT, "split")).usage.cached_tokens >= 80:
                        break
                    await system.settle()
                else:
                    pytest.fail("the prompt could not be stored")
                for fault in ("error", "hang", "slow", "cut"):
                    proxy.fault, proxy.met = fault, 0
                    start = time.monotonic()
                    with pytest.raises(DualPathError) as failed:
                        await system.ask(PROMPT, "split")
                    assert failed.value.retryable, failed.value
                    assert time.monotonic() - start < 10 * REQUEST_TIMEOUT_S
                    assert proxy.met > 0
                    # The next attempt may read nothing, and must be right; what was stored is still there afterwards.
                    assert (await system.ask(PROMPT, "recompute")).tokens == expected
                    proxy.fault = ""
                    assert (await system.ask(PROMPT, "decode")).tokens == expected
                    await system.settle()
                # A service that returns other bytes than it was given: found, counted, removed, computed again.
                proxy.fault, failures = "flip", 0
                while True:
                    try:
                        answer = await system.ask(PROMPT, "prefill")
                        break
                    except BlockCorruptError:
                        failures += 1
                        assert failures <= 6
                assert failures and answer.tokens == expected
                assert sum(gateway.stats.corrupt_blocks for gateway in system.gateways.values()) == failures
                # Writes that fail are skipped and counted; the client notices nothing.
                proxy.fault, proxy.methods = "error", ("PUT",)
                other = [token + 1 for token in PROMPT]
                assert len((await system.ask(other, "recompute")).tokens) == len(expected)
                async with asyncio.timeout(30):
                    await system.settle(30)
                assert sum(gateway.stats.persist_failures for gateway in system.gateways.values()) >= 5
                proxy.fault = ""
        finally:
            proxy.close()
