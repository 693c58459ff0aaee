"""The decision core: rules of the paper's section 6, accounting, and events in any order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from policies.batch_quota import AttentionTimeModel
from policies.core import SchedulerCore
from policies.errors import Infeasible, PolicyError, QueueFull
from policies.settings import SchedulingSettings
from tests.policies.cluster import cluster, demand, engine, node


def test_head_goes_to_the_engine_with_fewest_tokens() -> None:
    core = cluster(per_node=2)
    core.submit(demand("a", prompt=5000))
    core.submit(demand("b", prompt=100))
    core.submit(demand("c", prompt=100))
    first, second, third = core.decide(0.0)
    assert first.prefill_engine != second.prefill_engine
    assert third.prefill_engine == second.prefill_engine  # 100 tokens there against 5000


def test_a_burst_does_not_herd_before_the_next_report() -> None:
    core = cluster(per_node=8, free=10_000)
    for i in range(8):
        core.submit(demand(f"r{i}"))
    made = core.decide(0.0)
    assert len({a.prefill_engine for a in made}) == 8
    assert len({a.decode_engine for a in made}) == 8


def test_a_draining_node_finishes_its_requests_and_gets_no_more() -> None:
    core = cluster(prefill_nodes=2, decode_nodes=2, per_node=1, read_mode="pool", free=100_000)
    for i in range(4):
        core.submit(demand(f"old{i}"))
    old = core.decide(0.0)
    assert {a.prefill_node for a in old} == {"p0", "p1"}
    core.drain_node("p1")
    core.drain_node("d1")
    for i in range(6):
        core.submit(demand(f"new{i}", hit_blocks=15))
    new = core.decide(0.0)
    assert len(new) == 6
    assert {(a.prefill_node, a.decode_node) for a in new} == {("p0", "d0")}
    assert {segment.node_id for a in new for segment in a.read_plan.segments} <= {"p0", "d0"}
    assert core.node_requests("p1") and core.node_requests("d1")
    for a in old:
        core.prefill_done(a.request_id)
    assert not core.node_requests("p1")
    for a in old:
        core.finish(a.request_id)
    assert not core.node_requests("d1")
    core.resume_node("p1")
    core.submit(demand("after"))
    assert core.decide(0.0)[0].prefill_node == "p1"


def test_the_role_that_holds_up_the_queue_is_known() -> None:
    core = cluster(per_node=1, beta_tokens=500, free=100_000)
    for i in range(3):
        core.submit(demand(f"r{i}"))
    core.decide(0.0)
    assert core.blocked_on == "prefill"
    core = cluster(per_node=1, free=2000)
    for i in range(3):
        core.submit(demand(f"r{i}"))
    core.decide(0.0)
    assert core.blocked_on == "decode"
    for i in range(3):
        core.cancel(f"r{i}")
    core.decide(0.0)
    assert core.blocked_on is None


def test_short_read_queue_comes_before_fewer_tokens() -> None:
    core = cluster(prefill_nodes=2, per_node=1, alpha_tokens=1000)
    core.update_node(node("p0", read_queue_tokens=5000))
    core.update_engine(engine("p1e0", "p1", "prefill", unfinished_tokens=700))
    core.submit(demand("a"))
    assert core.decide(0.0)[0].prefill_engine == "p1e0"


@pytest.mark.parametrize(("queued", "chosen"), [(1000, "p0e0"), (1001, "p1e0")])
def test_a_read_queue_is_long_from_the_first_token_above_alpha(queued: int, chosen: str) -> None:
    core = cluster(prefill_nodes=2, per_node=1, alpha_tokens=1000)
    core.update_node(node("p0", read_queue_tokens=queued))
    core.update_engine(engine("p1e0", "p1", "prefill", unfinished_tokens=1))
    core.submit(demand("a"))
    assert core.decide(0.0)[0].prefill_engine == chosen


def test_long_queue_class_serves_when_the_short_one_is_overloaded() -> None:
    core = cluster(prefill_nodes=2, per_node=1, alpha_tokens=1000, beta_tokens=2000)
    core.update_node(node("p0", read_queue_tokens=5000))
    core.update_engine(engine("p1e0", "p1", "prefill", unfinished_tokens=2001))
    core.submit(demand("a"))
    assert core.decide(0.0)[0].prefill_engine == "p0e0"


def test_stops_when_every_prefill_engine_is_overloaded_and_goes_on_after_prefill() -> None:
    core = cluster(per_node=1, beta_tokens=1500, free=100_000)
    for i in range(4):
        core.submit(demand(f"r{i}"))
    assert [a.request_id for a in core.decide(0.0)] == ["r0", "r1"]  # 0 and 1000 tokens are within beta, 2000 are not
    core.prefill_done("r0")
    assert [a.request_id for a in core.decide(0.0)] == ["r2"]


def test_decode_waits_for_memory() -> None:
    core = cluster(per_node=1, free=2500)
    for i in range(3):
        core.submit(demand(f"r{i}"))
    assert [a.request_id for a in core.decide(0.0)] == ["r0", "r1"]  # 1152 tokens each
    core.finish("r1")
    assert [a.request_id for a in core.decide(0.0)] == ["r2"]


def test_decode_waits_for_staging_slots() -> None:
    core = cluster(per_node=1, free=100_000)
    core.update_node(node("d0", slots=20))
    core.submit(demand("a"))
    core.submit(demand("b"))
    assert [a.request_id for a in core.decide(0.0)] == ["a"]  # 16 slots each
    core.prefill_done("a")
    assert [a.request_id for a in core.decide(0.0)] == ["b"]


def test_decode_prefers_fewest_requests_below_z_and_fewest_tokens_above() -> None:
    core = cluster(per_node=2, free=100_000)
    core.update_engine(engine("d0e0", "d0", "decode", free=90_000, unfinished_requests=1, unfinished_tokens=10_000))
    core.update_engine(engine("d0e1", "d0", "decode", free=96_000, unfinished_requests=9, unfinished_tokens=4000))
    core.submit(demand("a", prompt=2000))  # Z = 1.05 * (2112 + 14000) / 2 = 8459: only e1 is low-token
    assert core.decide(0.0)[0].decode_engine == "d0e1"
    core.submit(demand("b", prompt=8000))  # Z = 1.05 * (8128 + 16112) / 2 = 12726: both are high-token, e1 has fewer tokens
    assert core.decide(0.0)[0].decode_engine == "d0e1"
    core.update_engine(engine("d0e1", "d0", "decode", free=85_760, unfinished_requests=11, unfinished_tokens=14_240))
    core.submit(demand("c", prompt=30))  # Z = 1.05 * (192 + 24240) / 2 = 12827: only e0 is low-token now
    assert core.decide(0.0)[0].decode_engine == "d0e0"


def test_fewest_requests_wins_among_low_token_engines() -> None:
    core = cluster(per_node=2, free=100_000)
    core.update_engine(engine("d0e0", "d0", "decode", free=96_000, unfinished_requests=1, unfinished_tokens=4000))
    core.update_engine(engine("d0e1", "d0", "decode", free=96_100, unfinished_requests=9, unfinished_tokens=3900))
    core.submit(demand("a", prompt=30))  # Z = 1.05 * (192 + 7900) / 2 = 4248: both are low-token
    assert core.decide(0.0)[0].decode_engine == "d0e0"


def test_an_engine_without_the_memory_is_passed_over() -> None:
    core = cluster(per_node=2, free=100_000)
    core.update_engine(engine("d0e0", "d0", "decode", free=500, unfinished_requests=0, unfinished_tokens=0))
    core.update_engine(engine("d0e1", "d0", "decode", free=50_000, unfinished_requests=9, unfinished_tokens=50_000))
    core.submit(demand("a"))
    assert core.decide(0.0)[0].decode_engine == "d0e1"


@pytest.mark.parametrize(("free", "chosen"), [(1152, "d0e0"), (1151, "d0e1")])
def test_memory_must_hold_the_request_to_its_last_token(free: int, chosen: str) -> None:
    """However much less than others an engine has to do: prompt and answer are 1,100 tokens, in 18 blocks."""
    core = cluster(per_node=2)
    core.update_engine(engine("d0e0", "d0", "decode", free))
    core.update_engine(engine("d0e1", "d0", "decode", 20_000, unfinished_requests=5, unfinished_tokens=5000))
    core.submit(demand("a"))
    assert core.decide(0.0)[0].decode_engine == chosen


def test_memory_promised_at_decode_is_free_until_prefill_ends() -> None:
    core = cluster(per_node=1, free=2000, hbm_promise="decode")
    core.submit(demand("a"))
    core.submit(demand("b"))
    core.submit(demand("c"))
    assert [a.request_id for a in core.decide(0.0)] == ["a", "b", "c"]
    core.submit(demand("d"))
    core.prefill_done("a")
    assert core.engine_account("d0e0").free_hbm_tokens == 2000 - 1152
    assert core.decide(0.0) == []
    core.finish("a")
    assert [a.request_id for a in core.decide(0.0)] == ["d"]


def test_group_with_least_tokens_first() -> None:
    core = cluster(decode_nodes=2, per_node=1, free=100_000)
    core.update_engine(engine("d0e0", "d0", "decode", free=90_000, unfinished_tokens=10_000))
    core.submit(demand("a"))
    assert core.decide(0.0)[0].decode_node == "d1"


def test_shorter_queue_reads() -> None:
    core = cluster(read_mode="shorter_queue", per_node=1, free=100_000)
    core.submit(demand("a"))
    core.submit(demand("b"))
    first, second = core.decide(0.0)
    assert first.read_plan.storage_blocks() == {"d0": 10}  # tie: the decode node
    assert second.read_plan.storage_blocks() == {"p0": 10}
    assert core.node_account("d0").read_tokens == 640
    core.reads_done("a")
    assert core.node_account("d0").read_tokens == 0


def test_queues_as_reported_leave_out_what_was_assigned_since() -> None:
    core = cluster(read_mode="shorter_queue", queue_view="reported", per_node=1, free=100_000)
    for name in "abc":
        core.submit(demand(name))
    assert [made.read_plan.storage_blocks() for made in core.decide(0.0)] == [{"d0": 10}] * 3
    core.update_node(node("d0", read_queue_tokens=1920))
    core.submit(demand("d"))
    assert core.decide(0.0)[0].read_plan.storage_blocks() == {"p0": 10}


def test_a_report_does_not_count_twice() -> None:
    core = cluster(read_mode="shorter_queue", per_node=1, free=100_000)
    core.submit(demand("a"))
    core.decide(0.0)
    core.update_node(node("d0", read_queue_tokens=640))
    core.update_engine(engine("p0e0", "p0", "prefill", unfinished_requests=1, unfinished_tokens=1000))
    core.update_engine(engine("d0e0", "d0", "decode", free=100_000 - 1152, unfinished_requests=1, unfinished_tokens=1152))
    assert core.node_account("d0").read_tokens == 640
    assert core.engine_account("p0e0").tokens == 1000
    assert core.engine_account("d0e0").free_hbm_tokens == 100_000 - 1152


def test_work_of_unknown_origin_counts_until_a_report_says_otherwise() -> None:
    core = cluster(per_node=1)
    core.update_engine(engine("p0e0", "p0", "prefill", unfinished_requests=3, unfinished_tokens=900))
    assert core.engine_account("p0e0").tokens == 900
    core.update_engine(engine("p0e0", "p0", "prefill"))
    assert core.engine_account("p0e0").tokens == 0


def test_silent_engines_and_gateways_get_nothing() -> None:
    core = cluster(prefill_nodes=2, per_node=1, report_timeout_s=5.0, free=100_000)
    core.update_node(node("d0", at=20.0))
    core.update_engine(engine("d0e0", "d0", "decode", 100_000, at=20.0))
    core.update_node(node("p1", at=20.0))
    core.submit(demand("a"))
    assert core.decide(20.0) == []
    core.update_engine(engine("p1e0", "p1", "prefill", at=20.0))
    assert core.decide(20.0)[0].prefill_engine == "p1e0"


def test_removed_engine_returns_its_requests_and_keeps_no_account() -> None:
    core = cluster(per_node=1, free=100_000, read_mode="prefill_only")
    core.submit(demand("a"))
    core.submit(demand("b"))
    core.decide(0.0)
    core.prefill_done("a")
    assert core.remove_engine("p0e0") == ["b"]
    assert core.node_account("p0").read_tokens == 0
    assert core.engine_account("d0e0").requests == 1
    assert core.remove_engine("p0e0") == []


def test_removed_node_returns_every_request_it_took_part_in() -> None:
    core = cluster(per_node=1, free=100_000, read_mode="split")
    core.submit(demand("a", prompt=5000, hit_blocks=70))
    core.decide(0.0)
    assert core.remove_node("d0") == ["a"]
    assert core.running == 0
    assert core.engine_account("p0e0").tokens == 0


@pytest.mark.parametrize("gone", ["lost", "draining", "silent"])
def test_blocks_in_the_memory_of_a_node_that_is_gone_are_read_from_storage(gone: str) -> None:
    """It held them when the request was submitted, and the request had to wait."""
    core = cluster(2, 2)
    core.submit(demand("a", hit_blocks=15, resident={"d1": range(15)}))
    if gone == "lost":
        core.remove_node("d1")
    elif gone == "draining":
        core.drain_node("d1")
    for name in ("p0", "p1", "d0"):  # d1 has fallen silent if nothing else
        core.update_node(node(name, at=100.0))
        for engine_id in core.node_account(name).engine_ids:
            core.update_engine(replace(core.engine_account(engine_id).load, reported_at=100.0))
    (assignment,) = core.decide(100.0)
    assert {segment.source for segment in assignment.read_plan.segments} == {"storage"}
    assert assignment.read_plan.blocks == 15


def test_resubmitted_request_keeps_its_place() -> None:
    core = cluster(per_node=1, beta_tokens=1)
    core.submit(demand("late", arrived=2.0))
    core.submit(demand("early", arrived=1.0))
    assert core.decide(0.0)[0].request_id == "early"


def test_round_robin_takes_turns_and_least_requests_counts_requests() -> None:
    core = cluster(prefill_nodes=2, per_node=2, placement="round_robin", free=100_000)
    for i in range(8):
        core.submit(demand(f"r{i}", prompt=100 + 1000 * (i % 2)))
    order = [a.prefill_engine for a in core.decide(0.0)]
    assert sorted(order[:4]) == sorted(order[4:]) and len(set(order[:4])) == 4
    least = cluster(per_node=2, placement="least_requests", free=100_000)
    for i in range(4):
        least.submit(demand(f"r{i}", prompt=100 + 3000 * (i % 2)))
    counts = [a.prefill_engine for a in least.decide(0.0)]
    assert counts.count("p0e0") == counts.count("p0e1") == 2


def test_refusals() -> None:
    core = cluster(per_node=1, free=2000, max_queued_requests=1)
    with pytest.raises(Infeasible, match="decode pool holds 2000"):
        core.submit(demand("big", prompt=5000))
    with pytest.raises(Infeasible, match="must be computed"):
        core.submit(replace(demand("hit"), prompt_tokens=640))
    core.submit(demand("a"))
    with pytest.raises(PolicyError, match="already"):
        core.submit(demand("a"))
    with pytest.raises(QueueFull):
        core.submit(demand("b"))


def test_infeasible_by_staging() -> None:
    core = cluster(per_node=1, free=100_000)
    for name in ("d0", "p0"):
        core.update_node(node(name, slots=10))
    with pytest.raises(Infeasible, match="staging slots"):
        core.submit(demand("a"))


def test_expire_and_cancel() -> None:
    core = SchedulerCore(SchedulingSettings())
    core.submit(demand("a", deadline=1.0))
    core.submit(demand("b", deadline=9.0))
    core.submit(demand("c", deadline=9.0))
    assert core.expire(5.0) == ["a"]
    assert core.cancel("b") and not core.cancel("b")
    assert core.queued == 1


def test_adopt_restores_the_account_of_a_running_request() -> None:
    before = cluster(per_node=1, free=100_000)
    before.submit(demand("a"))
    assignment = before.decide(0.0)[0]
    after = cluster(per_node=1, free=100_000)
    after.adopt(demand("a"), assignment)
    assert after.engine_account("p0e0").tokens == before.engine_account("p0e0").tokens
    assert after.cancel("a")
    assert after.engine_account("d0e0").tokens == 0


def test_tenants_take_turns_and_priority_orders_within_one() -> None:
    core = cluster(per_node=8, free=1_000_000, tenant_quantum_tokens=2304)  # two requests of 1152 tokens
    for i in range(6):
        core.submit(demand(f"many{i}", tenant="many", arrived=float(i)))
    for i in range(3):
        core.submit(demand(f"few{i}", tenant="few", arrived=10.0 + i))
    core.submit(demand("urgent", tenant="few", arrived=20.0, priority=1))
    order = [made.request_id for made in core.decide(0.0)]
    assert order == ["many0", "many1", "urgent", "few0", "many2", "many3", "few1", "few2", "many4", "many5"]


def test_least_slack_goes_first_and_large_requests_have_less() -> None:
    core = cluster(per_node=8, free=1_000_000, prefill_token_s=1e-3)
    core.submit(demand("short", prompt=1000, hit_blocks=0, arrived=0.0, deadline=20.0))
    core.submit(demand("long", prompt=5000, hit_blocks=0, arrived=1.0, deadline=21.0))  # must begin by 16, not by 19
    core.submit(demand("late", arrived=2.0, deadline=50.0))
    assert [made.request_id for made in core.decide(0.0)] == ["long", "short", "late"]


def test_hits_that_a_busy_store_delivers_late_are_recomputed() -> None:
    size = 64 * 1000
    core = cluster(per_node=1, free=1_000_000, read_mode="prefill_only", recompute=True, prefill_token_s=1e-4)
    core.submit(demand("quick", prompt=3000, hit_blocks=40, block_bytes=size))  # 1e9 B/s: 64 us per block, 6.4 ms to compute it
    assert core.decide(0.0)[0].read_plan.blocks == 40
    core.update_node(node("p0", read_queue_tokens=64 * 100_000))  # 6.4 s of reading in front
    core.submit(demand("late", prompt=3000, hit_blocks=40, block_bytes=size))
    made = core.decide(0.0)[0]
    assert made.read_plan.blocks == 0
    account = core.engine_account("p0e0")
    assert account.accounted_s == pytest.approx((3000 - 40 * 64) * 1e-4 + 3000 * 1e-4)
    core.finish("quick")
    core.finish("late")
    assert account.accounted_s == 0.0 and core.node_account("p0").accounted_read_tokens == 0


def test_what_an_engine_has_measured_decides_and_before_that_all_hits_are_loaded() -> None:
    core = cluster(per_node=1, free=1_000_000, read_mode="prefill_only", recompute=True)
    core.update_node(node("p0", read_queue_tokens=64 * 100_000))  # 6.4 s of reading in front
    core.submit(demand("before", prompt=3000, hit_blocks=40, block_bytes=64 * 1000))
    assert core.decide(0.0)[0].read_plan.blocks == 40
    core.prefill_done("before")
    for seconds, loaded in ((1e-4, 0), (1e-1, 40)):
        core.update_engine(engine("p0e0", "p0", "prefill", prefill_cost=AttentionTimeModel(0.0, seconds)))
        core.submit(demand(f"{seconds}", prompt=3000, hit_blocks=40, block_bytes=64 * 1000))
        assert core.decide(0.0)[0].read_plan.blocks == loaded
        core.prefill_done(f"{seconds}")
    assert core.engine_account("p0e0").accounted_s == 0.0


def test_unstarted_requests_of_an_engine_that_fell_behind_are_asked_back_once() -> None:
    core = cluster(per_node=2, free=1_000_000, rebalance=True)
    for i in range(8):
        core.submit(demand(f"r{i}", arrived=float(i)))
    slow = [made.request_id for made in core.decide(0.0) if made.prefill_engine == "p0e0"]
    assert core.moves() == []
    for i in range(8):
        if f"r{i}" not in slow:
            core.prefill_done(f"r{i}")
    asked = core.moves()
    assert [(move.request_id, move.source, move.target) for move in asked] == [(name, "p0e0", "p0e1") for name in (slow[3], slow[2])]
    assert core.moves() == [], "one round at a time"
    for move in asked:
        core.finish(move.request_id)
        core.submit(demand(move.request_id))
    assert [made.prefill_engine for made in core.decide(0.0)] == ["p0e1", "p0e1"]


class CoreMachine(RuleBasedStateMachine):
    """Random submissions, events and failures: nothing is lost, doubled or over-promised."""

    def __init__(self) -> None:
        super().__init__()
        self.core = cluster(
            prefill_nodes=2,
            decode_nodes=2,
            per_node=2,
            free=8000,
            beta_tokens=3000,
            read_mode="pool",
            min_split_blocks=1,
            rebalance=True,
            rebalance_hysteresis=0.0,
            recompute=True,
            prefill_token_s=1e-4,
            tenant_quantum_tokens=3000,
        )
        self.waiting: dict[str, object] = {}
        self.running: dict[str, object] = {}
        self.alive = {"p0e0": "p0", "p0e1": "p0", "p1e0": "p1", "p1e1": "p1", "d0e0": "d0", "d0e1": "d0", "d1e0": "d1", "d1e1": "d1"}
        self.count = 0

    @rule(prompt=st.integers(1, 4000), hits=st.integers(0, 62), priority=st.integers(0, 2), tenant=st.sampled_from("ab"))
    def submit(self, prompt: int, hits: int, priority: int, tenant: str) -> None:
        self.count += 1
        request = demand(
            f"r{self.count}", prompt, hits, float(self.count), priority=priority, tenant=tenant, block_bytes=[0, 10_000_000][self.count % 2]
        )
        self.core.submit(request)
        self.waiting[request.request_id] = request

    @rule()
    def decide(self) -> None:
        believed = {e: self.core.engine_account(e).tokens for e in self.alive if e.startswith("p")}
        for made in self.core.decide(0.0):
            request = self.waiting.pop(made.request_id)
            assert made.prefill_engine in self.alive and made.decode_engine in self.alive
            assert believed[made.prefill_engine] <= 3000
            believed[made.prefill_engine] += request.prompt_tokens  # type: ignore[attr-defined]
            positions = [p for s in made.read_plan.segments for p in range(s.first_block, s.first_block + s.blocks)]
            assert positions == list(range(len(positions)))  # a prefix of the hits, each block once
            limit = request.hit_blocks  # type: ignore[attr-defined]
            assert len(positions) <= limit if request.block_bytes else len(positions) == limit  # type: ignore[attr-defined]
            self.running[made.request_id] = made

    @precondition(lambda self: self.running)
    @rule(data=st.data(), event=st.sampled_from(["reads_done", "prefill_done", "finish", "cancel"]))
    def event(self, data: st.DataObject, event: str) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        getattr(self.core, event)(request_id)
        if event in ("finish", "cancel"):
            del self.running[request_id]

    @rule(given_back=st.booleans())
    def rebalance(self, given_back: bool) -> None:
        for move in self.core.moves():
            assert move.source != move.target
            assert self.running[move.request_id].prefill_engine == move.source  # type: ignore[attr-defined]
            if given_back:
                assert self.core.finish(move.request_id)
                del self.running[move.request_id]
                request = demand(move.request_id, 1000)
                self.core.submit(request)
                self.waiting[move.request_id] = request

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel_waiting(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.core.cancel(request_id)
        del self.waiting[request_id]

    @rule(engine_id=st.sampled_from(["p0e0", "p1e1", "d0e0", "d1e1"]))
    def die_and_return(self, engine_id: str) -> None:
        for request_id in self.core.remove_engine(engine_id):
            del self.running[request_id]
        free = 8000 if engine_id.startswith("d") else 0
        self.core.update_engine(engine(engine_id, engine_id[:2], "decode" if free else "prefill", free))

    @rule(name=st.sampled_from(["p0", "d1"]))
    def node_dies_and_returns(self, name: str) -> None:
        for request_id in self.core.remove_node(name):
            del self.running[request_id]
        self.core.update_node(node(name))
        for engine_id, home in self.alive.items():
            if home == name:
                role = "decode" if name.startswith("d") else "prefill"
                self.core.update_engine(engine(engine_id, name, role, 8000 if role == "decode" else 0))

    @invariant()
    def nothing_is_lost_or_over_promised(self) -> None:
        assert self.core.queued == len(self.waiting)
        assert self.core.running == len(self.running)
        for engine_id in self.alive:
            if engine_id.startswith("d"):
                assert 0 <= self.core.engine_account(engine_id).accounted_tokens <= 8000

    def teardown(self) -> None:
        for request_id in [*self.running, *self.waiting]:
            assert self.core.cancel(request_id)
        for engine_id, home in self.alive.items():
            assert self.core.engine_account(engine_id).accounted_tokens == 0
            assert self.core.engine_account(engine_id).accounted_s == 0.0
            assert self.core.node_account(home).accounted_read_tokens == 0
            assert self.core.node_account(home).accounted_slots == 0


TestCoreMachine = CoreMachine.TestCase
TestCoreMachine.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_node_that_has_not_measured_its_bandwidth_takes_part_in_the_pool() -> None:
    core = cluster(prefill_nodes=1, decode_nodes=1, per_node=1, read_mode="pool", free=100_000, pool_width=2)
    for node_id in ("p0", "d0", *(f"x{index}" for index in range(8))):
        core.update_node(node(node_id, read_queue_tokens=10_000))
    core.update_node(node("new", snic_bandwidth=0.0, read_queue_tokens=10))
    core.submit(demand("a", hit_blocks=15))
    (assignment,) = core.decide(0.0)
    assert [segment.node_id for segment in assignment.read_plan.segments] == ["new"]


def test_sides_in_turn_and_engines_in_turn_use_every_storage_nic() -> None:
    core = cluster(2, 4, per_node=1, read_mode="alternate", placement="round_robin")
    for i in range(16):
        core.submit(demand(f"r{i}", prompt=129, hit_blocks=2))
    reads = Counter(segment.node_id for made in core.decide(0.0) for segment in made.read_plan.segments)
    assert reads == {"p0": 4, "p1": 4, "d0": 2, "d1": 2, "d2": 2, "d3": 2}
