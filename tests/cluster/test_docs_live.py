"""The pages of the docs as a reader works through them, with all that takes longer than a moment: services, demo, cluster, simulator.

Each in a network and process namespace of its own, so that the ports that the pages name are free and nothing outlives it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cluster.isolation import needs_isolation, run_isolated
from tests.unit.docs_commands import PAGES, commands_of

pytestmark = [pytest.mark.live, needs_isolation]


@pytest.mark.parametrize("page", [page.stem for page in PAGES if any(command.runs == "live" for command in commands_of(page))])
@pytest.mark.timeout(1200)
def test_a_page_works_from_top_to_bottom(page: str, short_tmp: Path, smollm2_path: Path) -> None:
    done = run_isolated([sys.executable, "-m", "tests.docs_walk", page, str(short_tmp)], timeout_s=1150)
    assert done.returncode == 0, done.stdout + done.stderr
