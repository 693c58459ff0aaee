"""Ten thousand damaged, foreign and forged blocks: none is served, none brings the store down, each is counted and goes out of the way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dualpath_ray.errors import BlockCorruptError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores.base import BlockBuffer, BlockStore
from dualpath_ray.stores.block_format import CHECKSUM_BYTES, BlockFormat
from dualpath_ray.stores.s3 import S3Settings, S3Store
from tests.unit.stores.conftest import FINGERPRINT, OpenStore, block_path, emptied, make_blocks

SMALL = KVGeometry(layers=3, kv_heads=1, head_dim=32, dtype="float32", block_tokens=16)  # Layer Blocks of one page
MUTATIONS_OF_FILES, MUTATIONS_OF_OBJECTS = 10_000, 2_000
BLOCKS = make_blocks(SMALL, 2, seed=3)


def encode(block: BlockBuffer, geometry: KVGeometry = SMALL, fingerprint: str = FINGERPRINT, key: bytes | None = None) -> bytearray:
    """The file of a block; of another shape than its data has, the header is sound and the payload nonsense."""
    form = BlockFormat(geometry, fingerprint)
    data = np.resize(block.data, geometry.full_block_bytes)
    return bytearray(form.encode(key or block.key, block.parent, form.checksums(data)) + data.tobytes())


def resealed(content: bytearray, offset: int, value: bytes) -> bytearray:
    """A changed header whose own checksum is right."""
    import xxhash

    content[offset : offset + len(value)] = value
    size = BlockFormat(SMALL, FINGERPRINT).header_bytes
    content[size - CHECKSUM_BYTES : size] = xxhash.xxh3_128_digest(bytes(content[: size - CHECKSUM_BYTES]))
    return content


def bit_flip(whole: bytearray, choice: random.Random) -> bytearray:
    for _ in range(choice.choice((1, 1, 1, 2, 17))):
        whole[choice.randrange(len(whole))] ^= 1 << choice.randrange(8)
    return whole


def truncated(whole: bytearray, choice: random.Random) -> bytearray:
    return whole[: choice.choice((0, 1, 4095, 4096, choice.randrange(len(whole))))]


def padded(whole: bytearray, choice: random.Random) -> bytearray:
    return whole + bytes(choice.randrange(1, 9000))


def holed(whole: bytearray, choice: random.Random) -> bytearray:
    start = choice.randrange(len(whole) - 600)
    whole[start : start + 512] = bytes(512) if choice.random() < 0.5 else choice.randbytes(512)
    return whole


def layers_swapped(whole: bytearray, choice: random.Random) -> bytearray:
    size, start = SMALL.layer_block_bytes, len(whole) - SMALL.full_block_bytes
    a, b = choice.sample(range(SMALL.layers), 2)
    a, b = start + a * size, start + b * size
    whole[a : a + size], whole[b : b + size] = whole[b : b + size], whole[a : a + size]
    return whole


def another_block(whole: bytearray, choice: random.Random) -> bytearray:
    return encode(BLOCKS[1])


def another_blocks_data(whole: bytearray, choice: random.Random) -> bytearray:
    return whole[: -SMALL.full_block_bytes] + BLOCKS[1].data.tobytes()


def foreign_model(whole: bytearray, choice: random.Random) -> bytearray:
    return encode(BLOCKS[0], fingerprint=f"model-{choice.randrange(1000)}x")


def wrong_geometry(whole: bytearray, choice: random.Random) -> bytearray:
    change = choice.choice(({"layers": 2}, {"layers": 300}, {"kv_heads": 2}, {"head_dim": 64}, {"block_tokens": 8}, {"dtype": "float16"}))
    return encode(BLOCKS[0], replace(SMALL, **change))


def future_version(whole: bytearray, choice: random.Random) -> bytearray:
    return resealed(whole, 8, choice.randrange(2, 1 << 31).to_bytes(4, "little"))


def forged_field(whole: bytearray, choice: random.Random) -> bytearray:
    """Any field of the header, with a header checksum that fits."""
    length = choice.choice((1, 2, 4, 8))
    offset = choice.randrange(0, 8 + 4 + 4 + 8 + 8 + 16 + 16 + 16)
    return resealed(whole, offset, choice.choice((bytes(length), b"\xff" * length, choice.randbytes(length))))


def noise(whole: bytearray, choice: random.Random) -> bytearray:
    return bytearray(choice.randbytes(choice.choice((len(whole), 4096, 100))))


MUTATIONS: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    bit_flip, truncated, padded, holed, layers_swapped, another_block, another_blocks_data, foreign_model, wrong_geometry, future_version,
    forged_field, noise,
)  # fmt: skip


def attack(store: BlockStore, put: Callable[[bytes], None], count: int, seed: int, harmless: tuple[object, ...] = ()) -> Counter[str]:
    """Put a mutation under a sound block's name and load it, `count` times. Returns how often each kind was refused.

    `harmless` kinds may be loaded, if the bytes are the block's.
    """
    choice = random.Random(seed)
    block = BLOCKS[0]
    sound = bytes(encode(block))
    (target,) = emptied([block])
    fared: Counter[str] = Counter()
    for number in range(count):
        kind = MUTATIONS[number % len(MUTATIONS)]
        content = bytes(kind(bytearray(sound), choice))
        if content == sound:
            fared["unchanged"] += 1
            continue
        put(content)
        target.data[:] = 0
        try:
            reader = store.open([target]).result(30)
            try:
                reader.read(0, SMALL.layers).result(30)
            finally:
                reader.close()
        except BlockCorruptError as error:
            assert error.key == block.key and error.retryable
            fared[kind.__name__] += 1
        else:
            right = np.array_equal(target.data, block.data)
            assert right and kind in harmless, f"mutation {number} ({kind.__name__}, seed {seed}) was served"
            fared["harmless"] += 1
    return fared


def test_ten_thousand_mutated_files_are_never_served(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store(SMALL, io="plain", direct="off")
    path = block_path(tmp_path / "store", BLOCKS[0].key)
    path.parent.mkdir()
    fared = attack(store, path.write_bytes, MUTATIONS_OF_FILES, seed=1)
    unchanged = fared.pop("unchanged", 0)
    assert unchanged < 200 and len(fared) == len(MUTATIONS)
    stats = store.stats()
    assert stats["corrupt_blocks"] == stats["quarantined_files"] == MUTATIONS_OF_FILES - unchanged
    assert not path.exists()
    assert store.write(BLOCKS).result(30) == [None, None]
    (target,) = emptied(BLOCKS[:1])
    store.open([target]).result(30).read(0, SMALL.layers).result(30)
    assert (target.data == BLOCKS[0].data).all()


def test_mutated_objects_are_never_served() -> None:
    obstore = pytest.importorskip("obstore")
    from obstore.store import MemoryStore

    bucket = MemoryStore()
    store = S3Store(SMALL, FINGERPRINT, S3Settings("bucket"), bucket)
    try:
        path = store._path(BLOCKS[0].key, BLOCKS[0].parent)
        # Nobody looks at an object's length to read a range of it, so bytes behind its end are never met.
        fared = attack(
            store, lambda content: obstore.put(bucket, path, content, use_multipart=False), MUTATIONS_OF_OBJECTS, 2, harmless=(padded,)
        )
        refused = MUTATIONS_OF_OBJECTS - fared["unchanged"] - fared["harmless"]
        stats = store.stats()
        assert stats["corrupt_blocks"] == stats["removed_blocks"] == refused > 1500
    finally:
        store.close()


def test_listing_survives_a_directory_full_of_mutations(open_store: OpenStore, tmp_path: Path) -> None:
    """Every mutation under a name of its own: none enters the index, each is counted."""
    store = open_store(SMALL, io="plain", direct="off")
    choice = random.Random(5)
    sound = bytes(encode(BLOCKS[0]))
    headers_differ = 0
    for number in range(1200):
        kind = MUTATIONS[number % len(MUTATIONS)]
        path = block_path(tmp_path / "store", choice.randbytes(16))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(kind(bytearray(sound), choice))
        headers_differ += 1
    assert list(store.scan()) == []
    stats = store.stats()
    assert stats["damaged_files"] + stats["foreign_files"] == headers_differ
    assert list(store.inventory().entries()) == []
