from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import xxhash

from dualpath_ray.errors import BlockCorruptError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores import block_format
from dualpath_ray.stores.block_format import BlockFormat, decode_header, header_bytes_for
from tests.unit.stores.conftest import FINGERPRINT, ODD, PAGED

KEY, PARENT = bytes(range(16)), bytes(range(16, 32))
FIELD_OFFSETS = {
    "magic": 0, "version": 8, "header_bytes": 12, "payload_bytes": 16, "layer_block_bytes": 24, "layers": 32, "kv_heads": 36,
    "head_dim": 40, "block_tokens": 44, "dtype": 48, "fingerprint": 64, "label": 80, "key": 144, "parent": 160, "checksums": 176,
}  # fmt: skip


def resign(header: bytes | bytearray) -> bytes:
    """The same header with a header checksum that fits it again."""
    body = bytes(header[:-16])
    return body + xxhash.xxh3_128_digest(body)


def sample(geometry: KVGeometry = PAGED) -> tuple[BlockFormat, np.ndarray, bytes]:
    fmt = BlockFormat(geometry, FINGERPRINT)
    data = np.random.default_rng(1).integers(0, 256, geometry.full_block_bytes, dtype=np.uint8)
    return fmt, data, fmt.encode(KEY, PARENT, fmt.checksums(data))


@pytest.mark.parametrize("geometry", [PAGED, ODD, KVGeometry(30, 3, 64), KVGeometry(400, 1, 2, "float16", 4)])
def test_roundtrip(geometry: KVGeometry) -> None:
    fmt, data, page = sample(geometry)
    header = fmt.check(page, fmt.file_bytes, KEY, PARENT)
    assert (header.geometry, header.key, header.parent, header.label) == (geometry, KEY, PARENT, FINGERPRINT)
    fmt.verify(header, data, 0, geometry.layers)


def test_header_grows_by_pages_when_checksums_need_it() -> None:
    assert header_bytes_for(1) == 4096
    assert header_bytes_for(244) == 4096
    assert header_bytes_for(245) == 8192


def test_layout_is_pinned() -> None:
    """Files written by one release must be readable by the next: these offsets are the format."""
    _, _, page = sample()
    assert block_format.FIXED.size == FIELD_OFFSETS["checksums"]
    assert page[:8] == b"DPATHKV\n"
    assert struct.unpack_from("<IIQQIIII", page, 8) == (1, 4096, PAGED.full_block_bytes, PAGED.layer_block_bytes, 6, 2, 16, 16)
    assert page[48:64].rstrip(b"\0") == b"float32"
    assert page[144:160] == KEY
    assert page[160:176] == PARENT


@pytest.mark.parametrize("field", FIELD_OFFSETS)
def test_every_field_is_covered_by_the_header_checksum(field: str) -> None:
    fmt, _, page = sample()
    damaged = bytearray(page)
    damaged[FIELD_OFFSETS[field]] ^= 1
    with pytest.raises(BlockCorruptError) as caught:
        fmt.check(bytes(damaged), fmt.file_bytes, KEY, PARENT)
    assert caught.value.key == KEY


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("magic", "not a block file"),
        ("version", "format version 0, but this release reads and writes version 1"),
        ("header_bytes", "impossible header length 4097"),
        ("payload_bytes", "lengths do not fit its geometry"),
        ("layer_block_bytes", "lengths do not fit its geometry"),
        ("layers", "lengths do not fit its geometry"),
        ("kv_heads", "lengths do not fit its geometry"),
        ("head_dim", "lengths do not fit its geometry"),
        ("block_tokens", "lengths do not fit its geometry"),
        ("dtype", "dtype must be one of"),
        ("fingerprint", "was written for model"),
        ("key", "the file holds block"),
        ("parent", "its parent is"),
    ],
)
def test_every_field_is_checked_beyond_its_checksum(field: str, message: str) -> None:
    fmt, _, page = sample()
    forged = bytearray(page)
    forged[FIELD_OFFSETS[field]] ^= 1
    with pytest.raises(BlockCorruptError, match=message):
        fmt.check(resign(forged), fmt.file_bytes, KEY, PARENT)


