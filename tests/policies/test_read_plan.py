"""Read plans and water filling."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from policies.read_plan import ReadCandidate, plan_reads
from policies.water_filling import fill_level_shares
from tests.policies.cluster import demand

P = ReadCandidate("p", 0, 1.0, 10_000)
D = ReadCandidate("d", 0, 1.0, 10_000)


def test_prefill_only() -> None:
    plan = plan_reads(demand("a"), P, D, mode="prefill_only")
    assert plan.storage_blocks() == {"p": 10}


def test_shorter_queue_takes_one_side() -> None:
    assert plan_reads(demand("a"), P, ReadCandidate("d", 1, 1.0, 99)).storage_blocks() == {"p": 10}
    assert plan_reads(demand("a"), P, D).storage_blocks() == {"d": 10}


def test_shorter_queue_keeps_off_a_prefill_node_without_slots() -> None:
    assert plan_reads(demand("a"), ReadCandidate("p", 0, 1.0, 5), ReadCandidate("d", 1, 1.0, 0)).storage_blocks() == {"d": 10}


def test_split_ends_together() -> None:
    plan = plan_reads(demand("a", prompt=6410, hit_blocks=100), P, ReadCandidate("d", 64 * 20, 1.0, 0), mode="split")
    assert plan.storage_blocks() == {"p": 60, "d": 40}
    faster = plan_reads(demand("a", prompt=6410, hit_blocks=100), P, ReadCandidate("d", 0, 3.0, 0), mode="split")
    assert faster.storage_blocks() == {"p": 25, "d": 75}


def test_split_below_the_smallest_share_stays_on_one_side() -> None:
    plan = plan_reads(demand("a"), P, D, mode="split", min_split_blocks=8)
    assert len(plan.segments) == 1


def test_pool_uses_idle_third_nodes() -> None:
    busy = [ReadCandidate(name, 64 * 1000, 1.0, 99) for name in "pd"]
    plan = plan_reads(demand("a"), busy[0], busy[1], [ReadCandidate("x", 0, 1.0, 99)], mode="pool")
    assert plan.storage_blocks() == {"x": 10}


def test_resident_blocks_come_from_dram_first() -> None:
    request = demand("a", resident={"d": range(4), "p": frozenset({3, 4, 9}), "z": {5}})
    plan = plan_reads(request, P, D, mode="prefill_only")
    assert [(s.node_id, s.first_block, s.blocks, s.source) for s in plan.segments] == [
        ("d", 0, 4, "dram"),
        ("p", 4, 1, "dram"),
        ("z", 5, 1, "dram"),
        ("p", 6, 3, "storage"),
        ("p", 9, 1, "dram"),
    ]


@given(
    hits=st.integers(0, 80),
    queues=st.lists(st.integers(0, 20_000), min_size=4, max_size=4),
    rates=st.lists(st.floats(0.0, 10.0), min_size=4, max_size=4),
    slots=st.lists(st.integers(-5, 100), min_size=4, max_size=4),
    resident=st.dictionaries(st.sampled_from(["n0", "n1", "n9"]), st.frozensets(st.integers(0, 90)), max_size=3),
    mode=st.sampled_from(["prefill_only", "alternate", "shorter_queue", "split", "pool"]),
    smallest=st.integers(1, 20),
    same_node=st.booleans(),
)
@example(5, [0, 0, 0, 0], [0.0, 2.2250738585072014e-308, 0.0, 0.0], [1, 0, 0, 0], {}, "split", 1, False)  # a level beyond exact floats
def test_every_hit_block_exactly_once(hits, queues, rates, slots, resident, mode, smallest, same_node) -> None:  # type: ignore[no-untyped-def]
    nodes = [ReadCandidate(f"n{i}", q, r, s) for i, (q, r, s) in enumerate(zip(queues, rates, slots, strict=True))]
    request = demand("a", prompt=hits * 64 + 1, hit_blocks=hits, resident=resident)
    decode = nodes[0] if same_node else nodes[1]
    plan = plan_reads(request, nodes[0], decode, nodes[2:], mode, smallest)
    assert [p for s in plan.segments for p in range(s.first_block, s.first_block + s.blocks)] == list(range(hits))
    for segment in plan.segments:
        if segment.source == "dram":
            assert set(range(segment.first_block, segment.first_block + segment.blocks)) <= resident[segment.node_id]


@given(
    amount=st.integers(0, 500),
    sources=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 10)), min_size=1, max_size=6),
)
def test_shares_end_within_one_unit_of_the_optimum(amount: int, sources: list[tuple[int, int]]) -> None:
    queues, rates = [float(q) for q, _ in sources], [float(r) for _, r in sources]
    shares = fill_level_shares(amount, queues, rates, [amount] * len(sources))
    assert sum(shares) == amount and min(shares) >= 0
    if amount == 0:
        return
    used = [(queues[i] + share) / rates[i] for i, share in enumerate(shares) if share]
    ideal = _level(amount, queues, rates)
    assert max(used) <= ideal + 1 / min(rates) + 1e-6


def _level(amount: int, queues: list[float], rates: list[float]) -> float:
    """Bisection on the level, independent of the code under test."""
    low, high = 0.0, (max(queues) + amount) / min(rates)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(max(0.0, middle * r - q) for q, r in zip(queues, rates, strict=True)) < amount:
            low = middle
        else:
            high = middle
    return high
