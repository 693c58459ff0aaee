"""The S3 store's own logic over obstore's in-memory bucket, and once over a real S3 server where one is installed."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dualpath_ray.errors import BlockCorruptError, BlockMissingError, CancelledError, OverloadedError, StoreError
from dualpath_ray.stores import s3
from dualpath_ray.stores.base import BlockBuffer, Bytes
from dualpath_ray.stores.s3 import S3Settings, S3Store
from tests.s3_service import running_weed
from tests.unit.stores.conftest import FINGERPRINT, ODD, PAGED, emptied, make_blocks

obstore = pytest.importorskip("obstore")
OpenS3 = Callable[..., S3Store]


@pytest.fixture
def bucket() -> Any:
    from obstore.store import MemoryStore

    return MemoryStore()


@pytest.fixture
def open_s3(bucket: Any) -> Iterator[OpenS3]:
    stores: list[S3Store] = []

    def open_one(geometry: Any = PAGED, fingerprint: str = FINGERPRINT, **settings: Any) -> S3Store:
        stores.append(S3Store(geometry, fingerprint, S3Settings("bucket", **settings), bucket))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


def in_ranges(monkeypatch: pytest.MonkeyPatch, prefix_layers: int = 0) -> None:
    """Blocks of PAGED are large enough for a range per layer; `prefix_layers` come with the header."""
    monkeypatch.setattr(s3, "RANGE_BYTES", PAGED.layer_block_bytes)
    monkeypatch.setattr(s3, "PREFIX_BYTES", prefix_layers * PAGED.layer_block_bytes)


def watch_fetches(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges of bytes that `store` asks for from now on."""
    fetched: list[tuple[int, int]] = []
    fetch = store._fetch

    def noted(block: BlockBuffer, start: int, stop: int) -> Iterator[Bytes]:
        fetched.append((start, stop))
        return fetch(block, start, stop)

    monkeypatch.setattr(store, "_fetch", noted)
    return fetched


@pytest.mark.parametrize("geometry", [PAGED, ODD])
def test_blocks_come_back_by_ranges_of_layers(open_s3: OpenS3, geometry: Any) -> None:
    store = open_s3(geometry)
    blocks = make_blocks(geometry, 5)
    assert store.write(blocks).result(10) == [None] * 5
    copies = emptied(blocks)
    reader = store.open(copies).result(10)
    reads = [reader.read(0, 2), reader.read(2, geometry.layers)]
    for read in reads:
        read.result(10)
    reader.close()
    for block, copy in zip(blocks, copies, strict=True):
        np.testing.assert_array_equal(block.data, copy.data)
    assert store.stats()["read_bytes"] == 5 * geometry.full_block_bytes


def test_a_range_of_layers_touches_no_other_bytes(open_s3: OpenS3, monkeypatch: pytest.MonkeyPatch) -> None:
    in_ranges(monkeypatch)
    store = open_s3()
    blocks = make_blocks(PAGED, 1)
    store.write(blocks).result(10)
    (copy,) = emptied(blocks)
    copy.data[:] = 7
    store.open([copy]).result(10).read(1, 2).result(10)
    size = PAGED.layer_block_bytes
    assert (copy.data[:size] == 7).all() and (copy.data[2 * size :] == 7).all()
    np.testing.assert_array_equal(copy.data[size : 2 * size], blocks[0].data[size : 2 * size])


@pytest.mark.parametrize("prefix_layers", range(PAGED.layers + 1))
def test_what_comes_with_the_header_is_not_asked_for_again(open_s3: OpenS3, monkeypatch: pytest.MonkeyPatch, prefix_layers: int) -> None:
    in_ranges(monkeypatch, prefix_layers)
    store = open_s3()
    blocks = make_blocks(PAGED, 3)
    store.write(blocks).result(10)
    fetched = watch_fetches(store, monkeypatch)
    copies = emptied(blocks)
    reader = store.open(copies).result(10)
    for first in range(0, PAGED.layers, 2):
        reader.read(first, first + 2).result(10)
    assert all((copy.data == block.data).all() for copy, block in zip(copies, blocks, strict=True))
    assert sum(stop - start for start, stop in fetched) == 3 * (store.format.header_bytes + PAGED.full_block_bytes)


def test_scan_lists_own_blocks_with_their_parents(open_s3: OpenS3) -> None:
    store, other = open_s3(), open_s3(fingerprint="model-b")
    blocks = make_blocks(PAGED, 4)
    store.write(blocks).result(10)
    other.write(make_blocks(PAGED, 2, seed=1)).result(10)
    assert {(block.key, block.parent) for block in store.scan()} == {(block.key, block.parent) for block in blocks}


