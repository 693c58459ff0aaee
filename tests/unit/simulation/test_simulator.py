"""Small runs of every system: conservation, order of the systems, and the parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation.cluster_spec import ClusterSpec, parse_nodes
from dualpath_ray.simulation.curves import DecodeCurve, PrefillCurve, interpolate
from dualpath_ray.simulation.decode_group import DecodeGroup
from dualpath_ray.simulation.events import EventLoop
from dualpath_ray.simulation.link import Link
from dualpath_ray.simulation.measurements import max_over_mean
from dualpath_ray.simulation.model_spec import (
    MeasuredModel,
    ModelSpec,
    attention_kv_token_bytes,
    dense_spec,
    latent_kv_token_bytes,
    model_spec,
)
from dualpath_ray.simulation.network import FairNetwork, QueuedNetwork, fair_rates
from dualpath_ray.simulation.node_spec import NodeSpec
from dualpath_ray.simulation.round_state import RoundState
from dualpath_ray.simulation.simulator import Simulator
from dualpath_ray.simulation.workload import Trajectory, agents, paper_set
from policies.baselines import SYSTEMS
from policies.vocabulary import Assignment, ReadPlan

TINY = ModelSpec(
    "tiny", 4, 1000, 1e9, 0.0, PrefillCurve(((0.0, 0.01), (1000.0, 0.02)), 0.0, 0.5, 1e-6), DecodeCurve(((0.0, 0.01), (10.0, 0.02)), 0.0)
)
SMALL = ClusterSpec(prefill_nodes=1, decode_nodes=1, node=NodeSpec(gpus=2, hbm_bytes=10e9, hbm_reserved_bytes=0.0, snic_bytes_per_s=1e8))


def small_run(mode: str, count: int = 20, cluster: ClusterSpec = SMALL) -> Simulator:
    simulator = Simulator(TINY, cluster, SYSTEMS[mode], agents([Trajectory(((2000, 20), (300, 15), (50, 1), (10, 40)))], count))
    simulator.run()
    return simulator


@pytest.mark.parametrize("mode", list(SYSTEMS))
def test_every_turn_ends_exactly_once_and_nothing_stays_accounted(mode: str) -> None:
    simulator = small_run(mode)
    assert simulator.agents_left == 0
    assert len(simulator.results.arrived) == 20 * 4 + 19  # copies have one more turn
    assert simulator._core.running == simulator._core.queued == 0
    assert all(engine.free_tokens == engine.free_tokens for engine in simulator._prefill_engines.values())
    for name in ("p0", "d0"):
        assert simulator._core.node_account(name).read_tokens == 0
        assert simulator._core.node_account(name).accounted_slots == 0


def test_runs_repeat_exactly() -> None:
    assert small_run("split").finished_at == small_run("split").finished_at


def test_storage_bound_systems_come_in_the_right_order() -> None:
    times = {mode: small_run(mode, 60).finished_at for mode in ("oracle", "split", "shorter_queue", "layerwise", "basic")}
    assert times["oracle"] < times["split"] <= 1.005 * times["shorter_queue"]
    assert times["shorter_queue"] < times["layerwise"] <= 1.005 * times["basic"]


def test_reads_herd_on_one_node_when_queues_are_known_from_reports_only() -> None:
    together = ClusterSpec(**{**SMALL.model_dump(), "decode_nodes": 2})
    reported, accounted = (small_run(mode, 60, together) for mode in ("ours", "shorter_queue"))
    assert max_over_mean(reported.snics, reported.loop.now) > 1.1 * max_over_mean(accounted.snics, accounted.loop.now)


def test_basic_reads_on_the_prefill_node_only_and_dual_path_on_both() -> None:
    prefill, decode = small_run("basic").snics
    assert prefill.bytes > 0 and decode.bytes == 0
    prefill, decode = small_run("shorter_queue").snics
    assert 0.5 < prefill.bytes / decode.bytes < 2.0


def test_all_hit_bytes_are_read_once() -> None:
    for mode in ("basic", "ours", "split", "pool"):
        simulator = small_run(mode)
        results = simulator.results
        assert sum(link.bytes for link in simulator.snics) == pytest.approx(_hit_tokens(simulator) * 1000)
        assert results.persisted_bytes > 0


def _hit_tokens(simulator: Simulator) -> int:
    total = 0
    for trajectory in simulator._agents:
        context = 0
        for append, generation in trajectory.turns:
            total += context // 64 * 64
            context += append + generation
    return total


def test_tool_delays_lengthen_the_run() -> None:
    turns = ((100, 5), (10, 5))
    quick = Simulator(TINY, SMALL, SYSTEMS["ours"], [Trajectory(turns)]).run()
    slow = Simulator(TINY, SMALL, SYSTEMS["ours"], [Trajectory(turns, (7.0, 7.0))]).run()
    assert slow == pytest.approx(quick + 7.0, abs=0.5)


def test_arrivals_and_scales() -> None:
    run = Simulator(TINY, SMALL, SYSTEMS["ours"], [Trajectory(((100, 5),))], arrivals=[50.0], append_scale=2.0, generation_scale=3.0)
    assert run.run() > 50.0
    assert run.results.prompt_tokens == 200 and run.results.generated_tokens == 15


def test_hits_of_a_slow_store_are_recomputed_and_the_rest_is_read_once() -> None:
    slow = SMALL.model_copy(update={"node": SMALL.node.model_copy(update={"snic_bytes_per_s": 2e6})})
    fleet = agents([Trajectory(((2000, 20), (300, 15), (50, 1), (10, 40)))], 20)
    runs = [Simulator(TINY, slow, SYSTEMS["layerwise_scheduled"], fleet, scheduling={"recompute": on}) for on in (False, True)]
    load_all, either = [simulator.run() for simulator in runs]
    assert either < 0.8 * load_all
    assert 0 < sum(link.bytes for link in runs[1].snics) < _hit_tokens(runs[1]) * 1000


def test_unfetched_turns_of_an_engine_that_fell_behind_go_to_another() -> None:
    held = SMALL.model_copy(update={"node": SMALL.node.model_copy(update={"gpus": 4, "hbm_bytes": 1.012e9})})  # 12 K tokens: 4 turns
    fleet = [Trajectory(((2000 + 1000 * (i % 3), 20), (300, 15), (10, 40))) for i in range(40)]
    turns = {}
    for on in (False, True):
        simulator = Simulator(replace(TINY, lockstep=False), held, SYSTEMS["basic"], fleet, scheduling={"rebalance": on})
        turns[on] = simulator.run()
        assert len(simulator.results.arrived) == 120 and simulator._core.running == 0
        assert (simulator.results.moved > 0) is on
    assert turns[True] <= 1.02 * turns[False]


def test_a_session_may_begin_with_a_stored_context() -> None:
    simulator = Simulator(TINY, SMALL, SYSTEMS["ours"], [Trajectory(((100, 5), (10, 5)), context=640)])
    simulator.run()
    assert simulator.results.prompt_tokens == 740 + 755
    assert sum(link.bytes for link in simulator.snics) == (640 + 704) * 1000


def test_a_measured_model_is_what_its_figures_say() -> None:
    model = MeasuredModel(name="m", layers=2, kv_token_bytes=10, prefill_s=1.0, prefill_token_s=0.5, decode_s=0.2, decode_request_s=0.1)
    assert model_spec(model).prefill.seconds(4, 4, 0) == 3.0 and model_spec(model).decode.seconds(3, 0) == pytest.approx(0.4)


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        Simulator(model_spec("ds-660b"), ClusterSpec(prefill_nodes=1, decode_nodes=1), SYSTEMS["ours"], paper_set("32K", 4))


def test_node_strings_and_unknown_models() -> None:
    assert parse_nodes("48P96D") == (48, 96)
    for bad in ("0P1D", "1P0D", "PD", "1P1D "):
        with pytest.raises(ConfigError, match="nodes"):
            parse_nodes(bad)
    with pytest.raises(ConfigError, match="model"):
        model_spec("nonsense")


def test_kv_bytes_follow_from_geometry() -> None:
    assert attention_kv_token_bytes(64, 8, 128) == 262_144
    assert latent_kv_token_bytes(61, 128) == 78_324
    assert model_spec("qwen-32b").kv_token_bytes == 262_144
    with pytest.raises(ConfigError, match="hidden_size"):
        dense_spec("x", {"num_hidden_layers": 1})


def test_a_queued_link_serves_in_order() -> None:
    loop, ended = EventLoop(), []
    network, link, wide = QueuedNetwork(loop), Link(100.0, window_s=1.0), Link(1000.0)
    for size in (100.0, 50.0):
        network.transfer((link, wide), size, lambda name: ended.append((name, loop.now)), size, latency=0.5)
    loop.run()
    assert ended == [(100.0, 1.5), (50.0, 2.0)]
    assert link.windows[0] == pytest.approx(100.0) and link.windows[1] == pytest.approx(50.0)
    assert wide.bytes == 150.0
    assert max_over_mean([link, Link(100.0, window_s=1.0)], 2.0) == 2.0


def test_fair_transfers_share_a_link_and_the_slowest_link_limits() -> None:
    loop, ended = EventLoop(), {}
    network, nic, other = FairNetwork(loop), Link(100.0, window_s=1.0), Link(100.0)

    def start(what: tuple[str, tuple[Link, ...], float]) -> None:
        name, route, size = what
        network.transfer(route, size, lambda _: ended.setdefault(name, loop.now))

    loop.at(0.0, start, ("long", (nic,), 300.0))
    loop.at(1.0, start, ("short", (nic,), 50.0))
    loop.at(0.0, start, ("alone", (other,), 100.0))
    loop.run()
    assert ended == {"alone": pytest.approx(1.0), "short": pytest.approx(2.0), "long": pytest.approx(3.5)}
    assert nic.bytes == pytest.approx(350.0) and sum(nic.windows.values()) == pytest.approx(350.0)


def test_what_a_slow_link_leaves_goes_to_others_on_the_shared_one() -> None:
    """Two transfers share memory of 100; one can do 20 only, so the other gets 80 until the first has ended."""
    loop, ended = EventLoop(), {}
    memory, slow, fast = Link(100.0), Link(20.0), Link(90.0)
    network = FairNetwork(loop)
    for name, route in (("slow", (slow, memory)), ("fast", (fast, memory))):
        network.transfer(route, 100.0 if name == "slow" else 445.0, lambda name: ended.setdefault(name, loop.now), name)
    loop.run()
    assert ended == {"slow": pytest.approx(5.0), "fast": pytest.approx(5.0 + 45 / 90)}


@given(st.lists(st.tuples(st.sets(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 5)), min_size=1, max_size=8))
def test_rates_are_max_min_fair(routes: list[tuple[set[int], int]]) -> None:
    links = [Link(float(bandwidth)) for bandwidth in (10, 20, 30, 40, 1000)]
    wanted = {i: (tuple(links[j] for j in sorted(route)), count) for i, (route, count) in enumerate(routes)}
    rates = fair_rates(wanted)
    used = {link: sum(rates[i] * count for i, (route, count) in wanted.items() if link in route) for link in links}
    assert all(used[link] <= link.bandwidth * (1 + 1e-9) for link in links)
    for i, (route, _) in wanted.items():  # max-min: everyone has a full link on which nobody is faster
        assert any(
            used[link] >= link.bandwidth * (1 - 1e-9) and all(rates[j] <= rates[i] * (1 + 1e-9) for j in wanted if link in wanted[j][0])
            for link in route
        )


@pytest.mark.parametrize("mode", ["basic", "ours", "split"])
def test_fair_sharing_moves_the_same_bytes(mode: str) -> None:
    queued, fair = small_run(mode), small_run(mode, cluster=SMALL.model_copy(update={"sharing": "fair"}))
    assert sum(link.bytes for link in fair.snics) == pytest.approx(sum(link.bytes for link in queued.snics))
    assert fair.finished_at == pytest.approx(queued.finished_at, rel=0.2)
    assert fair.results.persisted_bytes == queued.results.persisted_bytes > 0


def test_collectives_come_before_kv_on_the_compute_nic() -> None:
    slow = SMALL.model_copy(update={"prefill_nodes": 2, "node": SMALL.node.model_copy(update={"cnic_bytes_per_s": 2e7})})
    chatty = replace(TINY, collective_token_bytes=5e4)
    agents_ = agents([Trajectory(((2000, 20), (300, 15), (50, 1), (10, 40)))], 20)
    alone, beside = (Simulator(model, slow, SYSTEMS["ours"], agents_) for model in (TINY, chatty))
    assert beside.run() > alone.run()


def test_interpolation_continues_the_last_slope() -> None:
    points = ((0.0, 1.0), (10.0, 2.0), (20.0, 4.0))
    assert [interpolate(points, x) for x in (0.0, 5.0, 15.0, 30.0)] == [1.0, 1.5, 3.0, 6.0]


def test_decode_group_counts_steps_and_waits_for_memory() -> None:
    loop, done = EventLoop(), []
    group = DecodeGroup(
        ["e"], 250, DecodeCurve(((0.0, 1.0), (10.0, 1.0)), 0.0), loop, lambda state: done.append((state.request_id, loop.now))
    )
    for i in range(3):
        state = RoundState(0, i, f"r{i}", 90, 0, 11, 0.0)
        state.assignment = Assignment(f"r{i}", "p", "p", "e", "d", ReadPlan())
        loop.at(float(i), group.join, state)
    loop.run()
    assert done == [("r0", 12.0), ("r1", 13.0), ("r2", 22.0)]  # r2 waits for r0's memory
