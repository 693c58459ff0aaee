"""The scheduler's picture of who has what in memory follows the gateways', whatever is lost or comes late."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dualpath_ray.kv.residency import Residency, ResidencyChanges

KEYS = [bytes([number]) for number in range(6)]
STEPS = st.lists(st.tuples(st.sampled_from(["come", "go", "report", "lost report", "restart"]), st.sampled_from(KEYS)), max_size=60)


@given(STEPS, st.integers(1, 4))
def test_after_the_last_report_both_agree(steps: list[tuple[str, bytes]], limit: int) -> None:
    changes, residency, resident = ResidencyChanges(), Residency(), set[bytes]()
    for what, key in steps:
        if what in ("come", "go"):
            (resident.add if what == "come" else resident.discard)(key)
            changes.note(key, what == "come")
        elif what == "restart":
            residency.drop_node("n0")
            changes.restart()
        else:
            came, gone = changes.take(limit)
            assert len(came) + len(gone) <= limit
            residency.update("n0", came, gone)
            if what == "report":
                changes.confirm(came, gone)
        assert len(changes) <= len(KEYS)
    while changes:
        came, gone = changes.take(limit)
        residency.update("n0", came, gone)
        changes.confirm(came, gone)
    found = residency.positions(KEYS)
    assert {KEYS[position] for position in found.get("n0", set())} == resident
    assert len(residency) == len(resident)


def test_what_comes_and_goes_between_two_reports_is_not_told() -> None:
    changes = ResidencyChanges()
    changes.note(KEYS[0], True)
    changes.note(KEYS[0], False)
    assert changes.take(10) == ((), ())


def test_positions_are_places_in_the_prompt_by_node() -> None:
    residency = Residency()
    residency.update("n0", [KEYS[1], KEYS[2]], [])
    residency.update("n1", [KEYS[2]], [KEYS[4]])
    assert residency.positions(KEYS[:4]) == {"n0": {1, 2}, "n1": {2}}
    residency.drop_node("n0")
    assert residency.positions(KEYS[:4]) == {"n1": {2}}
    assert len(residency) == 1
