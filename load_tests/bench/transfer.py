"""`dualpath bench transfer`: layer streams beside a bare NIXL loop and beside Ray's object store, over the same bytes.

Two processes on one machine. Each round moves the same blocks, layer by layer, from one process's staging into the other's window in three
ways that take turns: as a prefill engine gets them (open, credits, pushes, landed messages), as a loop around NIXL's
own calls would (one prepared WRITE per layer, waited for), and through the object store (gather, put, get, scatter).
"""

from __future__ import annotations

import resource
import time
from typing import Any

import click
import numpy as np
from rich.progress import track

from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.environment import set_ray_defaults
from dualpath_ray.kv.geometry import KVGeometry
from load_tests.bench.figures import median, show, spread

RING_SLOTS = 4  # prefill.window_layers
SILENCE_S = 0.3  # before each way: endpoints look often for a while after they had work, which would cost the next way processor time


class SourceProcess:
    """The pushing side: a staging arena, an endpoint with streams, and a bare agent on the same memory."""

    def __init__(self, settings: Settings, geometry: KVGeometry, blocks: int) -> None:
        from dualpath_ray.gateway import WINDOW
        from dualpath_ray.kv.staging import REGION, StagingBuffer
        from dualpath_ray.transfer.endpoint import Endpoint
        from dualpath_ray.transfer.nixl_api import make_agent
        from dualpath_ray.transfer.source import StreamSource

        self._geometry, self._blocks = geometry, blocks
        self._staging = StagingBuffer(geometry, blocks, huge_pages=settings.staging.huge_pages)
        self._staging.arena[:] = np.random.default_rng(0).integers(0, 256, self._staging.arena.size, dtype=np.uint8)
        self._slots = np.random.default_rng(1).permutation(blocks).astype(np.int32)
        self.endpoint = Endpoint("source", (self._staging.region,), _endpoint_settings(settings))
        self._source = StreamSource(self.endpoint, REGION, WINDOW, geometry.layers)
        self._source.add_lease(1, self._slots, geometry.layers)
        self._bare = make_agent("bare-source", progress_thread_delay_us=1000, backends=("UCX",))
        region = self._staging.region
        self._bare.register_memory([(region.base, region.nbytes, 0, "")], "DRAM")
        self._bare_local = self._bare.prep_xfer_dlist("NIXL_INIT_AGENT", region.descriptors(), "DRAM")

    def info(self) -> Any:
        return self.endpoint.info

    def connect(self, endpoint_info: Any, bare_metadata: bytes) -> None:
        self.endpoint.connect(endpoint_info)
        peer = self._bare.add_remote_agent(bare_metadata)
        self._bare_peer = peer if isinstance(peer, str) else peer.decode()
        self._bare_remote = self._bare.prep_xfer_dlist(self._bare_peer, endpoint_info.regions[0].descriptors(), "DRAM")

    def bare_push(self) -> tuple[float, float]:
        """All layers by a plain loop; returns (seconds, CPU seconds)."""
        layers, rows = self._geometry.layers, np.arange(self._blocks, dtype=np.int32)
        cpu, start = _cpu(), time.perf_counter()
        for layer in range(layers):
            local = self._slots * np.int32(layers) + np.int32(layer)
            remote = rows + np.int32((layer % RING_SLOTS) * self._blocks)
            handle = self._bare.make_prepped_xfer("WRITE", self._bare_local, local, self._bare_remote, remote, b"layer")
            state = self._bare.transfer(handle)
            while state != "DONE":
                state = self._bare.check_xfer_state(handle)
            handle.release()
        return time.perf_counter() - start, _cpu() - cpu

    def layer(self, layer: int) -> np.ndarray:
        """One layer of all blocks as an array, which Ray puts into its object store."""
        bytes_ = self._geometry.layer_block_bytes
        slots = self._staging.arena.reshape(self._blocks, self._staging.slot_stride)
        return np.ascontiguousarray(slots[self._slots, layer * bytes_ : (layer + 1) * bytes_])

    def memcpy(self) -> float:
        """Seconds to copy the same blocks within this process, layer by layer."""
        bytes_, layers = self._geometry.layer_block_bytes, self._geometry.layers
        slots = self._staging.arena.reshape(self._blocks, self._staging.slot_stride)
        target = np.zeros((RING_SLOTS, self._blocks, bytes_), dtype=np.uint8)
        start = time.perf_counter()
        for layer in range(layers):
            ring = target[layer % RING_SLOTS]
            for row, slot in enumerate(self._slots):
                ring[row] = slots[slot, layer * bytes_ : (layer + 1) * bytes_]
        return time.perf_counter() - start

    def cpu_seconds(self) -> float:
        return _cpu()