@pytest.mark.parametrize("change", [{"layers": 7}, {"kv_heads": 4}, {"head_dim": 8}, {"dtype": "bfloat16"}, {"block_tokens": 8}])
def test_other_layouts_are_foreign(change: dict[str, object]) -> None:
    other = BlockFormat(dataclasses.replace(PAGED, **change), FINGERPRINT)  # type: ignore[arg-type]
    page = other.encode(KEY, PARENT, bytes(16 * other.geometry.layers))
    fmt, _, _ = sample()
    assert "layout" in (fmt.foreign(decode_header(page, KEY)) or "")
    with pytest.raises(BlockCorruptError, match="its layout is"):
        fmt.check(page, other.file_bytes, KEY, PARENT)


def test_future_version_is_named() -> None:
    fmt, _, page = sample()
    future = bytearray(page)
    struct.pack_into("<I", future, 8, 2)
    with pytest.raises(BlockCorruptError, match="format version 2"):
        fmt.check(resign(future), fmt.file_bytes, KEY, PARENT)


@pytest.mark.parametrize("length", [0, 1, 175, 4095])
def test_truncated_header(length: int) -> None:
    fmt, _, page = sample()
    with pytest.raises(BlockCorruptError, match="truncated"):
        fmt.check(page[:length], fmt.file_bytes, KEY, PARENT)


def test_wrong_file_length() -> None:
    fmt, _, page = sample()
    for length in (fmt.file_bytes - 1, fmt.file_bytes + 4096):
        with pytest.raises(BlockCorruptError, match="truncated or padded"):
            fmt.check(page, length, KEY, PARENT)


def test_verify_names_the_damaged_layer_and_looks_only_at_the_range() -> None:
    fmt, data, page = sample()
    header = fmt.check(page, fmt.file_bytes, KEY, PARENT)
    data[3 * PAGED.layer_block_bytes + 5] ^= 4
    fmt.verify(header, data, 0, 3)
    fmt.verify(header, data, 4, 6)
    with pytest.raises(BlockCorruptError, match="layer 3"):
        fmt.verify(header, data, 2, 5)


@pytest.mark.parametrize("layer", range(PAGED.layers))
@pytest.mark.parametrize("end", ["first byte", "last byte"])
def test_every_layer_is_verified_to_its_ends(layer: int, end: str) -> None:
    fmt, data, page = sample()
    header = fmt.check(page, fmt.file_bytes, KEY, PARENT)
    size = PAGED.layer_block_bytes
    data[layer * size if end == "first byte" else (layer + 1) * size - 1] ^= 1
    for first, stop in ((0, PAGED.layers), (layer, layer + 1)):
        with pytest.raises(BlockCorruptError, match=f"layer {layer}"):
            fmt.verify(header, data, first, stop)


def test_swapped_layers_are_found() -> None:
    fmt, data, page = sample()
    header = fmt.check(page, fmt.file_bytes, KEY, PARENT)
    layers = data.reshape(PAGED.layers, -1)
    layers[[1, 2]] = layers[[2, 1]]
    with pytest.raises(BlockCorruptError, match="layer 1"):
        fmt.verify(header, data, 0, 6)


def test_encode_refuses_wrong_lengths() -> None:
    fmt, _, _ = sample()
    for key, parent, checksums in ((b"x", PARENT, bytes(96)), (KEY, b"x", bytes(96)), (KEY, PARENT, bytes(95))):
        with pytest.raises(ValueError, match="16 bytes"):
            fmt.encode(key, parent, checksums)


def test_fuzzed_headers_are_refused_cleanly() -> None:
    """6,000 mutations of a header: flipped bits, overwritten runs, cuts, half of them with a header checksum that fits again.

    Whatever passes must be the block that was asked for: only bytes that mean nothing (the label, the padding) or the checksums of
    data may differ then.
    """
    fmt, _, page = sample()
    random = np.random.default_rng(7)
    for number in range(6000):
        mutant = bytearray(page)
        kind = number % 3
        if kind == 0:
            mutant[random.integers(len(mutant))] ^= 1 << random.integers(8)
        elif kind == 1:
            start, length = random.integers(300), random.integers(1, 24)
            mutant[start : start + length] = random.bytes(length)
        else:
            del mutant[random.integers(len(mutant)) :]
        forged = number % 2 and len(mutant) == len(page)
        candidate = resign(mutant) if forged else bytes(mutant)
        if candidate == page:
            continue
        try:
            header = fmt.check(candidate, fmt.file_bytes, KEY, PARENT)
        except BlockCorruptError as error:
            assert error.key == KEY
            assert KEY.hex() in str(error)
            continue
        assert forged
        assert (header.key, header.parent, header.geometry, header.fingerprint_digest) == (KEY, PARENT, PAGED, fmt.fingerprint_digest)
        assert candidate[:80] == page[:80]
