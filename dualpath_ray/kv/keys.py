"""Chained block keys: a key commits to the model, the tenant, the geometry and every token up to its block's end.

`key_0 = H(root || tokens_0)`, `key_i = H(key_{i-1} || tokens_i)` with `root = tag || H'(fingerprint, salt, geometry)`, H = BLAKE2b with
a 128-bit digest and H' with a 96-bit one. Equal keys therefore mean equal KV, a set of keys is a trie (each key has one parent), and a
tenant cannot name another tenant's blocks without knowing its salt (architecture.md, invariant 3).

Root keys begin with `ROOT_TAG`, so that a store can tell a first block from one whose parent has been lost. (A block's key begins
so by chance once in 2^32; then it is merely not swept as an orphan.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dualpath_ray.kv.geometry import KVGeometry

KEY_BYTES = 16
ROOT_TAG = b"root"
Tokens = Sequence[int] | npt.NDArray[np.int32]


def root_key(fingerprint: str, salt: str, geometry: KVGeometry) -> bytes:
    """Parent of every first block. `fingerprint` identifies weights and numerics, `salt` the tenant."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES - len(ROOT_TAG), person=b"dualpath-root")
    for part in (fingerprint.encode(), salt.encode(), geometry.signature()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return ROOT_TAG + digest.digest()


def is_root(key: bytes) -> bool:
    """Whether `key` is no block's, but the parent of a tenant's first blocks."""
    return key.startswith(ROOT_TAG)


def block_keys(root: bytes, tokens: Tokens, block_tokens: int) -> list[bytes]:
    """Keys of the *complete* blocks of `tokens`, in order; a partial last block has no key."""
    data = np.ascontiguousarray(tokens, dtype="<i4")
    keys: list[bytes] = []
    parent = root
    for start in range(0, len(data) - block_tokens + 1, block_tokens):
        parent = hashlib.blake2b(parent + data[start : start + block_tokens].tobytes(), digest_size=KEY_BYTES).digest()
        keys.append(parent)
    return keys
