"""Load or recompute, rebalancing, scaling and the P/D range."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from policies.baselines import SYSTEMS
from policies.load_or_recompute import blocks_to_load
from policies.pd_ratio import ratio_limits, violations
from policies.rebalancing import rebalance
from policies.scaling import RoleLoad, ScalingLimits, decide_scaling, wanted_nodes


def test_loads_all_when_storage_is_fast_and_nothing_when_it_is_slow() -> None:
    assert blocks_to_load(100, 64, 64, lambda n: 0.001 * n, lambda c, n: 0.01 * n) == 100
    assert blocks_to_load(100, 64, 64, lambda n: 10.0 * n, lambda c, n: 0.01 * n) == 0


def test_loads_a_part_when_the_last_blocks_come_late() -> None:
    late = blocks_to_load(100, 64, 64, lambda n: 0.001 * n + max(0, n - 58) * 1.0, lambda c, n: 0.001 * n)
    assert late == 58  # between the coarse steps


@given(hits=st.integers(0, 400), new=st.integers(1, 2000), read=st.floats(0.0001, 1.0), compute=st.floats(1e-6, 0.01))
def test_never_worse_than_all_or_nothing(hits: int, new: int, read: float, compute: float) -> None:
    def total(blocks: int) -> float:
        return read * blocks + compute * ((hits - blocks) * 64 + new)

    chosen = blocks_to_load(hits, new, 64, lambda n: read * n, lambda c, n: compute * n)
    assert 0 <= chosen <= hits
    assert total(chosen) <= min(total(0), total(hits)) + 1e-9


def test_moves_work_to_the_idle_engine_and_stops() -> None:
    moves = rebalance({"a": 10.0, "b": 0.0}, {"a": [("r1", 3.0), ("r2", 3.0), ("r3", 3.0)]}, move_cost=0.1)
    assert [(m.request_id, m.source, m.target) for m in moves] == [("r3", "a", "b")]


def test_a_costly_move_is_not_made() -> None:
    assert rebalance({"a": 5.0, "b": 1.0}, {"a": [("r", 1.0)]}, move_cost=4.0) == []


@given(
    st.dictionaries(st.sampled_from("abcde"), st.lists(st.floats(0.1, 5.0), max_size=6), min_size=2),
    st.floats(0.0, 1.0),
)
@example({"a": [], "b": [], "c": [4.0, 5.0, 1.0, 1.0, 5.0]}, 0.0)  # a large request after small ones makes the receiver the fuller one
def test_no_ping_pong(queues: dict[str, list[float]], cost: float) -> None:
    movable = {engine: [(f"{engine}{i}", work) for i, work in enumerate(works)] for engine, works in queues.items()}
    visited: dict[str, set[str]] = {}
    for _ in range(50):
        load = {engine: sum(work for _, work in queue) for engine, queue in movable.items()}
        moves = rebalance(load, movable, cost)
        if not moves:
            break
        for move in moves:
            before = max(load.values())
            entry = next(item for item in movable[move.source] if item[0] == move.request_id)
            movable[move.source].remove(entry)
            movable[move.target].append(entry)
            load = {engine: sum(work for _, work in queue) for engine, queue in movable.items()}
            assert max(load.values()) <= before + 1e-9
            assert move.target not in visited.setdefault(move.request_id, {move.source}) or len(visited[move.request_id]) > 2
            visited[move.request_id].add(move.target)
    else:
        pytest.fail("rebalancing does not end")


def test_paper_range() -> None:
    limits = ratio_limits(8, 50e9, 50e9, 500e9)
    assert (limits.least, limits.most) == (pytest.approx(1 / 7), pytest.approx(3.5))
    assert limits.prefill_nic_ok and limits.prefill_memory_ok
    assert violations(1, 2, 8, 50e9, 50e9, 500e9) == []


def test_violated_rows_are_named() -> None:
    assert any("decode NIC in" in row for row in violations(4, 1, 8, 50e9, 50e9, 5000e9))
    assert any("decode memory" in row for row in violations(4, 1, 8, 50e9, 50e9, 500e9))
    assert any("prefill NIC in" in row for row in violations(1, 8, 8, 50e9, 50e9, 500e9))
    assert any("prefill NIC out" in row for row in violations(1, 1, 8, 250e9, 50e9, 5000e9))  # s = 5: within g, above g / 2
    empty = ratio_limits(4, 100e9, 50e9, 500e9)
    assert empty.least > empty.most


def test_cold_samples_change_nothing() -> None:
    assert wanted_nodes(RoleLoad(2, 0.99, 60.0, 3), ScalingLimits()) == 2


def test_grows_on_queue_time_and_shrinks_only_if_one_less_suffices() -> None:
    limits = ScalingLimits()
    assert wanted_nodes(RoleLoad(4, 0.95, 5.0, 100), limits) == 6
    assert wanted_nodes(RoleLoad(4, 0.50, 0.0, 100), limits) == 3
    assert wanted_nodes(RoleLoad(4, 0.60, 0.0, 100), limits) == 4  # 0.8 on three nodes
    assert wanted_nodes(RoleLoad(1, 0.0, 0.0, 100), limits) == 1


def test_role_switch_replaces_adding_and_removing() -> None:
    decision = decide_scaling(RoleLoad(4, 0.3, 0.0, 100), RoleLoad(2, 0.9, 3.0, 100), ScalingLimits())
    assert (decision.prefill_nodes, decision.decode_nodes, decision.switch) == (3, 3, 1)
    back = decide_scaling(RoleLoad(2, 0.9, 3.0, 100), RoleLoad(4, 0.3, 0.0, 100), ScalingLimits())
    assert back.switch == -1


@given(st.integers(1, 50), st.floats(0.0, 1.0), st.floats(0.0, 10.0))
def test_scaling_down_never_causes_scaling_up(nodes: int, utilisation: float, queue: float) -> None:
    limits = ScalingLimits()
    wanted = wanted_nodes(RoleLoad(nodes, utilisation, queue, 100), limits)
    if wanted < nodes:
        after = utilisation * nodes / wanted
        assert wanted_nodes(RoleLoad(wanted, min(1.0, after), queue, 100), limits) <= wanted


def test_paper_systems_are_named() -> None:
    assert SYSTEMS["basic"].read_mode == "prefill_only" and not SYSTEMS["basic"].layerwise
    assert SYSTEMS["ours"].read_mode == "shorter_queue" and SYSTEMS["ours"].layerwise
    assert SYSTEMS["oracle"].zero_io
