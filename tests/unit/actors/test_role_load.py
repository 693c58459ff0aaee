"""From pictures of the scheduler's status to what scaling decides by."""

from __future__ import annotations

from typing import Any

import pytest

from actors.role_load import LoadWindow
from policies.scaling import RoleLoad, ScalingLimits, decide_scaling

LIMITS = ScalingLimits(least_samples=2, least_nodes=1, most_nodes=4)


def picture(at: float, busy: float = 0.0, decoding: int = 0, free: int = 1000, **fields: Any) -> dict[str, Any]:
    figures = {"busy_s": busy, "queue_s": fields.pop("queue_s", 0.0), "requests": fields.pop("requests", 0)}
    draining = fields.pop("draining", False)
    prefill = {"role": "prefill", "draining": False, "agent": "p-1", "load": {}, "figures": figures}
    decode = {
        "role": "decode",
        "draining": draining,
        "agent": fields.pop("agent", "d-1"),
        "load": {"free_hbm_tokens": free, "hbm_capacity_tokens": 1000},
        "figures": {"decoding": decoding, "queue_s": 0.0, "requests": 0},
    }
    waiting = {"blocked_on": fields.pop("blocked_on", None), "longest_wait_s": fields.pop("longest_wait_s", 0.0)}
    return {"time": at, "processes": {"prefill-p0-0": prefill, "decode-d0-0": decode}, **waiting}


def window(*pictures: dict[str, Any]) -> LoadWindow:
    made = LoadWindow(looks=2, max_batch=8)
    for one in pictures:
        made.add(one)
    return made


def test_nothing_is_known_before_the_second_picture() -> None:
    assert window(picture(0)).load("prefill", 3) == RoleLoad(3, 0.0, 0.0, 0)


def test_prefill_is_as_busy_as_its_engines_computed() -> None:
    load = window(picture(0, busy=5.0), picture(2, busy=5.1), picture(4, busy=8.0)).load("prefill", 1)
    assert load.utilisation == pytest.approx(0.75)
    assert load.samples == 2


def test_decode_is_as_busy_as_its_batch_or_its_pool() -> None:
    assert window(picture(0, decoding=4), picture(1, decoding=8)).load("decode", 1).utilisation == pytest.approx(0.75)
    assert window(picture(0, free=100), picture(1, free=300, decoding=1)).load("decode", 1).utilisation == pytest.approx(0.8)


def test_what_drains_or_was_restarted_does_not_count() -> None:
    assert window(picture(0, decoding=8), picture(1, decoding=8, draining=True)).load("decode", 1).utilisation == 1.0
    assert window(*(picture(at, decoding=8, draining=True) for at in (0, 1))).load("decode", 1).utilisation == 0.0
    first, last = picture(0, busy=50.0), picture(1, busy=0.5)
    last["processes"]["prefill-p0-0"]["agent"] = "p-2"
    assert window(first, last).load("prefill", 1).utilisation == 0.0


def test_queue_time_is_that_of_the_role_that_lacks() -> None:
    waits = [picture(at, blocked_on="decode", longest_wait_s=6.0, queue_s=at * 1.0, requests=at) for at in (0, 2)]
    assert window(*waits).load("decode", 1).queue_s == pytest.approx(6.0)
    assert window(*waits).load("prefill", 1).queue_s == pytest.approx(1.0)


def test_growth_of_one_role_and_idleness_of_the_other_is_a_switch() -> None:
    loads = window(*(picture(at, decoding=8) for at in (0, 1, 2)))
    decision = decide_scaling(loads.load("prefill", 2), loads.load("decode", 1), LIMITS)
    assert (decision.prefill_nodes, decision.decode_nodes, decision.switch) == (1, 2, 1)


def test_roles_have_bounds_of_their_own() -> None:
    loads = window(*(picture(at, busy=at, decoding=8) for at in (0, 1, 2)))
    one = ScalingLimits(least_samples=2, most_nodes=1)
    decision = decide_scaling(loads.load("prefill", 1), loads.load("decode", 1), one, LIMITS)
    assert (decision.prefill_nodes, decision.decode_nodes) == (1, 2)


def test_a_window_forgets_what_is_old_and_starts_anew_after_a_change() -> None:
    made = window(picture(0, busy=0.0), picture(1, busy=0.0), picture(2, busy=1.0), picture(3, busy=2.0))
    assert made.full and made.load("prefill", 1).utilisation == pytest.approx(1.0)
    made.reset()
    assert not made.full
