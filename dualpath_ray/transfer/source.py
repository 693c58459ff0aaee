"""The pushing end of layer streams: a gateway's staging slots into prefill windows.

Lives on the endpoint's thread: credits arrive there, and a layer that is both credited and loaded is pushed at once. A sink that has
heard nothing for a while says everything again: what has been done already is answered, what is being done is ignored.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dualpath_ray.errors import BlockError, DualPathError, StoreError
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.messages import CloseStream, Credit, LayerLanded, OpenStream, StreamClosed, StreamReady
from dualpath_ray.transfer.push import Push

ENDED_STREAMS_KEPT = 4096


@dataclass(slots=True, eq=False)
class _LeasedSlots:
    slots: npt.NDArray[np.int32]
    layers_ready: int  # leading layers whose bytes are in the slots
    error: DualPathError | None = None
    on_quiet: Callable[[], None] | None = None  # set when the lease is being taken back


@dataclass(slots=True, eq=False)
class _Stream:
    sink: str
    number: int
    lease: int
    slots: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32] | None = None
    credits: deque[Credit] = field(default_factory=deque)
    announced: bool = False
    credited: int = 0  # leading layers
    done: set[int] = field(default_factory=set)  # layers whose push has ended
    under_way: int = 0
    closing: bool = False
    error: str | None = None
    bad_key: bytes | None = None
    store_failed: bool = False


class StreamSource:
    """See the module's docstring. Public methods may be called from any thread."""

    def __init__(self, endpoint: Endpoint, local: str, remote: str, layers: int) -> None:
        self._endpoint = endpoint
        self._local, self._remote, self._layers = local, remote, layers
        self._leases: dict[int, _LeasedSlots] = {}
        self._streams: dict[tuple[str, int], _Stream] = {}
        self._ended: OrderedDict[tuple[str, int], _Stream] = OrderedDict()  # to say again how
        endpoint.on(OpenStream, self._on_open)
        endpoint.on(Credit, self._on_credit)
        endpoint.on(CloseStream, self._on_close)

    def add_lease(self, lease: int, slots: npt.NDArray[np.int32], layers_ready: int) -> None:
        """Streams may be opened on these slots; `layers_ready` leading layers hold their bytes already."""
        self._endpoint.call(lambda: self._leases.__setitem__(lease, _LeasedSlots(slots, layers_ready)))

    def layers_loaded(self, lease: int, layers_ready: int) -> None:
        """The bytes of the leading `layers_ready` layers of all the lease's blocks are in the slots."""
        self._endpoint.call(lambda: self._progress(lease, layers_ready, None))

    def load_failed(self, lease: int, error: DualPathError) -> None:
        self._endpoint.call(lambda: self._progress(lease, 0, error))

    def drop_lease(self, lease: int, on_quiet: Callable[[], None]) -> None:
        """End the lease's streams; `on_quiet` is called on the endpoint's thread when no push from its slots is under way."""
        self._endpoint.call(lambda: self._drop(lease, on_quiet))

    def forget_sink(self, agent: str) -> None:
        """A sink is dead: its streams are closed (pushes under way fail by themselves)."""
        self._endpoint.call(lambda: self._forget(agent))

    # ---- on the endpoint's thread

    def _of(self, wanted: Callable[[_Stream], bool]) -> list[_Stream]:
        return [stream for stream in self._streams.values() if wanted(stream)]

    def _on_open(self, sink: str, message: OpenStream) -> None:
        if self._said_again(sink, message.stream):
            return
        leased = self._leases.get(message.lease)
        if leased is None or leased.on_quiet is not None or any(not 0 <= position < len(leased.slots) for position in message.positions):
            self._endpoint.send(sink, StreamClosed(message.stream, f"lease {message.lease} is not valid (any more)"))
            return
        stream = _Stream(sink, message.stream, message.lease, leased.slots[np.array(message.positions, dtype=np.int32)])
        self._streams[sink, message.stream] = stream
        self._advance(stream, leased)

    def _on_credit(self, sink: str, message: Credit) -> None:
        stream = self._streams.get((sink, message.stream))
        if stream is None or message.layer in stream.done:
            if not self._said_again(sink, message.stream, message.layer):
                self._endpoint.send(sink, StreamClosed(message.stream, "the stream is not open"))
            return
        if stream.closing or message.layer != stream.credited:  # known already, or one before it was lost and will be said again
            return
        stream.credited += 1
        if message.rows is not None:
            stream.rows = np.array(message.rows, dtype=np.int32)
        stream.credits.append(message)
        self._advance(stream, self._leases[stream.lease])

    def _on_close(self, sink: str, message: CloseStream) -> None:
        stream = self._streams.get((sink, message.stream))
        if stream is not None:
            self._close(stream, None)
        elif not self._said_again(sink, message.stream):
            self._endpoint.send(sink, StreamClosed(message.stream))

    def _said_again(self, sink: str, number: int, layer: int | None = None) -> bool:
        """Repeat what was said of a stream that is known, and of its layer. False if it is not known."""
        key = (sink, number)
        stream = self._streams.get(key) or self._ended.get(key)
        if stream is None:
            return False
        if stream.announced:
            self._endpoint.send(sink, StreamReady(number))
        if layer in stream.done:
            self._endpoint.send(sink, LayerLanded(number, layer))
        if key in self._ended:
            self._say_closed(stream)
        return True

    def _say_closed(self, stream: _Stream) -> None:
        self._endpoint.send(stream.sink, StreamClosed(stream.number, stream.error, stream.bad_key, stream.store_failed))

    def _progress(self, lease: int, layers_ready: int, error: DualPathError | None) -> None:
        leased = self._leases.get(lease)
        if leased is None:
            return
        leased.layers_ready = max(leased.layers_ready, layers_ready)
        leased.error = leased.error or error
        for stream in self._of(lambda s: s.lease == lease):
            self._advance(stream, leased)

    def _advance(self, stream: _Stream, leased: _LeasedSlots) -> None:
        if stream.closing:
            return
        if leased.error is not None:
            stream.bad_key = leased.error.key if isinstance(leased.error, BlockError) else None
            stream.store_failed = isinstance(leased.error, StoreError)
            self._close(stream, str(leased.error))
            return
        if not stream.announced and leased.layers_ready:
            stream.announced = True
            self._endpoint.send(stream.sink, StreamReady(stream.number))
        while stream.credits and stream.credits[0].layer < leased.layers_ready and not stream.closing:
            self._push(stream, stream.credits.popleft())

    def _push(self, stream: _Stream, credit: Credit) -> None:
        rows = stream.rows
        if rows is None or len(rows) != len(stream.slots):
            self._close(stream, "a credit came without window rows")
            return
        stream.under_way += 1
        push = Push(
            peer=stream.sink,
            local=self._local,
            local_blocks=stream.slots * np.int32(self._layers) + np.int32(credit.layer),
            remote=self._remote,
            remote_blocks=rows + np.int32(credit.first_block),
            on_done=lambda error: self._layer_done(stream, credit.layer, error),
            message=LayerLanded(stream.number, credit.layer),
        )
        self._endpoint.push(push)

    def _layer_done(self, stream: _Stream, layer: int, error: DualPathError | None) -> None:
        stream.under_way -= 1
        stream.done.add(layer)
        if error is not None:
            self._close(stream, str(error))
        elif len(stream.done) == self._layers or stream.closing:
            self._close(stream, None)

    def _close(self, stream: _Stream, error: str | None) -> None:
        stream.closing = True
        stream.error = stream.error or error
        stream.credits.clear()
        if stream.under_way or self._streams.pop((stream.sink, stream.number), None) is None:
            return
        self._ended[stream.sink, stream.number] = stream
        if len(self._ended) > ENDED_STREAMS_KEPT:
            self._ended.popitem(last=False)
        self._say_closed(stream)
        self._quiet_if_unused(stream.lease)

    def _forget(self, sink: str) -> None:
        for stream in self._of(lambda s: s.sink == sink):
            self._close(stream, "the sink is gone")

    def _drop(self, lease: int, on_quiet: Callable[[], None]) -> None:
        leased = self._leases.get(lease)
        if leased is None:
            on_quiet()
            return
        leased.on_quiet = on_quiet
        for stream in self._of(lambda s: s.lease == lease):
            self._close(stream, "the lease was released")
        self._quiet_if_unused(lease)

    def _quiet_if_unused(self, lease: int) -> None:
        leased = self._leases.get(lease)
        if leased is None or leased.on_quiet is None or self._of(lambda s: s.lease == lease):
            return
        del self._leases[lease]
        leased.on_quiet()
