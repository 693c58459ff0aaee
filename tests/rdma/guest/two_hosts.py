"""The one-process system of tests/unit/services, cut in two: a prefill engine in one process, gateway and decode engine in another.

What Ray actors carry in a cluster goes over a Unix socket here; KV goes over each process's own RDMA device.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
from pathlib import Path

from dualpath_ray.decode_service import DecodeService, DecodeServiceSettings
from dualpath_ray.engine.model import CausalModel
from dualpath_ray.engine.pool import PagedPool
from dualpath_ray.engine.window import LayerWindow
from dualpath_ray.gateway import Gateway
from dualpath_ray.gateway_settings import GatewaySettings
from dualpath_ray.kv.index import BlockIndex
from dualpath_ray.kv.keys import block_keys, root_key
from dualpath_ray.messages import DecodeTask, PrefillOutcome, PrefillTask, ReadPart, Route
from dualpath_ray.prefill_service import PrefillService
from dualpath_ray.requests import GenerationRequest
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from dualpath_ray.traffic.classes import Marking, TrafficClass
from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from dualpath_ray.transfer.memory import PeerInfo
from policies.batch_quota import AttentionTimeModel, plan_batch

BLOCK_TOKENS, CONTEXT, SLOTS = 16, 512, 96
REQUEST_TIMEOUT_S = 400.0
CLASSES = {TrafficClass.KV_READ: Marking(2, 18), TrafficClass.KV_WRITE: Marking(2, 10)}


def use_device(name: str) -> EndpointSettings:
    """This process's transfers go over one device, and over nothing else."""
    os.environ.update(UCX_TLS="rc,self", UCX_NET_DEVICES=f"{name}:1")
    return EndpointSettings(push_timeout_s=REQUEST_TIMEOUT_S, traffic=CLASSES, rdma_ports=(f"{name}:1",))


async def serve_prefill(model: CausalModel, device: str, path: Path) -> None:
    """Answer calls on a Unix socket until cancelled: `None` asks for our address, a task for its prefill."""
    geometry = model.geometry(BLOCK_TOKENS)

    def policy(waiting: object) -> list[int]:
        return plan_batch(waiting, AttentionTimeModel(0.0), float("inf"), CONTEXT, BLOCK_TOKENS)  # type: ignore[arg-type]

    window = LayerWindow(geometry, 2, CONTEXT)
    service = PrefillService("prefill", model, geometry, window, policy, endpoint_settings=use_device(device))
    await service.start()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task, peers = pickle.loads(await reader.read())
        for peer in peers:
            service.endpoint.connect(peer)
        try:
            result: object = service.endpoint.info if task is None else await service.prefill(task)
        except Exception as error:
            result = error
        writer.write(pickle.dumps(result))
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(answer, path)
    async with server:
        await server.serve_forever()


class RemotePrefill:
    """The prefill engine as the decode engine calls it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def ask(self, task: PrefillTask | None, peers: tuple[PeerInfo, ...] = ()) -> object:
        for _ in itertools.count():
            try:
                reader, writer = await asyncio.open_unix_connection(self._path)
                break
            except OSError:  # it is still coming up
                await asyncio.sleep(0.5)
        writer.write(pickle.dumps((task, peers)))
        writer.write_eof()
        result = pickle.loads(await reader.read())
        writer.close()
        if isinstance(result, Exception):
            raise result
        return result

    async def prefill(self, task: PrefillTask) -> PrefillOutcome:
        outcome = await self.ask(task)
        assert isinstance(outcome, PrefillOutcome)
        return outcome

    async def cancel(self, request_id: str, epoch: int) -> None:
        return


class DecodeHost:
    """Gateway `d0` and a decode engine, over one device."""

    def __init__(self, model: CausalModel, device: str, store: Path, prefill: RemotePrefill) -> None:
        settings = use_device(device)
        self.model, self.geometry = model, model.geometry(BLOCK_TOKENS)
        self.index = BlockIndex()
        self._prefill = prefill
        block_store = DirectoryStore(store, self.geometry, model.fingerprint, DirectorySettings())
        self._gateway = Gateway("d0", self.geometry, block_store, SLOTS, GatewaySettings(), settings)
        self.decode = DecodeService(
            "decode", model, self.geometry, PagedPool(self.geometry, SLOTS), self, DecodeServiceSettings(), settings
        )  # fmt: skip

    def gateway(self, node_id: str) -> Gateway:
        assert node_id == "d0"
        return self._gateway

    def prefill(self, engine_id: str) -> RemotePrefill:
        return self._prefill

    async def start(self) -> None:
        await self._gateway.start(self._on_index)
        await self.decode.start()
        info = await self._prefill.ask(None, (self._gateway.endpoint.info,))
        assert isinstance(info, PeerInfo)
        self._peers = {"prefill": info, "decode": self.decode.endpoint.info, "d0": self._gateway.endpoint.info}

    def _on_index(self, added: list[tuple[bytes, bytes]], removed: list[bytes]) -> None:
        self.index.add(added)
        self.index.remove(removed)

    async def ask(self, name: str, prompt: list[int], count: int) -> tuple[list[int], int]:
        """The answer's tokens, and how many blocks of the prompt were read here and streamed to the prefill engine."""
        root = root_key(self.model.fingerprint, "", self.geometry)
        keys = tuple(block_keys(root, prompt, BLOCK_TOKENS))
        hits = min(self.index.longest_match(keys), (len(prompt) - 1) // BLOCK_TOKENS)
        reads = (ReadPart("d0", 0, hits),) if hits else ()
        request = GenerationRequest(name, tuple(prompt), count, timeout=REQUEST_TIMEOUT_S)
        route = Route(name, 0, "prefill", "decode", "p0", "d0", hits, reads, self._peers)
        tokens: list[int] = []
        async for delta in self.decode.generate(DecodeTask(request, route, keys, root)):
            tokens += delta.tokens
        return tokens, hits

    async def settle(self) -> None:
        while not (self.decode.idle and self._gateway.idle):
            await asyncio.sleep(0.05)
        self.decode.check_integrity()
        self._gateway.check_integrity()

    async def close(self) -> None:
        await self.decode.close()
        await self._gateway.close()
