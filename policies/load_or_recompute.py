"""How many of a request's hit blocks to load, and how many to recompute.

Intent: when storage is the bottleneck, computing the last few hit blocks again can be faster than waiting for them.
Inputs: hit blocks, new tokens, the time until the read queue would deliver n blocks, and the prefill time of a suffix; both fitted.
Rule: reading and computing overlap only as far as the engine allows, so the finish of loading the first n blocks and computing the rest is
T(n) = read(n) + compute(n * block_tokens cached, rest new); the n with the smallest T wins, the larger n on a tie (less compute).
Only a prefix can be loaded: the KV of a token depends on all tokens before it.
"""

from __future__ import annotations

from collections.abc import Callable


def blocks_to_load(
    hit_blocks: int,
    new_tokens: int,
    block_tokens: int,
    read_s: Callable[[int], float],
    compute_s: Callable[[int, int], float],
    candidates: int = 33,
) -> int:
    """Blocks of the hit prefix to read; the rest is recomputed.

    `read_s(blocks)` and `compute_s(cached, new)` must not decrease with their first respectively last argument. T is evaluated at
    `candidates` evenly spaced prefixes and then around the best one, so the cost does not grow with the context.
    """

    def total(blocks: int) -> float:
        cached = blocks * block_tokens
        return (read_s(blocks) if blocks else 0.0) + compute_s(cached, hit_blocks * block_tokens - cached + new_tokens)

    step = max(1, -(-hit_blocks // max(1, candidates - 1)))
    coarse = {*range(0, hit_blocks + 1, step), hit_blocks}
    best: int = min(coarse, key=lambda blocks: (total(blocks), -blocks))
    fine = range(max(0, best - step), min(hit_blocks, best + step) + 1, max(1, step // 8))
    chosen: int = min([best, *fine], key=lambda blocks: (total(blocks), -blocks))
    return chosen
