"""Divide work over queues so that all of them finish together.

Intent: with queue q_i and rate b_i at source i, reading x_i more blocks ends at (q_i + x_i) / b_i; the latest end is smallest when every
source that gets anything ends at the same level t. Formula: t solves sum_i max(0, t * b_i - q_i) = n. The paper names splitting
one request over both sides as future work (section 6); this is that rule for any number of sources.
"""

from __future__ import annotations

from collections.abc import Sequence


def fill_level_shares(
    amount: int,
    queues: Sequence[float],
    rates: Sequence[float],
    limits: Sequence[int],
    smallest: int = 1,
) -> list[int]:
    """Whole shares x_i <= limits_i with sum `amount`; at least one limit must be `amount` or more.

    Sources whose share would be below `smallest` get nothing. A rate of 0 is unknown and counts as the mean of the known ones.
    The result is the continuous optimum rounded to whole units: no source ends more than one unit after the optimum, except when
    `smallest` or a limit pushes its share to the others.
    """
    known = [rate for rate in rates if rate > 0]
    fallback = sum(known) / len(known) if known else 1.0
    speed = [rate if rate > 0 else fallback for rate in rates]
    active = [i for i in range(len(queues)) if limits[i] > 0]
    while True:
        shares = _level(amount, queues, speed, limits, active)
        small = [i for i in active if 0 < shares[i] < smallest]
        room = sum(limits[i] for i in active)
        droppable = [i for i in small if room - limits[i] >= amount and len(active) > 1]
        if not droppable:
            break
        active.remove(min(droppable, key=lambda i: (shares[i], i)))
    return _whole(amount, shares, limits, queues, speed)


def finish(amount: float, queues: Sequence[float], rates: Sequence[float]) -> float:
    """The common level t: when the last of the sources that share `amount` ends. Rates must be known."""
    total_queue = total_rate = level = 0.0
    for queue, rate in sorted(zip(queues, rates, strict=True), key=lambda source: source[0] / source[1]):
        if total_rate and queue / rate >= level:
            break
        total_queue += queue
        total_rate += rate
        level = (amount + total_queue) / total_rate
    return level


def _level(amount: int, queues: Sequence[float], speed: Sequence[float], limits: Sequence[int], active: Sequence[int]) -> list[float]:
    """Continuous shares at the common level, capped by the limits; what a cap refuses is levelled over the rest."""
    shares = [0.0] * len(queues)
    free, left = list(active), float(amount)
    while free and left > 0:
        free.sort(key=lambda i: (queues[i] / speed[i], i))
        total_queue = total_speed = level = 0.0
        used = 0
        for i in free:
            if used and queues[i] / speed[i] >= level:
                break
            total_queue += queues[i]
            total_speed += speed[i]
            level = (left + total_queue) / total_speed
            used += 1
        capped = [i for i in free[:used] if level * speed[i] - queues[i] > limits[i]]
        if not capped:
            for i in free[:used]:
                shares[i] = level * speed[i] - queues[i]
            break
        for i in capped:
            shares[i] = float(limits[i])
            left -= limits[i]
            free.remove(i)
    return shares


def _whole(amount: int, shares: Sequence[float], limits: Sequence[int], queues: Sequence[float], speed: Sequence[float]) -> list[int]:
    """Round down, then give the remainder one by one to the source that would end first.

    Rates that differ by more than floating point can tell may leave too much instead: it is taken back from the source that ends last.
    """
    whole = [min(int(share), limit) for share, limit in zip(shares, limits, strict=True)]
    left = amount - sum(whole)
    chosen = [i for i, share in enumerate(shares) if share > 0]
    while left > 0:
        open_sources = [i for i in chosen if whole[i] < limits[i]] or [i for i in range(len(limits)) if whole[i] < limits[i]]
        best = min(open_sources, key=lambda i: ((queues[i] + whole[i] + 1) / speed[i], i))
        whole[best] += 1
        left -= 1
    while left < 0:
        last = max((i for i in chosen if whole[i]), key=lambda i: ((queues[i] + whole[i]) / speed[i], i))
        whole[last] -= 1
        left += 1
    return whole