def test_scan_skips_what_is_not_a_block(open_s3: OpenS3, bucket: Any) -> None:
    store = open_s3()
    (block,) = make_blocks(PAGED, 1)
    store.write([block]).result(10)
    (entry,) = next(iter(obstore.list(bucket)))
    folder = entry["path"].rsplit("/", 2)[0]
    obstore.put(bucket, f"{folder}/notes.txt", b"hello")
    obstore.put(bucket, f"{folder}/{'00' * 16}/{'11' * 16}", b"half a block")
    assert [listed.key for listed in store.scan()] == [block.key]
    assert store.stats()["foreign_files"] == 2


def test_a_missing_block_is_named(open_s3: OpenS3) -> None:
    blocks = make_blocks(PAGED, 3)
    store = open_s3()
    store.write([blocks[0], blocks[2]]).result(10)
    with pytest.raises(BlockMissingError) as raised:
        store.open(blocks).result(10)
    assert raised.value.key == blocks[1].key


def test_a_removed_block_is_missing(open_s3: OpenS3) -> None:
    store = open_s3()
    (block,) = make_blocks(PAGED, 1)
    store.write([block]).result(10)
    store.remove(block.key)
    store.remove(block.key)
    with pytest.raises(BlockMissingError):
        store.open([block]).result(10)


