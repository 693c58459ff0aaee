"""A whole system in one process: gateways, a prefill and a decode service with real stores, NIXL endpoints and models; no Ray.

The scheduler's part is played by the test, which says where hit blocks are read.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dualpath_ray.decode_service import DecodeService, DecodeServiceSettings
from dualpath_ray.engine.model import CausalModel, load_model
from dualpath_ray.engine.pool import PagedPool
from dualpath_ray.engine.window import LayerWindow
from dualpath_ray.gateway import Gateway
from dualpath_ray.gateway_settings import GatewaySettings
from dualpath_ray.hedging import HedgeSettings
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.index import BlockIndex
from dualpath_ray.kv.keys import block_keys, root_key
from dualpath_ray.messages import DecodeTask, ReadPart, Route
from dualpath_ray.prefill_service import PrefillService, PrefillServiceSettings
from dualpath_ray.requests import GenerationDelta, GenerationRequest, GenerationUsage, SamplingParams
from dualpath_ray.stores.base import BlockStore
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from policies.batch_quota import AttentionTimeModel, plan_batch

Side = Literal["prefill", "decode", "split", "recompute"]
StoreWrapper = Callable[[BlockStore, KVGeometry], BlockStore]


@dataclass(slots=True)
class Answer:
    tokens: list[int]
    usage: GenerationUsage
    finish_reason: str


class System:
    """One prefill node `p0`, one decode node `d0`."""

    def __init__(
        self,
        model: CausalModel,
        store_path: Path,
        block_tokens: int,
        chunk_tokens: int,
        window_layers: int,
        slots: int,
        wrap: StoreWrapper | None,
        pool_blocks: int,
        layerwise: bool = True,
        resident_share: float = 0.0,
        slow: StoreWrapper | None = None,
        hedge: HedgeSettings | None = None,
        endpoints: EndpointSettings | None = None,
    ) -> None:
        self._endpoints = endpoints
        self.resident_share = resident_share
        self.model = model
        self.geometry = model.geometry(block_tokens)
        self.index = BlockIndex()
        self._names = itertools.count()
        context = self.geometry.blocks_for(1024) * block_tokens
        self.gateways = {node: self._gateway(node, store_path, slots, slow if slow and node == "p0" else wrap) for node in ("p0", "d0")}

        def policy(waiting: object) -> list[int]:
            return plan_batch(waiting, AttentionTimeModel(0.0), float("inf"), chunk_tokens, block_tokens)  # type: ignore[arg-type]

        window = LayerWindow(self.geometry, window_layers, context)
        self.prefill_service = PrefillService(
            "prefill", model, self.geometry, window, policy, PrefillServiceSettings(layerwise=layerwise), endpoints
        )
        pool = PagedPool(self.geometry, pool_blocks)
        self.decode_service = DecodeService(
            "decode", model, self.geometry, pool, self, DecodeServiceSettings(hedge=hedge or HedgeSettings()), endpoints
        )

    def _gateway(self, node: str, store_path: Path, slots: int, wrap: StoreWrapper | None) -> Gateway:
        store: BlockStore = DirectoryStore(store_path, self.geometry, self.model.fingerprint, DirectorySettings(range_bytes=1))
        if wrap is not None:
            store = wrap(store, self.geometry)
        return Gateway(node, self.geometry, store, slots, GatewaySettings(resident_share=self.resident_share), self._endpoints)

    async def start(self) -> None:
        for gateway in self.gateways.values():
            await gateway.start(self._on_index)
        self.index.add(await self.gateways["p0"].scan())
        await self.prefill_service.start()
        await self.decode_service.start()

    def _on_index(self, added: list[tuple[bytes, bytes]], removed: list[bytes]) -> None:
        self.index.add(added)
        self.index.remove(removed)

    def gateway(self, node_id: str) -> Gateway:
        return self.gateways[node_id]

    def prefill(self, engine_id: str) -> PrefillService:
        return self.prefill_service

    def task(self, request: GenerationRequest, side: Side, max_hits: int | None = None) -> DecodeTask:
        root = root_key(self.model.fingerprint, request.block_salt, self.geometry)
        keys = tuple(block_keys(root, request.tokens, self.geometry.block_tokens))
        stored = self.index.longest_match(keys)
        hits = min(stored, (len(request.tokens) - 1) // self.geometry.block_tokens)
        hits = 0 if side == "recompute" else hits if max_hits is None else min(hits, max_hits)
        route = Route(
            request.request_id,
            0,
            "prefill",
            "decode",
            "p0",
            "d0",
            hits,
            _parts(side, hits),
            {
                "prefill": self.prefill_service.endpoint.info,
                "decode": self.decode_service.endpoint.info,
                "p0": self.gateways["p0"].endpoint.info,
                "d0": self.gateways["d0"].endpoint.info,
            },
            stored_blocks=stored,
        )
        return DecodeTask(request, route, keys, root)

    def stream(self, request: GenerationRequest, side: Side, max_hits: int | None = None) -> AsyncIterator[GenerationDelta]:
        return self.decode_service.generate(self.task(request, side, max_hits))

    async def ask(self, tokens: list[int], side: Side, max_new: int = 12, **fields: object) -> Answer:
        """Serve one request to its end; retries what a corrupt block or the like makes retryable, as the cluster client does."""
        max_hits = fields.pop("max_hits", None)
        request = self.request(tokens, max_new, **fields)
        out: list[int] = []
        async for delta in self.stream(request, side, max_hits):  # type: ignore[arg-type]
            out += delta.tokens
            if delta.finish_reason is not None:
                assert delta.usage is not None
                return Answer(out, delta.usage, delta.finish_reason)
        raise AssertionError("the stream ended without a finish reason")

    def request(self, tokens: list[int], max_new: int = 12, **fields: object) -> GenerationRequest:
        sampling = fields.pop("sampling", SamplingParams())
        return GenerationRequest(f"r{next(self._names)}", tuple(tokens), max_new, sampling=sampling, timeout=60.0, **fields)  # type: ignore[arg-type]

    @property
    def endpoints(self) -> list[Endpoint]:
        return [self.prefill_service.endpoint, self.decode_service.endpoint, *(gateway.endpoint for gateway in self.gateways.values())]

    async def settle(self, timeout_s: float = 20.0) -> None:
        """Wait until nothing is under way anywhere, then check that nothing has leaked."""
        async with asyncio.timeout(timeout_s):
            while not (self.decode_service.idle and self.prefill_service.idle and all(g.idle for g in self.gateways.values())):
                await asyncio.sleep(0.005)
        for part in (self.decode_service, self.prefill_service, *self.gateways.values()):
            part.check_integrity()

    async def close(self) -> None:
        await self.decode_service.close()
        await self.prefill_service.close()
        for gateway in self.gateways.values():
            await gateway.close()


def _parts(side: Side, hits: int) -> tuple[ReadPart, ...]:
    if not hits or side == "recompute":
        return ()
    if side == "split" and hits > 1:
        return (ReadPart("p0", 0, hits // 2), ReadPart("d0", hits // 2, hits - hits // 2))
    return (ReadPart("d0" if side == "decode" else "p0", 0, hits),)


@asynccontextmanager
async def running_system(
    model: CausalModel,
    store_path: Path,
    block_tokens: int = 16,
    chunk_tokens: int = 512,
    window_layers: int = 2,
    slots: int = 192,
    wrap: StoreWrapper | None = None,
    pool_blocks: int = 256,
    layerwise: bool = True,
    resident_share: float = 0.0,
    slow: StoreWrapper | None = None,
    hedge: HedgeSettings | None = None,
    endpoints: EndpointSettings | None = None,
) -> AsyncIterator[System]:
    system = System(
        model,
        store_path,
        block_tokens,
        chunk_tokens,
        window_layers,
        slots,
        wrap,
        pool_blocks,
        layerwise,
        resident_share,
        slow,
        hedge,
        endpoints,
    )
    try:
        await system.start()
        yield system
        await system.settle()
    finally:
        await system.close()


_models: dict[Path, CausalModel] = {}


def shared_model(path: Path) -> CausalModel:
    """Loaded once per test session."""
    if path not in _models:
        _models[path] = load_model(path)
    return _models[path]


def read_bytes(usage: GenerationUsage) -> Mapping[str, int]:
    return {side: nbytes for side, nbytes in usage.read_bytes.items() if nbytes}
