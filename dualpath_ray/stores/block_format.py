"""The bytes of a stored block: a self-describing header of whole pages, then the Full Block, padded to whole pages.

Header (little endian; `FIXED` names the first part): magic, format version, header and payload length, geometry, digest and
label of the model fingerprint, key, parent, one XXH3-128 checksum per Layer Block, zeros, and in its last 16 bytes the XXH3-128
checksum of everything before. A checksum per Layer Block lets ranges of layers be read and verified on their own, and, since its
place names the layer, finds swapped layers too; a block under a wrong name is found by the key in the header.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from dualpath_ray.errors import BlockCorruptError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.keys import KEY_BYTES
from dualpath_ray.stores.base import Bytes
from dualpath_ray.transfer.memory import PAGE_BYTES, round_up

MAGIC = b"DPATHKV\n"
VERSION = 1
CHECKSUM_BYTES = 16
MAX_HEADER_BYTES = 1 << 20

# magic, version, header, payload and layer block bytes, layers, kv_heads, head_dim, block_tokens,
# dtype, fingerprint digest, label, key, parent
FIXED = struct.Struct("<8s I I Q Q I I I I 16s 16s 64s 16s 16s".replace(" ", ""))
_PREFIX = struct.Struct("<8sII")


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a header says. `checksums` is the layers' checksums one after the other; `label` is the fingerprint cut to 64 bytes."""

    geometry: KVGeometry
    fingerprint_digest: bytes
    label: str
    key: bytes
    parent: bytes
    checksums: bytes


def header_bytes_for(layers: int) -> int:
    return round_up(FIXED.size + (layers + 1) * CHECKSUM_BYTES, PAGE_BYTES)


def peek_header_bytes(page: bytes, key: bytes) -> int:
    """Length of the header that `page` begins, before anything of it has been verified. Raises BlockCorruptError."""
    if len(page) < PAGE_BYTES:
        raise BlockCorruptError(key, f"block {key.hex()}: truncated: {len(page)} bytes where a header of at least {PAGE_BYTES} is expected")
    magic, version, header_bytes = _PREFIX.unpack_from(page)
    if magic != MAGIC:
        raise BlockCorruptError(key, f"block {key.hex()}: not a block file (magic {magic!r})")
    if version != VERSION:
        raise BlockCorruptError(key, f"block {key.hex()}: format version {version}, but this release reads and writes version {VERSION}")
    if not PAGE_BYTES <= header_bytes <= MAX_HEADER_BYTES or header_bytes % PAGE_BYTES:
        raise BlockCorruptError(key, f"block {key.hex()}: damaged header (impossible header length {header_bytes})")
    return int(header_bytes)


def decode_header(page: bytes, key: bytes) -> BlockHeader:
    """The header at the start of `page`, verified in itself. `key` only names the block in messages. Raises BlockCorruptError."""
    header_bytes = peek_header_bytes(page, key)
    if len(page) < header_bytes:
        raise BlockCorruptError(key, f"block {key.hex()}: truncated: {len(page)} bytes of a header of {header_bytes}")
    body = header_bytes - CHECKSUM_BYTES
    if xxhash.xxh3_128_digest(page[:body]) != page[body:header_bytes]:
        raise BlockCorruptError(key, f"block {key.hex()}: damaged header (checksum differs)")
    fields = FIXED.unpack_from(page)
    (_, _, _, payload_bytes, layer_block_bytes, layers, kv_heads, head_dim, block_tokens, dtype, digest, label, own_key, parent) = fields
    try:
        geometry, lengths = _geometry(layers, kv_heads, head_dim, dtype, block_tokens)
        label_text = label.rstrip(b"\0").decode(errors="ignore")
    except ValueError as error:
        raise BlockCorruptError(key, f"block {key.hex()}: header makes no sense: {error}") from None
    if (payload_bytes, layer_block_bytes, header_bytes) != lengths:
        raise BlockCorruptError(key, f"block {key.hex()}: header makes no sense: its lengths do not fit its geometry")
    checksums = page[FIXED.size : FIXED.size + layers * CHECKSUM_BYTES]
    return BlockHeader(geometry, digest, label_text, own_key, parent, checksums)


@functools.lru_cache(maxsize=16)
def _geometry(layers: int, kv_heads: int, head_dim: int, dtype: bytes, block_tokens: int) -> tuple[KVGeometry, tuple[int, int, int]]:
    """What a header's fields mean, and the lengths that follow from them. Blocks of one store have one geometry, or a few."""
    geometry = KVGeometry(layers, kv_heads, head_dim, dtype.rstrip(b"\0").decode(), block_tokens)
    return geometry, (geometry.full_block_bytes, geometry.layer_block_bytes, header_bytes_for(layers))


