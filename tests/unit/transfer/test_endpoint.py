"""Pushes and messages between real NIXL agents of one process."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future

import msgspec
import numpy as np
import pytest

from dualpath_ray.errors import DualPathError, TransferError
from dualpath_ray.transfer import messages
from dualpath_ray.transfer.messages import CloseStream, LayerLanded, StreamReady
from dualpath_ray.transfer.push import PRIORITY_LAYERS, PRIORITY_PERSIST, PRIORITY_POOL
from tests.unit.transfer.site import WAIT_S, Site, sites


def test_exactly_the_named_blocks_arrive_whatever_the_size_of_pieces() -> None:
    """Random blocks from two writers at once, each push in one piece or in several."""
    random = np.random.default_rng(1)
    with sites("a", "b", "c", max_post_bytes=3 * 256 + 1) as (a, b, c):
        for site in (a, b):
            site.memory[:] = random.integers(0, 256, site.memory.shape)
        expected = c.memory.copy()
        for _ in range(6):
            targets = random.permutation(64)
            pushes = []
            for site, remote in ((a, targets[:17]), (b, targets[17:50])):
                local = random.integers(0, 64, len(remote))
                expected[remote] = site.memory[local]
                pushes.append(site.push(c.name, local, remote))
            assert [push.result(WAIT_S) for push in pushes] == [None, None]
            np.testing.assert_array_equal(c.memory, expected)
        for site, nblocks in ((a, 6 * 17), (b, 6 * 33)):
            assert site.endpoint.stats.pushed_bytes == {"memory->memory": nblocks * 256}
            assert site.endpoint.stats.pushes == {"memory->memory": 6}


@pytest.mark.parametrize("copy_threads", [0, 1, 2])
def test_a_message_arrives_after_all_the_data_it_is_about(copy_threads: int) -> None:
    with sites("a", "b", blocks=1024, block_bytes=4096, max_post_bytes=64 << 10, copy_threads=copy_threads) as (a, b):
        b.listen(LayerLanded)
        for layer in range(1, 6):
            a.memory[:] = layer
            blocks = np.random.default_rng(layer).permutation(1024)
            assert a.push(b.name, blocks, blocks, message=LayerLanded(7, layer)).result(WAIT_S) is None
            sender, message, seen = b.next()
            assert (sender, message) == (a.name, LayerLanded(7, layer))
            assert (seen == layer).all()


def test_urgent_pushes_go_first_and_equals_in_order_of_arrival() -> None:
    with sites("a", "b", max_post_bytes=256) as (a, b):
        posted: list[str] = []
        order = {"persist": PRIORITY_PERSIST, "pool 1": PRIORITY_POOL, "pool 2": PRIORITY_POOL, "layer": PRIORITY_LAYERS}
        with a.paused():
            pushes = [
                a.push(b.name, range(4), range(4), priority=priority, before=lambda name=name: posted.append(name))
                for name, priority in order.items()
            ]
        assert [push.result(WAIT_S) for push in pushes] == [None] * 4
        assert posted == ["layer", "pool 1", "pool 2", "persist"], "before() is called once per push, not per piece"


def test_an_urgent_push_overtakes_the_pieces_of_a_long_one() -> None:
    with sites("a", "b", max_post_bytes=256) as (a, b):
        ended: list[str] = []
        urgent: list[Future[DualPathError | None]] = []

        def in_the_middle() -> None:
            urgent.append(a.push(b.name, [0], [63], priority=PRIORITY_LAYERS))
            urgent[0].add_done_callback(lambda _: ended.append("urgent"))

        long = a.push(b.name, range(60), range(60), priority=PRIORITY_POOL, before=in_the_middle)
        long.add_done_callback(lambda _: ended.append("long"))
        assert long.result(WAIT_S) is None and urgent[0].result(WAIT_S) is None
        assert ended == ["urgent", "long"]


def test_a_push_of_nothing_ends_well_and_its_message_is_sent() -> None:
    with sites("a", "b") as (a, b):
        b.listen(StreamReady)
        assert a.push(b.name, [], [], message=StreamReady(3)).result(WAIT_S) is None
        assert b.next()[1] == StreamReady(3)


def test_what_cannot_be_pushed_fails_alone() -> None:
    """`on_done` hears of every failure, no message follows it, and the endpoint goes on."""

    def broken() -> None:
        raise RuntimeError("the device is lost")

    with sites("a", "b") as (a, b):
        b.listen(StreamReady)
        late = StreamReady(1)
        bad = [
            a.push("nobody", [0], [0], message=late),
            a.push(b.name, [0], [0], to="no such region", message=late),
            a.push(b.name, [0], [0], region="no such region", lease=1, message=late),
            a.push(b.name, [0], [64], message=late),
            a.push(b.name, [64], [0], message=late),
            a.push(b.name, [0, 1], [0], message=late),
            a.push(b.name, [0], [0], before=broken, message=late),
        ]
        assert [type(push.result(WAIT_S)) for push in bad] == [TransferError] * len(bad)
        assert a.push(b.name, [0], [0], message=StreamReady(2)).result(WAIT_S) is None
        assert b.next()[1] == StreamReady(2)
        assert not a.endpoint._lease_pushes, "a refused push must not keep its lease open"


def test_a_push_that_waited_too_long_is_not_posted_any_more() -> None:
    """Its time began when it was asked for; what was posted now could only be aborted in flight."""
    with sites("a", "b", push_timeout_s=0.0) as (a, b):
        a.memory[:] = 9
        push = a.push(b.name, [0], [0])
        assert isinstance(push.result(WAIT_S), TransferError)
        assert not b.memory.any()


def test_garbage_is_counted_and_survived() -> None:
    encode = msgspec.msgpack.encode
    garbage = [
        b"",
        b"\xc1",
        b"\xff" * 100,
        encode({"a": 1}),
        encode(["NoSuchMessage", 1]),
        encode(["Credit", 1]),
        encode(["Credit", "one", 2, 3]),
        encode(["StreamReady", 1])[:-1],
        encode(["StreamReady", 1, 2])[:-1] + b"\x91" * 100_000 + b"\x90",
    ]
    with sites("a", "b") as (a, b):
        b.listen(StreamReady)
        for payload in garbage:
            a.endpoint.call(lambda payload=payload: a.endpoint._agent.send_notif(b.name, payload))
        a.endpoint.send(b.name, CloseStream(1))  # nobody listens to these here
        a.endpoint.send(b.name, StreamReady(5))
        assert b.next()[1] == StreamReady(5)
        assert b.endpoint.stats.bad_messages == len(garbage) + 1
        assert b.endpoint.stats.messages_received == 1


@pytest.mark.parametrize(
    "message",
    [
        messages.OpenStream(1, 2, [0, 3]),
        messages.StreamReady(1),
        messages.Credit(1, 2, 3),
        messages.Credit(1, 0, 3, [4, 5]),
        messages.LayerLanded(1, 2),
        messages.CloseStream(1),
        messages.StreamClosed(1, "why", b"\x00\xff"),
        messages.Quiesce(1, b"metadata"),
        messages.WriterDone(1, None),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_are_what_they_were(message: messages.Message) -> None:
    assert messages.decode(messages.encode(message)) == message


def test_a_failing_handler_or_callback_does_not_end_the_thread() -> None:
    with sites("a", "b") as (a, b):
        b.listen(StreamReady)

        def broken(*_: object) -> None:
            raise RuntimeError("a handler's bug")

        b.endpoint.on(CloseStream, broken)
        a.endpoint.call(broken)
        done = a.push(b.name, [0], [0], message=CloseStream(1))
        done.add_done_callback(broken)
        a.endpoint.send(b.name, StreamReady(1))
        assert done.result(WAIT_S) is None
        assert b.next()[1] == StreamReady(1)


def test_a_message_or_a_connection_that_cannot_be_made_hurts_nobody() -> None:
    with sites("a", "b") as (a, b):
        b.listen(StreamReady)
        a.endpoint.send("nobody", StreamReady(1))
        a.endpoint.connect(type(b.endpoint.info)("x", "x-agent", b"no metadata", b.endpoint.info.regions))
        a.endpoint.forget("nobody")
        a.endpoint.send(b.name, StreamReady(2))
        assert b.next()[1] == StreamReady(2)


@pytest.mark.parametrize("copy_threads", [0, 1])
def test_close_ends_every_push_once(copy_threads: int) -> None:
    scattered = range(0, 64, 2)
    with sites("a", "b", block_bytes=64 << 10, max_post_bytes=1 << 20, copy_threads=copy_threads) as (a, b):
        ended: list[DualPathError | None] = []
        with a.paused():
            pushes = [a.push(b.name, scattered, scattered, lease=3) for _ in range(20)]
            for push in pushes:
                push.add_done_callback(lambda push: ended.append(push.result()))
            closer = threading.Thread(target=a.endpoint.close)
            closer.start()
        closer.join(WAIT_S)
        assert len(ended) == 20
        a.endpoint.close()
        late = a.push(b.name, [0], [0])
        assert isinstance(late.result(WAIT_S), TransferError), "a push after the end must not wait for ever"
        a.endpoint.send(b.name, StreamReady(1))
        a.endpoint.connect(b.endpoint.info)
        assert len(ended) == 20


def test_an_agent_that_cannot_start_says_so() -> None:
    from dualpath_ray.transfer.endpoint import Endpoint
    from dualpath_ray.transfer.memory import Region

    with pytest.raises(TransferError, match="broken"):
        Endpoint("broken", (Region("memory", 0, 16, 1, 16, kind="NOWHERE"),))  # type: ignore[arg-type]


def test_incarnations_have_different_names() -> None:
    with sites("a", "a") as (first, second):
        assert first.name != second.name
        second.listen(StreamReady)
        first.endpoint.send(second.name, StreamReady(1))
        assert second.next()[0] == first.name
    assert isinstance(first, Site)


def test_what_was_asked_before_a_message_was_sent_is_done_before_it_is_handled() -> None:
    """A gateway adds a lease, then tells others of it: their first message must find it there."""
    with sites("a", "b") as (a, b):
        known: set[int] = set()
        answers: queue.Queue[bool] = queue.Queue()
        b.endpoint.on(StreamReady, lambda sender, message: answers.put(message.stream in known))
        for number in range(400):
            b.endpoint.call(lambda number=number: known.add(number))
            a.endpoint.send(b.name, StreamReady(number))
            assert answers.get(timeout=WAIT_S), f"message {number} overtook"