def test_a_block_too_small_for_ranges_is_one_request(open_s3: OpenS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PREFIX_BYTES", 0)
    store = open_s3()
    blocks = make_blocks(PAGED, 3)
    store.write(blocks).result(10)
    fetched = watch_fetches(store, monkeypatch)
    copies = emptied(blocks)
    reader = store.open(copies).result(10)
    assert store.layer_groups() == 1
    reader.read(0, PAGED.layers).result(10)
    assert all((copy.data == block.data).all() for copy, block in zip(copies, blocks, strict=True))
    assert fetched == [(0, store.format.header_bytes + PAGED.full_block_bytes)] * 3


@pytest.mark.parametrize("length", [1, 1000, 4096, 5000, 100_000])
def test_bytes_may_arrive_in_pieces_of_any_length(open_s3: OpenS3, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    in_ranges(monkeypatch, prefix_layers=1)
    store = open_s3()
    blocks = make_blocks(PAGED, 2)
    store.write(blocks).result(10)
    fetch = store._fetch

    def in_pieces(block: BlockBuffer, start: int, stop: int) -> Iterator[Bytes]:
        for chunk in fetch(block, start, stop):
            yield from (chunk[at : at + length] for at in range(0, len(chunk), length))

    monkeypatch.setattr(store, "_fetch", in_pieces)
    copies = emptied(blocks)
    store.open(copies).result(10).read(0, PAGED.layers).result(10)
    assert all((copy.data == block.data).all() for copy, block in zip(copies, blocks, strict=True))
    assert store.stats()["read_bytes"] == 2 * PAGED.full_block_bytes


def test_damage_in_a_block_of_one_request_is_found_when_it_is_opened(open_s3: OpenS3, bucket: Any) -> None:
    store = open_s3()
    blocks = make_blocks(PAGED, 3)
    store.write(blocks).result(10)
    path = store._path(blocks[1].key, blocks[1].parent)
    data = bytearray(obstore.get(bucket, path).bytes())
    data[-1] ^= 1
    obstore.put(bucket, path, bytes(data))
    with pytest.raises(BlockCorruptError) as raised:
        store.open(emptied(blocks)).result(10)
    assert raised.value.key == blocks[1].key
    assert {block.key for block in store.scan()} == {blocks[0].key, blocks[2].key}
    assert (store.stats()["corrupt_blocks"], store.stats()["removed_blocks"]) == (1, 1)


def test_damage_is_found_in_its_layer_only(open_s3: OpenS3, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    in_ranges(monkeypatch)
    store = open_s3()
    (block,) = make_blocks(PAGED, 1)
    store.write([block]).result(10)
    (entry,) = next(iter(obstore.list(bucket)))
    data = bytearray(obstore.get(bucket, entry["path"]).bytes())
    data[store.format.header_bytes + 3 * PAGED.layer_block_bytes] ^= 1
    obstore.put(bucket, entry["path"], bytes(data))
    reader = store.open(emptied([block])).result(10)
    reader.read(0, 3).result(10)
    with pytest.raises(BlockCorruptError) as raised:
        reader.read(3, 4).result(10)
    assert raised.value.key == block.key
    assert list(store.scan()) == []  # gone, so that it can be written anew
    assert store.write([block]).result(10) == [None]
    (copy,) = emptied([block])
    store.open([copy]).result(10).read(0, PAGED.layers).result(10)
    np.testing.assert_array_equal(copy.data, block.data)


def test_a_truncated_object_is_corrupt(open_s3: OpenS3, bucket: Any) -> None:
    store = open_s3()
    (block,) = make_blocks(PAGED, 1)
    store.write([block]).result(10)
    (entry,) = next(iter(obstore.list(bucket)))
    obstore.put(bucket, entry["path"], obstore.get(bucket, entry["path"]).bytes().to_bytes()[:-100])
    with pytest.raises(BlockCorruptError):
        store.open(emptied([block])).result(10).read(PAGED.layers - 1, PAGED.layers).result(10)


def test_a_second_version_of_a_block_does_not_replace_the_first(open_s3: OpenS3) -> None:
    """Blocks computed twice differ in their last bits; an open reader holds the header of the first."""
    store = open_s3()
    (block,) = make_blocks(PAGED, 1)
    (other,) = make_blocks(PAGED, 1, seed=1)
    store.write([block]).result(10)
    (copy,) = emptied([block])
    reader = store.open([copy]).result(10)
    assert store.write([type(block)(block.key, block.parent, other.data)]).result(10) == [None]
    reader.read(0, PAGED.layers).result(10)
    np.testing.assert_array_equal(copy.data, block.data)
    assert store.stats()["existing_blocks"] == 1


def test_reads_of_a_closed_reader_are_withdrawn(open_s3: OpenS3) -> None:
    store = open_s3()
    blocks = make_blocks(PAGED, 2)
    store.write(blocks).result(10)
    reader = store.open(emptied(blocks)).result(10)
    reader.close()
    with pytest.raises((StoreError, CancelledError)):
        reader.read(0, 1).result(10)


def test_a_full_queue_refuses(open_s3: OpenS3) -> None:
    store = open_s3(max_queued_reads=2, max_queued_writes=2)
    blocks = make_blocks(PAGED, 3)
    with pytest.raises(OverloadedError):
        store.write(blocks).result(10)
    with pytest.raises(OverloadedError):
        store.open(blocks).result(10)


def test_a_closed_store_refuses(open_s3: OpenS3) -> None:
    store = open_s3()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.open(make_blocks(PAGED, 1)).result(10)


@pytest.mark.parametrize("part", ["_client", "_header"])
def test_an_error_that_nobody_expects_ends_the_read(open_s3: OpenS3, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError

    store = open_s3()
    monkeypatch.setattr(store, part, SimpleNamespace(get=fail, head=fail) if part == "_client" else fail)
    with pytest.raises(StoreError, match="RuntimeError"):
        store.open(make_blocks(PAGED, 2)).result(10)


def test_an_unreachable_service_is_a_store_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store = S3Store(PAGED, FINGERPRINT, S3Settings("bucket", f"http://127.0.0.1:{port}", anonymous=True, request_timeout_s=0.5))
    try:
        with pytest.raises(StoreError, match=f"127.0.0.1:{port}"):
            store.open(make_blocks(PAGED, 1)).result(30)
    finally:
        store.close()


@pytest.fixture
def seaweed(tmp_path: Path) -> Iterator[str]:
    with running_weed(tmp_path) as endpoint:
        yield endpoint


def test_a_real_service(seaweed: str) -> None:
    store = S3Store(PAGED, FINGERPRINT, S3Settings("kvcache", seaweed, anonymous=True))
    try:
        blocks = make_blocks(PAGED, 8)
        assert store.write(blocks).result(60) == [None] * 8
        copies = emptied(blocks)
        reader = store.open(copies).result(60)
        for first in range(0, PAGED.layers, 2):
            reader.read(first, first + 2).result(60)
        for block, copy in zip(blocks, copies, strict=True):
            np.testing.assert_array_equal(block.data, copy.data)
        assert {block.key for block in store.scan()} == {block.key for block in blocks}
        assert store.write(blocks[:1]).result(60) == [None]
        assert store.stats()["existing_blocks"] == 1
        store.remove(blocks[0].key)
        with pytest.raises(BlockMissingError):
            store.open(blocks[:1]).result(60)
    finally:
        store.close()
