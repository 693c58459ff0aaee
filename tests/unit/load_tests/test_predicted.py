"""The simulator against the testbed's measurements."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from load_tests.experiments.predicted import HERE, WORKLOAD, main, measured, sessions
from load_tests.experiments.workload import Workload


def test_the_trace_file_is_the_testbeds_workload() -> None:
    assert (HERE / "testbed_sessions.jsonl").read_text() == sessions(WORKLOAD)


def test_measured_times_are_predicted_within_ten_percent() -> None:
    rows = json.loads(CliRunner().invoke(main, ["--json"]).stdout)
    assert len(rows) == 15
    assert all(abs(row["error"]) < 0.1 for row in rows)


def test_measurements_may_come_from_a_run(tmp_path: Path) -> None:
    gain = tmp_path / "gain.json"
    runs = [{"testbed": "1P1D", "mode": m, "jct_s": 9.0} for m in ("layerwise", "oracle")]
    gain.write_text(json.dumps({"workload": {"turns": 5}, "runs": runs}))
    assert measured(gain) == (Workload(turns=5), [("1P1D", "layerwise_scheduled", 9.0)])
