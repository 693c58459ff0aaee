"""What NIXL's OBJ plug-in does with a real S3 service, and why the S3 store does not use it (docs/storage.md).

A release of NIXL that behaves otherwise must be noticed here: it may be the one to use.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dualpath_ray.transfer import nixl_api
from dualpath_ray.transfer.memory import allocate
from tests.s3_service import BUCKET, running_weed

BLOCK = 256 << 10
CHECKSUMS = {"req_checksum": "required", "resp_checksum": "required"}


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_weed(tmp_path_factory.mktemp("weed")) as endpoint:
        yield endpoint


class Objects:
    """An agent with the OBJ backend, and memory for four objects."""

    def __init__(self, endpoint: str, monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        self.agent: Any = nixl_api.make_agent("obj")
        where = {
            "bucket": BUCKET,
            "endpoint_override": endpoint,
            "scheme": "http",
            "region": "us-east-1",
            "use_virtual_addressing": "false",
        }
        self.agent.create_backend("OBJ", {"access_key": "k", "secret_key": "s", **where, **more})
        self.memory = allocate(4 * BLOCK)
        self.agent.register_memory([(self.memory.ctypes.data, self.memory.nbytes, 0, "")], "DRAM", ["OBJ"])
        self.names: list[str] = []

    def move(self, operation: str, name: str, offset: int = 0, at: int = 0) -> None:
        """One object's bytes from `offset` to its end, to or from block `at` of the memory."""
        if name not in self.names:
            self.names.append(name)
            self.agent.register_memory([(0, BLOCK, len(self.names), name)], "OBJ", ["OBJ"])
        device, size = self.names.index(name) + 1, BLOCK - offset
        local = self.agent.get_xfer_descs([(self.memory.ctypes.data + at * BLOCK, size, 0)], "DRAM")
        remote = self.agent.get_xfer_descs([(offset, size, device)], "OBJ")
        handle = self.agent.initialize_xfer(operation, local, remote, "obj", backends=["OBJ"])
        try:
            state, end = self.agent.transfer(handle), time.monotonic() + 60
            while state != "DONE":
                assert time.monotonic() < end
                time.sleep(0.001)
                state = self.agent.check_xfer_state(handle)
        finally:
            handle.release()


def test_objects_and_ranges_come_back(seaweed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(seaweed, monkeypatch, **CHECKSUMS)
    objects.memory[:] = np.random.default_rng(0).integers(0, 256, objects.memory.nbytes, dtype=np.uint8)
    first = objects.memory[:BLOCK].copy()
    objects.move("WRITE", "block")
    objects.move("READ", "block", at=1)
    objects.move("READ", "block", offset=8192, at=2)
    assert np.array_equal(objects.memory[BLOCK : 2 * BLOCK], first)
    assert np.array_equal(objects.memory[2 * BLOCK : 3 * BLOCK - 8192], first[8192:])


def test_a_write_replaces_what_is_there(seaweed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(seaweed, monkeypatch, **CHECKSUMS)
    for version in (1, 2):
        objects.memory[:BLOCK] = version
        objects.move("WRITE", "twice")
    objects.move("READ", "twice", at=1)
    assert (objects.memory[BLOCK : 2 * BLOCK] == 2).all()


def test_a_missing_object_looks_like_any_other_failure(seaweed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(seaweed, monkeypatch, **CHECKSUMS)
    with pytest.raises(Exception, match="NIXL_ERR_BACKEND") as missing:
        objects.move("READ", "missing")
    objects.move("WRITE", "there")
    with pytest.raises(Exception, match="NIXL_ERR_BACKEND") as refused:
        objects.move("WRITE", "there", offset=4096)
    assert str(missing.value) == str(refused.value)


def test_the_default_checksums_are_not_understood(seaweed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(seaweed, monkeypatch)
    with pytest.raises(Exception, match="NIXL_ERR_BACKEND"):
        objects.move("WRITE", "block")
