"""How many of a request's hit blocks to load, and how many to recompute.

Intent: when storage is the bottleneck, computing the last few hit blocks again can be faster than waiting for them.
Inputs: hit blocks, new tokens, the time until the read queue would deliver n blocks, the prefill time of a suffix (both fitted), and
the time until the engine is free.
Rule: reading overlaps with what the engine computes before this request, but not with the request itself, so loading the first n
blocks and computing the rest ends at T(n) = max(wait, read(n)) + compute(n * block_tokens cached, rest new); the n with the smallest T
wins, the larger n on a tie (less compute).
Only a prefix can be loaded: the KV of a token depends on all tokens before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

from policies.batch_quota import AttentionTimeModel
from policies.read_plan import ReadCandidate
from policies.vocabulary import RequestDemand
from policies.water_filling import finish


def blocks_to_load(
    hit_blocks: int,
    new_tokens: int,
    block_tokens: int,
    read_s: Callable[[int], float],
    compute_s: Callable[[int, int], float],
    wait_s: float = 0.0,
    candidates: int = 33,
) -> int:
    """Blocks of the hit prefix to read; the rest is recomputed.

    `read_s(blocks)` and `compute_s(cached, new)` must not decrease with their first respectively last argument. T is evaluated at
    `candidates` evenly spaced prefixes and then around the best one, so the cost does not grow with the context.
    """

    def total(blocks: int) -> float:
        cached = blocks * block_tokens
        ready = max(wait_s, read_s(blocks)) if blocks else wait_s
        return ready + compute_s(cached, hit_blocks * block_tokens - cached + new_tokens)

    step = max(1, -(-hit_blocks // max(1, candidates - 1)))
    coarse = {*range(0, hit_blocks + 1, step), hit_blocks}
    best: int = min(coarse, key=lambda blocks: (total(blocks), -blocks))
    fine = range(max(0, best - step), min(hit_blocks, best + step) + 1, max(1, step // 8))
    chosen: int = min([best, *fine], key=lambda blocks: (total(blocks), -blocks))
    return chosen


def with_loaded_prefix(
    demand: RequestDemand, sources: Sequence[ReadCandidate], compute_s: AttentionTimeModel, wait_s: float
) -> RequestDemand:
    """The request with as many hit blocks as are worth loading from `sources`, which share its reads.

    `wait_s` is when the prefill engine can begin. Blocks in DRAM cost no time. Unknown bandwidths or block sizes: all hits are loaded.
    """
    if not demand.hit_blocks or not demand.block_bytes or any(source.bandwidth <= 0 for source in sources):
        return demand
    queues = [source.queue_tokens / demand.block_tokens for source in sources]
    rates = [source.bandwidth / demand.block_bytes for source in sources]
    resident = sorted({position for positions in demand.resident.values() for position in positions if position < demand.hit_blocks})

    def read_s(blocks: int) -> float:
        stored = blocks - bisect_left(resident, blocks)
        return finish(stored, queues, rates) if stored else 0.0

    blocks = blocks_to_load(demand.hit_blocks, demand.computed_tokens, demand.block_tokens, read_s, compute_s, wait_s)
    return demand if blocks == demand.hit_blocks else replace(demand, hit_blocks=blocks)
