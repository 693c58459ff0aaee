"""Class to setting: what each fabric is told."""

from __future__ import annotations

import pytest

from dualpath_ray.config import Settings
from dualpath_ray.errors import ConfigError
from dualpath_ray.traffic.classes import Marking, TrafficClass


def test_defaults_are_the_papers_lanes() -> None:
    traffic = Settings().traffic
    assert {each.value: traffic.of(each).sl for each in TrafficClass} == {"model": 0, "control": 1, "kv_read": 2, "kv_write": 2}
    assert not traffic.enabled


def test_marking_in_each_fabrics_terms() -> None:
    marking = Marking(sl=2, dscp=18)
    assert marking.traffic_class == 0x4A  # AF21 and ECT(0)
    assert marking.priority == 2
    assert marking.ucx() == {"IB_SL": "2", "IB_TRAFFIC_CLASS": "74"}
    assert marking.collectives()["NCCL_IB_TC"] == "74"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["traffic.kv_read.sl=0"], "kv_read and model have the same sl"),
        (["traffic.kv_write.dscp=34"], "kv_write and control have the same dscp"),
        (["traffic.kv_write.sl=5"], "raise traffic.lanes"),
        (["traffic.high_limit=255"], "traffic.high_limit"),
        (["traffic.kv_read.dscp=64"], "traffic.kv_read.dscp"),
    ],
)
def test_classes_that_would_not_separate_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings.load(overrides=overrides, environ={})


def test_another_split_needs_only_the_fields_that_differ() -> None:
    traffic = Settings.load(overrides=["traffic.kv_write={sl: 3, weight: 16}"], environ={}).traffic
    assert traffic.kv_write.marking == Marking(3, 10)
    assert traffic.kv_read.marking == Marking(2, 18)
