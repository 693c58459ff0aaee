"""Loads outrank stores: a write waits while a read is queued or under way, but not for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from dualpath_ray.stores.s3 import S3Settings, S3Store
from tests.unit.stores.conftest import FINGERPRINT, PAGED, OpenStore, make_blocks


@pytest.fixture(params=["directory", "s3"])
def open_any(request: pytest.FixtureRequest, open_store: OpenStore) -> Any:
    """Opens a store, and returns it with a way to occupy its reading threads."""
    if request.param == "directory":

        def directory(**settings: Any) -> tuple[Any, Callable[[Callable[[], None]], None]]:
            store = open_store(**settings)
            return store, lambda task: store.submit_reads([task])

        yield directory
        return
    pytest.importorskip("obstore")
    from obstore.store import MemoryStore

    stores = []

    def bucket(**settings: Any) -> tuple[Any, Callable[[Callable[[], None]], None]]:
        store = S3Store(PAGED, FINGERPRINT, S3Settings("bucket", **settings), MemoryStore())
        stores.append(store)
        return store, lambda task: store.reading.submit(1, [task])

    yield bucket
    for store in stores:
        store.close()


def test_a_write_waits_for_reads(open_any: Any) -> None:
    store, occupy = open_any(write_yield_s=30.0, read_threads=1)
    order: list[str] = []
    gate = threading.Event()

    def read() -> None:
        gate.wait(30)
        order.append("read")

    occupy(read)
    occupy(read)
    writing = store.write(make_blocks(PAGED, 3))
    writing.add_done_callback(lambda _: order.append("write"))
    time.sleep(0.2)
    assert not writing.done()
    gate.set()
    assert writing.result(30) == [None] * 3
    assert order == ["read", "read", "write"]


def test_a_write_does_not_wait_for_ever(open_any: Any) -> None:
    store, occupy = open_any(write_yield_s=0.05, read_threads=1)
    gate = threading.Event()

    def read() -> None:
        gate.wait(30)

    occupy(read)
    assert store.write(make_blocks(PAGED, 3)).result(10) == [None] * 3
    gate.set()