class BlockFormat:
    """Encodes and checks blocks of one geometry and model fingerprint. Immutable, safe from any thread."""

    def __init__(self, geometry: KVGeometry, fingerprint: str) -> None:
        self.geometry = geometry
        self.fingerprint = fingerprint
        self.fingerprint_digest = hashlib.blake2b(fingerprint.encode(), digest_size=16).digest()
        self.header_bytes = header_bytes_for(geometry.layers)
        if self.header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"KVGeometry.layers is {geometry.layers}; the block format holds headers of at most {MAX_HEADER_BYTES} bytes")
        self.payload_bytes = geometry.full_block_bytes
        self.file_bytes = self.header_bytes + round_up(self.payload_bytes, PAGE_BYTES)

    def checksums(self, data: Bytes) -> bytes:
        """XXH3-128 of each Layer Block of `data` (uint8 `[full_block_bytes]`), one after the other. Releases the GIL per layer."""
        size = self.geometry.layer_block_bytes
        view = data.data
        return b"".join(xxhash.xxh3_128_digest(view[start : start + size]) for start in range(0, self.payload_bytes, size))

    def encode(self, key: bytes, parent: bytes, checksums: bytes) -> bytes:
        """The header of a block, `header_bytes` long."""
        if len(key) != KEY_BYTES or len(parent) != KEY_BYTES or len(checksums) != self.geometry.layers * CHECKSUM_BYTES:
            raise ValueError(f"a block needs a key and a parent of {KEY_BYTES} bytes and one checksum per layer")
        shape = self.geometry
        header = bytearray(self.header_bytes)
        FIXED.pack_into(
            header, 0, MAGIC, VERSION, self.header_bytes, self.payload_bytes, shape.layer_block_bytes,
            shape.layers, shape.kv_heads, shape.head_dim, shape.block_tokens, shape.dtype.encode(),
            self.fingerprint_digest, self.fingerprint.encode()[:64], key, parent,
        )  # fmt: skip
        header[FIXED.size : FIXED.size + len(checksums)] = checksums
        header[-CHECKSUM_BYTES:] = xxhash.xxh3_128_digest(bytes(header[:-CHECKSUM_BYTES]))
        return bytes(header)

    def foreign(self, header: BlockHeader) -> str | None:
        """Why a sound header is of no use to this cluster (another model or layout), or None."""
        if header.fingerprint_digest != self.fingerprint_digest:
            return f"it was written for model {header.label!r}, not {self.fingerprint!r}"
        if header.geometry != self.geometry:
            return f"its layout is {header.geometry.signature().decode()}, not {self.geometry.signature().decode()}"
        return None

    def check(self, page: bytes, file_bytes: int, key: bytes, parent: bytes | None = None) -> BlockHeader:
        """The header of a file of `file_bytes` that must hold block `key` after `parent` (None: any parent). Raises BlockCorruptError."""
        header = decode_header(page, key)
        reason = self.foreign(header)
        if reason is not None:
            raise BlockCorruptError(key, f"block {key.hex()}: {reason}")
        if header.key != key:
            raise BlockCorruptError(key, f"block {key.hex()}: the file holds block {header.key.hex()}")
        if parent is not None and header.parent != parent:
            raise BlockCorruptError(key, f"block {key.hex()}: its parent is {header.parent.hex()}, not {parent.hex()}")
        if file_bytes != self.file_bytes:
            raise BlockCorruptError(key, f"block {key.hex()}: truncated or padded: the file has {file_bytes} bytes, not {self.file_bytes}")
        return header

    def verify(self, header: BlockHeader, data: Bytes, first_layer: int, stop_layer: int) -> None:
        """Compare layers `[first_layer, stop_layer)` of the Full Block `data` with the header's checksums. Raises BlockCorruptError."""
        size = self.geometry.layer_block_bytes
        view = data.data
        for layer in range(first_layer, stop_layer):
            expected = header.checksums[layer * CHECKSUM_BYTES : (layer + 1) * CHECKSUM_BYTES]
            if xxhash.xxh3_128_digest(view[layer * size : (layer + 1) * size]) != expected:
                raise BlockCorruptError(header.key, f"block {header.key.hex()}: damaged data (checksum of layer {layer} differs)")


def verify_whole(content: bytes, key: bytes, parent: bytes) -> None:
    """Check a whole block with its header, of any model, padded to pages (a file) or not (an object). Raises BlockCorruptError."""
    header = decode_header(content, key)
    format = BlockFormat(header.geometry, "")
    start = format.header_bytes
    if (header.key, header.parent) != (key, parent):
        raise BlockCorruptError(key, f"block {key.hex()}: it says that it is block {header.key.hex()} after {header.parent.hex()}")
    if len(content) not in (start + format.payload_bytes, format.file_bytes):
        raise BlockCorruptError(key, f"block {key.hex()}: truncated or padded: {len(content)} bytes, not {format.file_bytes}")
    format.verify(header, np.frombuffer(content, dtype=np.uint8)[start : start + format.payload_bytes], 0, header.geometry.layers)
