"""Pushes out of a gateway's staging slots, as something its event loop can wait for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import numpy as np

from dualpath_ray.errors import DualPathError
from dualpath_ray.kv.staging import REGION as STAGING
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.memory import PeerInfo
from dualpath_ray.transfer.push import PRIORITY_POOL, Blocks, Push

log = logging.getLogger(__name__)


class StagingPush:
    """One per gateway. Futures belong to the event loop that runs when `push` is called."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def __call__(self, peer: PeerInfo, region: str, local: Blocks, remote: Blocks, lease_id: int | None = None) -> asyncio.Future[None]:
        """Push Layer Blocks `local` of staging to `remote` of the peer's region; the future ends when nothing is under way."""
        self._endpoint.connect(peer)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def done(error: DualPathError | None) -> None:
            threadsafe(loop, _resolve, future, error)

        self._endpoint.push(Push(peer.agent, STAGING, local, region, remote, done, lease=lease_id, priority=PRIORITY_POOL))
        return future


def all_layers(slots: Blocks, layers_per_slot: int, layers: Blocks) -> Blocks:
    """Layer Block indices of `layers` of each slot, slot by slot (so that consecutive ones merge into one descriptor)."""
    return np.ascontiguousarray((slots[:, None] * np.int32(layers_per_slot) + layers[None, :]).reshape(-1), dtype=np.int32)


def threadsafe(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """Call `function` on `loop` from another thread, unless the loop is closed already."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        log.debug("an event loop is closed: %s is not called", function)


def _resolve(future: asyncio.Future[None], error: DualPathError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
