"""Move queued, unstarted work from an overloaded to an idle engine.

Intent: correct an assignment whose assumptions turned out wrong, without ping-pong.
Inputs: queued work per engine, the queued requests of each engine that may still move (in queue order) with their work, and the cost
of one move, all in one unit (tokens or seconds).
Rule: take the engine with most work and the one with least. Move the last queued request that fits: after the move the receiver (with the
cost added) has less work than the giver had, by at least `hysteresis` of the giver's load, and no more than the giver has left. So the two
never change places, each move strictly lowers the sum of squared loads, repeated calls end, and a request does not move back while loads
stand still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Move:
    """Take `request_id` from one engine's queue and append it to another's."""

    request_id: str
    source: str
    target: str


def rebalance(
    load: Mapping[str, float],
    movable: Mapping[str, Sequence[tuple[str, float]]],
    move_cost: float,
    hysteresis: float = 0.2,
    most_moves: int = 16,
) -> list[Move]:
    """Moves in order. `load` includes the movable work; a request moves at most once per call."""
    load = dict(load)
    queues = {engine: list(movable.get(engine, ())) for engine in load}
    moves: list[Move] = []
    while len(moves) < most_moves and len(load) > 1:
        source = max(load, key=lambda engine: (load[engine], engine))
        target = min(load, key=lambda engine: (load[engine], engine))
        gap = load[source] - load[target]
        gain = gap - hysteresis * load[source]
        fitting = [i for i, (_, work) in enumerate(queues[source]) if work + move_cost < gain and 2 * work + move_cost <= gap]
        if not fitting:
            break
        request_id, work = queues[source].pop(fitting[-1])
        load[source] -= work
        load[target] += work + move_cost
        moves.append(Move(request_id, source, target))
    return moves
