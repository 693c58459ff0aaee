from __future__ import annotations

import math
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from dualpath_ray.errors import BlockCorruptError, BlockMissingError, ConfigError, StoreError
from dualpath_ray.stores import emulated
from dualpath_ray.stores.base import BlockBuffer
from dualpath_ray.stores.directory import DirectoryStore
from dualpath_ray.stores.emulated import EmulatedStore, EmulationSettings, Link
from tests.unit.stores.conftest import FINGERPRINT, PAGED, emptied, make_blocks


def slow(path: Path, **knobs: object) -> EmulatedStore:
    return EmulatedStore(DirectoryStore(path, PAGED, FINGERPRINT), PAGED, EmulationSettings(**knobs))  # type: ignore[arg-type]


def load(store: EmulatedStore, blocks: list[BlockBuffer]) -> list[BlockBuffer]:
    targets = emptied(blocks)
    reader = store.open(targets).result(30)
    for future in [reader.read(layer, layer + 1) for layer in range(PAGED.layers)]:
        future.result(30)
    reader.close()
    return targets


def test_a_link_serves_in_order_at_its_bandwidth() -> None:
    link = Link(1000.0)
    assert link.reserve(500, now=10.0) == 10.5
    assert link.reserve(500, now=10.1) == 11.0, "behind the first"
    assert link.reserve(100, now=20.0) == 20.1, "an idle link does not save up"
    assert Link(0).reserve(500, now=3.0) == 3.0, "no bandwidth set: unlimited"


def test_bytes_are_the_inner_stores(tmp_path: Path) -> None:
    store = slow(tmp_path, read_bandwidth=1e9, write_bandwidth=1e9, latency_s=1e-4, jitter_s=1e-4)
    blocks = make_blocks(PAGED, 12)
    assert store.write(blocks).result(30) == [None] * 12
    targets = load(store, blocks)
    assert all(np.array_equal(a.data, b.data) for a, b in zip(targets, blocks, strict=True))
    values = store.stats()
    assert values["read_bytes"] == values["written_bytes"] == 12 * PAGED.full_block_bytes
    assert values["emulated"] == 1
    assert {block.key for block in store.scan()} == {block.key for block in blocks}
    store.remove(blocks[0].key)
    with pytest.raises(BlockMissingError):
        store.open(blocks).result(30)
    store.close()


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_completions_wait_for_the_emulated_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of our own: 6 layers of 2 blocks at one Layer Block per second, layer 2 late by 100 s."""
    clock = Clock()
    monkeypatch.setattr(emulated, "time", clock)
    store = slow(tmp_path, read_bandwidth=float(PAGED.layer_block_bytes), delay_layer={2: 100.0})
    blocks = make_blocks(PAGED, 2)
    store.write(blocks).result(30)
    reader = store.open(emptied(blocks)).result(30)
    ended = [threading.Event() for _ in range(PAGED.layers)]
    order: list[int] = []

    def end(layer: int) -> None:
        order.append(layer)
        ended[layer].set()

    for layer in range(PAGED.layers):
        reader.read(layer, layer + 1).add_done_callback(lambda _, layer=layer: end(layer))

    def move_to(now: float) -> None:
        clock.now = now
        with store._condition:
            store._condition.notify()

    move_to(1.9)
    assert not ended[0].wait(0.05)
    move_to(4.1)
    assert ended[0].wait(30)
    assert ended[1].wait(30)
    move_to(50.0)
    assert not ended[2].wait(0.05), "held back alone: its own bytes have passed at 6 s"
    move_to(106.1)
    for event in ended:
        assert event.wait(30), "layers behind the late one have passed the link meanwhile"
    assert order == list(range(PAGED.layers))
    reader.close()
    store.close()


def outcomes(path: Path, seed: int) -> list[str]:
    store = slow(path, error_rate=0.3, corrupt_rate=0.3, seed=seed)
    blocks = make_blocks(PAGED, 3)
    reader: Future | None = None  # type: ignore[type-arg]
    while reader is None or reader.exception(30) is not None:
        store.inner.write(blocks).result(30)
        reader = store.open(emptied(blocks))
    result = []
    for turn in range(40):
        try:
            reader.result().read(turn % 6, turn % 6 + 1).result(30)
            result.append("done")
        except BlockCorruptError as error:
            result.append(f"corrupt {[block.key for block in blocks].index(error.key)}")
        except StoreError:
            result.append("failed")
    reader.result().close()
    store.close()
    return result


def test_faults_are_seeded(tmp_path: Path) -> None:
    first = outcomes(tmp_path, seed=1)
    assert first == outcomes(tmp_path, seed=1)
    assert first != outcomes(tmp_path, seed=2)
    assert {word.split()[0] for word in first} == {"done", "failed", "corrupt"}


def test_emulated_corruption_damages_the_bytes_it_reports(tmp_path: Path) -> None:
    store = slow(tmp_path, corrupt_rate=1.0)
    blocks = make_blocks(PAGED, 3)
    store.write(blocks).result(30)
    targets = emptied(blocks)
    reader = store.open(targets).result(30)
    with pytest.raises(BlockCorruptError) as caught:
        reader.read(0, 6).result(30)
    reader.close()
    different = [a.key for a, b in zip(targets, blocks, strict=True) if not np.array_equal(a.data, b.data)]
    assert different == [caught.value.key]
    assert store.stats()["emulated_corruptions"] == 1
    store.close()


def test_write_errors_are_per_block(tmp_path: Path) -> None:
    store = slow(tmp_path, error_rate=1.0)
    result = store.write(make_blocks(PAGED, 2)).result(30)
    assert all(isinstance(outcome, StoreError) for outcome in result)
    store.close()


def test_close_ends_stalled_calls(tmp_path: Path) -> None:
    store = slow(tmp_path, stall_rate=1.0)
    stalled = store.write(make_blocks(PAGED, 2))
    assert not stalled.done()
    store.close()
    with pytest.raises(StoreError, match="stall"):
        stalled.result(30)
    with pytest.raises(StoreError):
        store.open([]).result(30)


@pytest.mark.parametrize("knob", [{"latency_s": -1.0}, {"error_rate": 1.5}, {"read_bandwidth": math.nan}, {"stall_rate": -0.1}])
def test_impossible_knobs(knob: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(knob))):
        EmulationSettings(**knob)  # type: ignore[arg-type]
