"""Writing under a lease of the peer's: refused once it is closed, and its end is told once, when nothing is under way."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dualpath_ray.errors import StaleEpochError
from dualpath_ray.transfer.messages import LayerLanded, Quiesce, StreamReady, WriterDone
from tests.unit.transfer.site import WAIT_S, Site, sites


def quiet_after(site: Site, writer: Site) -> None:
    """Nothing more has been told to `site` when a message that `writer` sends now arrives."""
    site.listen(StreamReady)
    writer.endpoint.send(site.name, StreamReady(99))
    assert site.next()[1] == StreamReady(99)
    assert site.arrived.empty()


def test_the_end_of_writing_is_told_once_and_after_all_the_bytes() -> None:
    with sites("writer", "gateway", max_post_bytes=256) as (writer, gateway):
        gateway.listen(WriterDone, LayerLanded)
        writer.memory[:] = 5
        with writer.paused():
            pushes = [writer.push(gateway.name, range(i, 64, 4), range(i, 64, 4), lease=7, message=LayerLanded(1, i)) for i in range(4)]
            writer.endpoint.finish_writes(gateway.name, 7)
            writer.endpoint.finish_writes(gateway.name, 7, "only the first call counts")
        assert [push.result(WAIT_S) for push in pushes] == [None] * 4
        heard = [gateway.next() for _ in range(5)]
        assert sorted(str(message) for _, message, _ in heard[:4]) == [str(LayerLanded(1, i)) for i in range(4)]
        assert heard[4][:2] == (writer.name, WriterDone(7, None))
        assert (heard[4][2] == 5).all()
        quiet_after(gateway, writer)


def test_nothing_is_pushed_under_a_closed_lease() -> None:
    with sites("writer", "gateway") as (writer, gateway):
        writer.memory[:] = 5
        writer.endpoint.finish_writes(gateway.name, 7)
        assert isinstance(writer.push(gateway.name, [0], [0], lease=7).result(WAIT_S), StaleEpochError)
        assert not gateway.memory.any()
        assert writer.endpoint.stats.refused_pushes == 1
        assert writer.push(gateway.name, [0], [0], lease=8).result(WAIT_S) is None, "other leases go on"
        assert writer.push(gateway.name, [1], [1]).result(WAIT_S) is None


def test_a_push_asked_for_before_the_end_of_writing_is_still_delivered() -> None:
    with sites("writer", "gateway") as (writer, gateway):
        gateway.listen(WriterDone)
        with writer.paused():
            push = writer.push(gateway.name, [0], [0], lease=7)
            writer.endpoint.finish_writes(gateway.name, 7)
            late = writer.push(gateway.name, [1], [1], lease=7)
        assert push.result(WAIT_S) is None
        assert isinstance(late.result(WAIT_S), StaleEpochError)
        assert gateway.next()[1] == WriterDone(7, None)


@pytest.mark.parametrize("pushes", [0, 1])
def test_the_end_of_writing_carries_why_it_is_not_complete(pushes: int) -> None:
    with sites("writer", "gateway") as (writer, gateway):
        gateway.listen(WriterDone)
        for _ in range(pushes):
            assert writer.push(gateway.name, [0], [0], lease=7).result(WAIT_S) is None
        writer.endpoint.finish_writes(gateway.name, 7, "the disk is gone")
        assert gateway.next()[1] == WriterDone(7, "the disk is gone")


def test_a_failed_push_does_not_keep_the_lease_open() -> None:
    with sites("writer", "gateway") as (writer, gateway):
        gateway.listen(WriterDone)
        assert writer.push(gateway.name, [0], [10_000], lease=7).result(WAIT_S) is not None
        writer.endpoint.finish_writes(gateway.name, 7, "a push failed")
        assert gateway.next()[1] == WriterDone(7, "a push failed")


def test_a_push_that_fails_after_the_end_of_writing_was_said_makes_it_incomplete() -> None:
    with sites("writer", "gateway") as (writer, gateway):
        gateway.listen(WriterDone)
        with writer.paused():
            push = writer.push(gateway.name, [0], [10_000], lease=7)
            writer.endpoint.finish_writes(gateway.name, 7)
        error = push.result(WAIT_S)
        assert error is not None
        assert gateway.next()[1] == WriterDone(7, str(error))


def test_a_withdrawn_lease_is_acknowledged_when_what_is_under_way_has_ended() -> None:
    """The gateway asks in the middle of a long push."""
    with sites("writer", "gateway", max_post_bytes=256) as (writer, gateway):
        gateway.listen(WriterDone)
        writer.memory[:] = 6
        posting, asked = threading.Event(), threading.Event()

        def wait_for_the_question() -> None:
            posting.set()
            asked.wait(WAIT_S)

        push = writer.push(gateway.name, range(64), range(64), lease=7, before=wait_for_the_question)
        assert posting.wait(WAIT_S)
        gateway.endpoint.send(writer.name, Quiesce(7, gateway.endpoint.info.metadata))
        gateway.settled()
        asked.set()
        assert push.result(WAIT_S) is None
        _, message, seen = gateway.next()
        assert message == WriterDone(7, "withdrawn by its owner")
        assert (seen == 6).all()
        assert isinstance(writer.push(gateway.name, [0], [0], lease=7).result(WAIT_S), StaleEpochError)
        quiet_after(gateway, writer)


def test_every_question_is_answered_because_an_answer_may_have_been_lost() -> None:
    with sites("writer", "gateway") as (writer, gateway):
        gateway.listen(WriterDone)
        writer.endpoint.finish_writes(gateway.name, 7)
        assert gateway.next()[1] == WriterDone(7, None)
        for _ in range(2):
            gateway.endpoint.send(writer.name, Quiesce(7, gateway.endpoint.info.metadata))
            assert gateway.next()[1] == WriterDone(7, None), "all had arrived: the later question does not change that"
        quiet_after(gateway, writer)


def test_a_gateway_never_met_is_answered_and_can_be_forgotten() -> None:
    with sites("writer", "gateway", "other", connected=False) as (writer, gateway, other):
        for site in (gateway, other):
            site.listen(WriterDone)
            site.endpoint.connect(writer.endpoint.info)
            site.endpoint.send(writer.name, Quiesce(7, site.endpoint.info.metadata))
            assert site.next()[:2] == (writer.name, WriterDone(7, "withdrawn by its owner"))
        assert writer.push(gateway.name, [0], [0]).result(WAIT_S) is not None, "answering is not connecting"
        writer.endpoint.connect(gateway.endpoint.info)
        assert writer.push(gateway.name, [0], [0]).result(WAIT_S) is None
        writer.endpoint.forget(other.name)
        writer.endpoint.send(other.name, StreamReady(1))
        writer.settled()
        sent = writer.endpoint.stats.messages_sent
        writer.endpoint.send(other.name, StreamReady(1))
        writer.settled()
        assert writer.endpoint.stats.messages_sent == sent, "a forgotten agent is not kept inside NIXL"


def test_a_question_with_unusable_metadata_hurts_nobody() -> None:
    with sites("writer", "gateway", connected=False) as (writer, gateway):
        gateway.listen(WriterDone)
        gateway.endpoint.connect(writer.endpoint.info)
        gateway.endpoint.send(writer.name, Quiesce(1, b"no metadata"))
        gateway.endpoint.send(writer.name, Quiesce(2, gateway.endpoint.info.metadata))
        assert gateway.next()[1] == WriterDone(2, "withdrawn by its owner")


def test_leases_of_two_gateways_with_one_number_are_two_leases() -> None:
    with sites("writer", "g1", "g2") as (writer, first, second):
        first.listen(WriterDone)
        writer.endpoint.finish_writes(first.name, 1)
        assert first.next()[1] == WriterDone(1, None)
        assert isinstance(writer.push(first.name, [0], [0], lease=1).result(WAIT_S), StaleEpochError)
        assert writer.push(second.name, [0], [0], lease=1).result(WAIT_S) is None


def test_many_leases_closed_at_random_moments_are_each_acknowledged_once() -> None:
    random = np.random.default_rng(3)
    with sites("writer", "gateway", max_post_bytes=512) as (writer, gateway):
        gateway.listen(WriterDone)
        pushes = []
        for lease in range(40):
            for _ in range(random.integers(0, 3)):
                blocks = random.permutation(64)[: random.integers(1, 20)]
                pushes.append(writer.push(gateway.name, blocks, blocks, lease=lease, priority=int(random.integers(0, 3))))
            if random.random() < 0.5:
                gateway.endpoint.send(writer.name, Quiesce(lease, gateway.endpoint.info.metadata))
                gateway.settled()
            else:
                writer.endpoint.finish_writes(gateway.name, lease)
        heard = [gateway.next()[1] for _ in range(40)]
        assert sorted(message.lease for message in heard if isinstance(message, WriterDone)) == list(range(40))
        for push in pushes:
            error = push.result(WAIT_S)
            assert error is None or isinstance(error, StaleEpochError)
        quiet_after(gateway, writer)
        assert not writer.endpoint._lease_pushes
