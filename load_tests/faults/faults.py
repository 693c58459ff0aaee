"""What can break, and seeded schedules of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PHASES = ("assigned", "arming", "reading", "prefilling", "handing_over", "decoding", "persisting")
"""What some request is doing at the moment of the fault, in the order in which a request goes through them."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`target`: a process by its name in the cluster, a host, a link (`d0-snic`) or the store.

    `hold_s`: how long it lasts until it is repaired.
    """

    kind: str
    target: str
    phase: str = ""
    hold_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.target}" + (f" while {self.phase.replace('_', ' ')}" if self.phase else "")


@dataclass(frozen=True, slots=True)
class Targets:
    """What there is to break."""

    engines: Sequence[str]  # prefill and decode engines and gateways, by name
    hosts: Sequence[str] = field(default=())  # whole Ray nodes
    links: Sequence[str] = field(default=())
    store: bool = False  # a storage server that can be killed, behind a proxy that can lie
    http: bool = False


WEIGHTS = {
    "kill": 24,
    "kill_scheduler": 4,
    "kill_http": 2,
    "kill_node": 2,
    "kill_store": 3,
    "hang": 12,
    "hang_for_good": 1,
    "cut": 14,
    "slow": 10,
    "flap": 6,
    "store_errors": 8,
    "store_garbage": 8,
    "store_silence": 7,
    "vanish": 14,
}
"""How often each kind is drawn, relative to the others that the place allows."""

ALONE = {"kill_node", "kill_scheduler", "hang_for_good", "kill_http"}
"""At most one of these in a round: they take longest, and two of them at once say no more than one after the other."""

CHAINS = {
    "hang": "hang",
    "cut": "link",
    "slow": "link",
    "flap": "link",
    "kill_store": "store",
    "store_errors": "store",
    "store_garbage": "store",
    "store_silence": "store",
    "vanish": "client",
}
"""Quick kinds follow each other within a round, each chain beside the others; all other faults of a round happen at once."""

MAX_KILLS = 3  # in a round


def chain(fault: Fault) -> str:
    """Faults of equal chains are injected one after the other."""
    return CHAINS.get(fault.kind, str(fault))


def possible(targets: Targets) -> dict[str, Sequence[str]]:
    """Targets of each kind of fault."""
    return {
        kind: names
        for kind, names in {
            "kill": targets.engines,
            "kill_scheduler": ("scheduler",),
            "kill_http": ("http",) if targets.http else (),
            "kill_node": targets.hosts,
            "kill_store": ("store",) if targets.store else (),
            "hang": targets.engines,
            "hang_for_good": targets.engines,
            "cut": targets.links,
            "slow": targets.links,
            "flap": targets.links,
            "store_errors": ("store",) if targets.store else (),
            "store_garbage": ("store",) if targets.store else (),
            "store_silence": ("store",) if targets.store else (),
            "vanish": ("clients",),
        }.items()
        if names
    }


def schedule(targets: Targets, count: int, seed: int, per_round: int = 40, only: Sequence[str] = ()) -> Iterator[tuple[Fault, ...]]:
    """`count` faults in rounds: those of a round overlap, and all are repaired before the next round begins.

    Raises ValueError when none of the kinds in `only` is possible.
    """
    chance = random.Random(seed)
    kinds = {kind: names for kind, names in possible(targets).items() if not only or kind in only}
    if not kinds:
        raise ValueError(f"none of {', '.join(only)} is possible here; there are {', '.join(possible(targets))}")
    while count > 0:
        chosen: list[Fault] = []
        for _ in range(min(count, chance.randint(1, per_round))):
            fault = _draw(chance, kinds)
            if _fits(fault, chosen):
                chosen.append(fault)
        count -= len(chosen)
        yield tuple(chosen)


def _draw(chance: random.Random, kinds: dict[str, Sequence[str]]) -> Fault:
    (kind,) = chance.choices(list(kinds), [WEIGHTS[kind] for kind in kinds])
    phase = chance.choice(PHASES) if kind.startswith(("kill", "hang")) and kind != "kill_http" else ""
    hold_s = 0.0 if kind in ("kill", "vanish") else round(chance.uniform(0.3, 2.0), 2)
    return Fault(kind, chance.choice(list(kinds[kind])), phase, hold_s)


def _fits(fault: Fault, chosen: Sequence[Fault]) -> bool:
    """Two faults of a round that happen at the same time do not touch the same process."""
    if fault.kind in ALONE and any(other.kind in ALONE for other in chosen):
        return False
    kills = sum(other.kind not in CHAINS for other in chosen)
    if fault.kind not in CHAINS and kills >= MAX_KILLS:
        return False
    apart = [other for other in chosen if chain(other) != chain(fault)]
    return not any(_touches(fault, other) for other in apart)


def _touches(one: Fault, other: Fault) -> bool:
    if "kill_node" in (one.kind, other.kind):
        return _host(one) == _host(other) or {one.kind, other.kind} <= {"kill_node", "hang"}
    return one.target == other.target and one.kind != "vanish"


def _host(fault: Fault) -> str:
    """Where the target runs, as far as its name says. (After a node was lost, decode nodes may run elsewhere.)"""
    name = fault.target.removeprefix("prefill-").removeprefix("decode-")
    return name.partition("-")[0]
