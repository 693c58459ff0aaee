"""Which tokens the next prefill batch computes (paper section 6, intra-engine scheduling).

Intent: attention time per forward batch is nearly equal on all engines of a synchronised group, and a long prompt does not
hold up short ones.
Inputs: waiting requests in FIFO order as (cached, new) token counts, a time model, the quota (300 ms in the paper).
Rule: take whole requests while the summed predicted time stays within the quota; of the first that overflows take the largest
chunk that fits, found by bisection; stop there. Chunks end on a block boundary, except the one that finishes its request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

TimeModel = Callable[[int, int], float]


@dataclass(frozen=True, slots=True)
class AttentionTimeModel:
    """Seconds to compute `new` tokens after `cached` ones: fixed + per_token * new + per_pair * new * (cached + new / 2).

    The last term counts query-key pairs; coefficients are fitted on the engine itself, summed over all layers.
    """

    per_pair_s: float
    per_token_s: float = 0.0
    fixed_s: float = 0.0

    def __call__(self, cached: int, new: int) -> float:
        return self.fixed_s + self.per_token_s * new + self.per_pair_s * new * (cached + new / 2)


def plan_batch(
    waiting: Iterable[tuple[int, int]],
    time_model: TimeModel,
    quota_s: float,
    max_tokens: int,
    block_tokens: int,
) -> list[int]:
    """New tokens to compute of each waiting request, from the head; requests past the end of the list are not in the batch.

    `time_model` must not decrease with `new`. The head always gets at least one block (or its whole rest), so that the queue moves
    even if one block outlasts the quota. Raises ValueError if `max_tokens` cannot hold one block.
    """
    if max_tokens < block_tokens:
        raise ValueError(f"max_tokens must be at least one block ({block_tokens} tokens), not {max_tokens}")
    chunks: list[int] = []
    time_left, room = quota_s, max_tokens
    for cached, new in waiting:
        needed = time_model(cached, new)
        if new <= room and needed <= time_left:
            chunks.append(new)
            time_left -= needed
            room -= new
            continue
        chunk = _largest_chunk(cached, new, time_model, time_left, room, block_tokens)
        if chunk == 0 and not chunks:
            chunk = min(new, block_tokens - cached % block_tokens)
        if chunk:
            chunks.append(chunk)
        break
    return chunks


def _largest_chunk(cached: int, new: int, time_model: TimeModel, time_left: float, room: int, block_tokens: int) -> int:
    """Largest part of `new` that ends on a block boundary, fits `room` and is predicted to take at most `time_left`."""
    first_end = cached // block_tokens + 1
    last_end = (cached + min(new, room)) // block_tokens
    low, high = first_end - 1, last_end
    while low < high:
        middle = (low + high + 1) // 2
        if time_model(cached, middle * block_tokens - cached) <= time_left:
            low = middle
        else:
            high = middle - 1
    return max(0, low * block_tokens - cached)
