"""Messages between data-plane endpoints. They travel as NIXL notifications, ordered behind the data of the push that carries them.

A *stream* brings the hit KV of one chunk of one request from one gateway's staging slots into a prefill engine's window, layer
by layer. The sink opens it, the source says when the first layers can be had, the sink credits one layer after the other, the
source pushes a credited layer as soon as its bytes are there. A *lease* lets named peers write into a gateway's slots.
"""

from __future__ import annotations

import msgspec


class OpenStream(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Sink to source: prepare to stream the blocks at `positions` of lease `lease`."""

    stream: int
    lease: int
    positions: list[int]


class StreamReady(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Source to sink: the first layers are in memory; a batch that takes the stream in will not stall at its start."""

    stream: int


class Credit(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Sink to source: layer `layer` may be written to window blocks `first_block + rows[i]`. `rows` comes with the first credit only."""

    stream: int
    layer: int
    first_block: int
    rows: list[int] | None = None


class LayerLanded(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Source to sink, carried by the push itself: the layer's bytes are in the window."""

    stream: int
    layer: int


class CloseStream(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Sink to source: push nothing more, and say when nothing is under way."""

    stream: int


class StreamClosed(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Source to sink: no push of this stream is under way or will follow. `error` says why if it ended before its last layer.

    `bad_key`: that block was damaged; `store`: the store failed as a device.
    """

    stream: int
    error: str | None = None
    bad_key: bytes | None = None
    store: bool = False


class Quiesce(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Gateway to a writer of a lease that is being released: push nothing more to it, and say when nothing is under way.

    `metadata` is the gateway's NIXL metadata: the writer may never have heard of it, and must be able to answer.
    """

    lease: int
    metadata: bytes


class WriterDone(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Writer to gateway: nothing of mine is under way to this lease, and nothing will follow. `error`: not all of it has arrived."""

    lease: int
    error: str | None = None


class Verify(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Sender of a push to its receiver: `blocks` (int32) of your region should have this digest; if so, `message` is yours."""

    number: int
    region: str
    blocks: bytes
    digest: bytes
    message: bytes


class Verified(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The answer: whether they have."""

    number: int
    same: bool


Message = OpenStream | StreamReady | Credit | LayerLanded | CloseStream | StreamClosed | Quiesce | WriterDone | Verify | Verified

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """Raises msgspec.DecodeError for anything that is not one of our messages."""
    return _decoder.decode(data)
