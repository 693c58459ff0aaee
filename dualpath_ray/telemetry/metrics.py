"""Every metric of the system. docs/metrics.md is made from this module (`make docs`).

prometheus_client and not the OpenTelemetry metrics API: what is wanted is a text exposition per process that one HTTP endpoint joins
(`exposition.py`), and that is what this library is; OpenTelemetry would need an exporter that wraps it.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.openmetrics.exposition import generate_latest

# The extra `_created` series of every counter and histogram double the exposition and nothing reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]

# 1 ms to 100 s: from one decode step on a GPU to a long prompt on a CPU.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
# 1 us to 1 s, for work that is quick.
SHORT_SECONDS = (1e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A metric as documented: `unit` is in words, `labels` maps each label to its possible values."""

    name: str
    kind: str
    unit: str
    meaning: str
    labels: dict[str, str]


class Metrics:
    """The metrics of one process, in a registry of its own. A process fills in those that it knows; the others stay out of `render()`
    (without labels: at 0)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.specs: list[MetricSpec] = []
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}

        self.requests = self._counter(
            "requests", "requests", "Requests that ended.", outcome="stop, length, cancelled, invalid, overloaded, timeout or failed"
        )
        self.requests_active = self._gauge("requests_active", "requests", "Requests accepted and not ended.")
        self.retries = self._counter(
            "retries", "attempts", "Attempts of requests after the first, because something died or was lost on the way."
        )
        self.tokens = self._counter(
            "tokens",
            "tokens",
            "Tokens of requests that ended: in prompts, of these found in storage and computed, and generated.",
            kind="prompt, cached, computed or generated",
        )
        self.ttft = self._histogram("ttft", "From submission to the first token. Exemplars name traces.")
        self.ttft_part = self._histogram(
            "ttft_part",
            "What the first token waited for: its turn at scheduler and prefill engine (queue), staging slots (allocate), KV on its way "
            "(wire), computation (compute); the rest is messages between processes, or attempts that failed (handshake).",
            part="queue, handshake, allocate, wire or compute",
        )
        self.tpot = self._histogram("tpot", "Mean time per token after the first, per request.")
        self.queue = self._histogram("queue", "From submission to assignment.")
        self.read = self._histogram("read", "Reading a request's hit blocks from storage, per side and request.")
        self.prefill = self._histogram("prefill", "From assignment to the first token.")

        self.read_bytes = self._counter(
            "kv_read",
            "bytes",
            "KV read from storage, by the node whose storage NIC read it.",
            side="prefill_node, decode_node or other_nodes",
        )
        self.read_wait = self._histogram(
            "kv_read_wait",
            "From the grant of slots to the first layers in memory, per side and request: the queue of that path and its first read.",
            side="prefill_node, decode_node or other_nodes",
        )
        self.pushed_bytes = self._counter(
            "pushed", "bytes", "KV written into another process's memory.", kind="hit_layers, new_layers, full_blocks or pool"
        )
        self.push_failures = self._counter("push_failures", "pushes", "Pushes that failed: a dead peer, a time-out.")
        self.damaged_pushes = self._counter("damaged_pushes", "pushes", "Pushes that arrived damaged (transfer.verify), and were repeated.")
        self.refused_pushes = self._counter("refused_pushes", "pushes", "Pushes dropped because their lease was closed.")

        self.staging_slots = self._gauge(
            "staging_slots", "Full-Block slots", "Slots of the gateway's staging.", state="free, leased or resident"
        )
        self.leases = self._gauge("leases", "leases", "Leases whose slots are not free yet.")
        self.oldest_lease = self._gauge("oldest_lease_seconds", "seconds", "Age of the gateway's oldest lease.")
        self.persisted_blocks = self._counter("persisted_blocks", "blocks", "New blocks made durable.")
        self.persist_failures = self._counter(
            "persist_failures", "blocks", "New blocks that are not stored: the store failed, or its queue was full."
        )
        self.window_peak_bytes = self._gauge("window_peak_bytes", "bytes", "Most prefill KV that was ever resident in the window.")
        self.pool_blocks = self._gauge("pool_blocks", "blocks", "Blocks of the decode engine's KV pool.", state="free or used")
        self.batch_size = self._gauge("decode_batch", "requests", "Requests in the decode engine's batch.")

        self.read_queue_tokens = self._gauge(
            "read_queue_tokens", "tokens", "Tokens whose KV waits to be read, or is being read, by this gateway."
        )
        self.read_queue_bytes = self._gauge("read_queue_bytes", "bytes", "The same in bytes.")
        self.snic_busy = self._counter(
            "snic_busy", "seconds", "Time in which the gateway had something to read: its rate is the storage NIC's utilisation."
        )
        self.cnic_busy = self._counter(
            "cnic_busy", "seconds", "Time in which the process had something to push: its rate is the utilisation of its compute NIC."
        )
        self.engine_busy = self._counter("engine_busy", "seconds", "Time in which the engine computed.")
        self.engine_queue = self._counter(
            "engine_queue", "seconds", "Time that requests waited at an engine for their batch (prefill) or for KV pool blocks (decode)."
        )
        self.store_bytes = self._counter("store", "bytes", "Bytes moved between the store and this gateway.", direction="read or write")
        self.store_seconds = self._counter("store", "seconds", "Time in which the store was at work.", direction="read or write")
        self.store_queue = self._gauge("store_queue", "tasks", "Work that waits in the store's own queues.", direction="read or write")
        self.store_used_bytes = self._gauge("store_used_bytes", "bytes", "What the store holds, as last found, and what was written since.")
        self.store_capacity_bytes = self._gauge("store_capacity_bytes", "bytes", "storage.capacity_bytes; 0: no bound.")
        self.store_skipped_blocks = self._counter(
            "store_skipped_blocks",
            "blocks",
            "Blocks that were not stored: no room, the device failed, or writes lag behind.",
            reason="full, failed or lagging",
        )
        self.store_evicted_blocks = self._counter("store_evicted_blocks", "blocks", "Blocks that this gateway removed to make room.")
        self.store_evicted_bytes = self._counter("store_evicted", "bytes", "The same in bytes.")
        self.loaded_blocks = self._counter(
            "loaded_blocks",
            "blocks",
            "Hit blocks by where a gateway really found them.",
            source="dram_local, dram_peer (this node's memory, for another node) or storage",
        )
        self.hedged_reads = self._counter("hedged_reads", "reads", "Parts of a request's reads that lagged and were given to another node.")
        self.hedged_bytes = self._counter("hedged", "bytes", "The same in bytes: what may have been read twice.")
        self.resident_evictions = self._counter("resident_evictions", "blocks", "Resident blocks whose slots were needed.")
        self.corrupt_blocks = self._counter("store_corrupt_blocks", "blocks", "Blocks that failed their checksum and were removed.")
        self.foreign_files = self._counter("store_foreign_files", "files", "Entries skipped when the store was scanned.")

        self.decisions = self._counter(
            "scheduler_decisions", "requests", "What the scheduler decided.", outcome="assigned, queued or refused"
        )
        self.decision_seconds = self._histogram("scheduler_decision", "Deciding on one request.", buckets=SHORT_SECONDS)
        self.hit_tokens = self._counter(
            "hit_tokens",
            "tokens",
            "Hit tokens of assigned requests, by what their KV is read from and whose.",
            source="storage or dram",
            side="prefill_node, decode_node or other_nodes",
        )
        self.hit_blocks = self._counter(
            "hit_blocks",
            "blocks",
            "Stored blocks that prompts begin with: read, or recomputed because that is faster or one token must be left to compute.",
            decision="load or recompute",
        )
        self.queued_requests = self._gauge("scheduler_queued_requests", "requests", "Requests that wait for engines.")
        self.index_blocks = self._gauge("scheduler_index_blocks", "blocks", "Blocks in the scheduler's index.")
        self.report_age = self._gauge("report_age_seconds", "seconds", "Time since the last load report.", reporter="engine or gateway id")
        self.restarts = self._counter(
            "actor_restarts", "restarts", "Actors started again by the supervisor.", role="scheduler, gateway, prefill or decode"
        )

    def render(self) -> str:
        """This process's exposition, in OpenMetrics text format: the one that has exemplars. `exposition.merge` makes it what is served."""
        text: bytes = generate_latest(self.registry)  # type: ignore[no-untyped-call]
        return text.decode()

    def advance(self, counter: Counter, total: float, **labels: str) -> None:
        """Bring a counter up to `total`, a count that someone else keeps since the process started. Not for counters also `inc`ed."""
        child = counter.labels(**labels) if labels else counter
        key = (str(counter), tuple(labels.values()))
        child.inc(max(0.0, total - self._totals.get(key, 0.0)))
        self._totals[key] = total

    def _counter(self, name: str, unit: str, meaning: str, **labels: str) -> Counter:
        name = f"dualpath_{name}" + (f"_{unit}" if unit in ("bytes", "seconds") else "")
        self.specs.append(MetricSpec(f"{name}_total", "counter", unit, meaning, labels))
        return Counter(name, meaning, tuple(labels), registry=self.registry)

    def _gauge(self, name: str, unit: str, meaning: str, **labels: str) -> Gauge:
        self.specs.append(MetricSpec(f"dualpath_{name}", "gauge", unit, meaning, labels))
        return Gauge(f"dualpath_{name}", meaning, tuple(labels), registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...] = SECONDS, **labels: str) -> Histogram:
        name = f"dualpath_{name}_seconds"
        self.specs.append(MetricSpec(name, "histogram", "seconds", meaning, labels))
        return Histogram(name, meaning, tuple(labels), registry=self.registry, buckets=buckets)
