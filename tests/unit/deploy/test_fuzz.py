"""The fast part of `python -m load_tests.fuzz`."""

from __future__ import annotations

from pathlib import Path

import pytest

from load_tests.fuzz import application, attack, malformed
from load_tests.openapi_cases import check_document


async def test_malformed_bodies(tmp_path: Path) -> None:
    api, cluster = application(tmp_path)
    statuses = await attack(api, malformed(7, 1500))
    assert {200, 400} <= statuses.keys()  # otherwise the bodies would all be alike
    assert not cluster.running


def test_the_same_seed_makes_the_same_bodies() -> None:
    assert list(malformed(1, 50)) == list(malformed(1, 50)) != list(malformed(2, 50))


@pytest.mark.filterwarnings("ignore")
def test_cases_of_our_own_document(tmp_path: Path) -> None:
    api, cluster = application(tmp_path)
    assert check_document(api, 3) >= 12
    assert not cluster.running
