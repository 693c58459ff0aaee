"""Loop-back copies over reliable connections: bytes, class, errors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from dualpath_ray.errors import TransferError
from dualpath_ray.rdma.loopback import Copy, LoopbackCopier
from dualpath_ray.rdma.sysfs import read_machine
from dualpath_ray.traffic.classes import Marking
from dualpath_ray.transfer.memory import allocate
from tests.rdma.guest.wire import DATA, RDMA_READ_REQUEST, READ_RESPONSES, Capture

HALF = 1 << 18
MARKING = Marking(sl=2, dscp=18)


@pytest.fixture
def memory() -> np.ndarray:
    memory = allocate(2 * HALF)
    memory[:HALF] = np.random.default_rng(1).integers(0, 256, HALF, dtype=np.uint8)
    return memory


@pytest.fixture
def across(memory: np.ndarray) -> Iterator[LoopbackCopier]:
    """From the first device to the second, over the wire."""
    machine = read_machine()
    first, second = machine.port("rxe0"), machine.port("rxe1")
    assert first and second
    copier = LoopbackCopier(first, (memory.ctypes.data, memory.nbytes), MARKING, to=second)
    yield copier
    copier.close()


def scattered(memory: np.ndarray, count: int) -> list[Copy]:
    """The first half to the second in reversed order of its `count` pieces."""
    base, size = memory.ctypes.data, HALF // count
    return [Copy(base + i * size, base + HALF + (count - 1 - i) * size, size) for i in range(count)]


@pytest.mark.parametrize("read", [False, True])
def test_a_chain_of_copies_lands_whole_and_in_its_class(memory: np.ndarray, across: LoopbackCopier, read: bool) -> None:
    with Capture("v0") as capture:
        across.copy(scattered(memory, 256), read)
    np.testing.assert_array_equal(memory[HALF:].reshape(256, -1)[::-1], memory[:HALF].reshape(256, -1))
    assert across.marking_in_force()[1] == MARKING.traffic_class
    ours, answers = ("10.9.0.1", "10.9.0.2")
    if read:
        assert set(capture.dscps(ours, range(RDMA_READ_REQUEST, RDMA_READ_REQUEST + 1))) == {18}
        assert sum(capture.dscps(answers, READ_RESPONSES).values()) >= 256
    else:
        assert set(capture.dscps(ours, DATA)) == {18} and capture.dscps(ours, DATA)[18] >= 256


def test_a_port_copies_to_itself(memory: np.ndarray) -> None:
    port = read_machine().port("rxe0")
    assert port is not None
    copier = LoopbackCopier(port, (memory.ctypes.data, memory.nbytes), MARKING)
    copier.copy(scattered(memory, 1024))
    copier.close()
    np.testing.assert_array_equal(memory[HALF:].reshape(1024, -1)[::-1], memory[:HALF].reshape(1024, -1))


def test_a_copy_outside_the_registered_memory_is_an_error(memory: np.ndarray, across: LoopbackCopier) -> None:
    with pytest.raises(TransferError, match="failed with status"):
        across.copy([Copy(memory.ctypes.data, memory.ctypes.data + memory.nbytes, 4096)])