class SinkProcess:
    """The receiving side: a window ring, an endpoint with a layer sink, and a bare agent on the same memory."""

    def __init__(self, settings: Settings, geometry: KVGeometry, blocks: int, source_info: Any) -> None:
        from dualpath_ray.gateway import WINDOW
        from dualpath_ray.kv.staging import REGION
        from dualpath_ray.transfer.endpoint import Endpoint
        from dualpath_ray.transfer.memory import Region, allocate
        from dualpath_ray.transfer.nixl_api import make_agent
        from dualpath_ray.transfer.sink import LayerSink

        self._geometry, self._blocks, self._source_info = geometry, blocks, source_info
        size = RING_SLOTS * blocks * geometry.layer_block_bytes
        self._window = allocate(size)
        region = Region(WINDOW, self._window.ctypes.data, geometry.layer_block_bytes, RING_SLOTS * blocks, size)
        self.endpoint = Endpoint("sink", (region,), _endpoint_settings(settings))
        self.endpoint.connect(source_info)
        self._sink = LayerSink(self.endpoint, WINDOW, REGION, geometry.layers, RING_SLOTS, blocks)
        self._bare = make_agent("bare-sink", progress_thread_delay_us=1000, backends=("UCX",))
        self._bare.register_memory([(region.base, region.nbytes, 0, "")], "DRAM")

    def info(self) -> tuple[Any, bytes]:
        return self.endpoint.info, self._bare.get_agent_metadata()

    def stream(self) -> tuple[float, float, list[float]]:
        """All layers as a prefill engine gets them; returns (seconds, CPU seconds, when each layer was there)."""
        from dualpath_ray.transfer.feeds import HitSource, NewKV

        nothing = NewKV(self._source_info.agent, 1, np.empty(0, dtype=np.int32), 0)
        positions = tuple(range(self._blocks))
        cpu, start = _cpu(), time.perf_counter()
        feed = self._sink.open([HitSource(self._source_info.agent, 1, positions, positions)], nothing)
        gate = self._sink.start_batch([feed], [0], 60.0)
        landed = []
        for layer in range(self._geometry.layers):
            gate.enter(layer)
            landed.append(time.perf_counter() - start)
            gate.leave(layer)
        seconds, used = time.perf_counter() - start, _cpu() - cpu
        gate.finish().result(60)
        return seconds, used, landed

    def through_object_store(self, source: Any) -> tuple[float, float]:
        import ray

        ring = self._window.reshape(RING_SLOTS, self._blocks, self._geometry.layer_block_bytes)
        cpu, start = _cpu(), time.perf_counter()
        for layer, reference in enumerate([source.layer.remote(layer) for layer in range(self._geometry.layers)]):
            ring[layer % RING_SLOTS] = ray.get(reference)
        return time.perf_counter() - start, _cpu() - cpu


def _endpoint_settings(settings: Settings) -> Any:
    """Those of a gateway or engine when all nodes are on one machine; also tells UCX its transports."""
    from actors.engine_process import endpoint_settings, prepare_transfers

    return endpoint_settings(settings, prepare_transfers(settings))


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@click.command()
@with_settings
@click.option("--blocks", default=64, show_default=True, help="Full Blocks per request (64 blocks of 64 tokens: a 4k prompt).")
@click.option("--rounds", default=15, show_default=True, help="Rounds; the three ways take turns in each.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(settings: Settings, blocks: int, rounds: int, as_json: bool) -> None:
    """Layer streams against a bare NIXL loop, memcpy and Ray's object store (SmolLM2's KV geometry)."""
    set_ray_defaults("local")
    import ray

    geometry = KVGeometry(layers=30, kv_heads=3, head_dim=64, dtype="float32", block_tokens=64)
    total = blocks * geometry.full_block_bytes
    ray.init(address="local", include_dashboard=False, num_cpus=4, object_store_memory=2 * total + (200 << 20), log_to_driver=False)
    try:
        remote: Any = ray.remote
        source = remote(SourceProcess).options(num_cpus=0).remote(settings, geometry, blocks)
        sink = remote(SinkProcess).options(num_cpus=0).remote(settings, geometry, blocks, ray.get(source.info.remote()))
        ray.get(source.connect.remote(*ray.get(sink.info.remote())))
        times: dict[str, list[float]] = {"stream": [], "bare_nixl": [], "memcpy": [], "object_store": []}
        cpu: list[float] = []
        per_layer: list[float] = []
        for number in track(range(rounds + 2), description="rounds", transient=True, disable=as_json):
            time.sleep(SILENCE_S)
            before = ray.get(source.cpu_seconds.remote())
            seconds, used, landed = ray.get(sink.stream.remote())
            used += ray.get(source.cpu_seconds.remote()) - before
            time.sleep(SILENCE_S)
            bare, _ = ray.get(source.bare_push.remote())
            time.sleep(SILENCE_S)
            copied = ray.get(source.memcpy.remote())
            time.sleep(SILENCE_S)
            stored, _ = ray.get(sink.through_object_store.remote(source))
            if number >= 2:  # the first rounds pay for connections and page faults
                for name, value in (("stream", seconds), ("bare_nixl", bare), ("memcpy", copied), ("object_store", stored)):
                    times[name].append(value)
                cpu.append(used)
                per_layer += np.diff(landed).tolist()
    finally:
        ray.shutdown()
    ratios = {name: median([other / own for other, own in zip(times[name], times["stream"], strict=True)]) for name in times}
    document = {
        "bytes": total,
        "layers": geometry.layers,
        "bytes_per_s": {name: total / median(values) for name, values in times.items()},
        "seconds": {name: spread(values) for name, values in times.items()},
        "vs_bare_nixl": ratios["bare_nixl"],
        "vs_memcpy": ratios["memcpy"],
        "vs_object_store": ratios["object_store"],
        "cpu_s_per_gb": median(cpu) / (total / 1e9),
        "layer_s": {"p50": float(np.percentile(per_layer, 50)), "p99": float(np.percentile(per_layer, 99))},
    }
    rows = [
        [name, f"{total / median(values) / 1e9:.2f} GB/s", f"{1e3 * median(values):.1f} ms", f"{ratios[name]:.2f}"]
        for name, values in times.items()
    ]
    show(f"{total / 1e6:.0f} MB in {geometry.layers} layers", document, rows, ["way", "rate", "time", "its time / stream's"], as_json)
