from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from load_tests.experiments import __main__ as command
from load_tests.experiments.gain import GainPlan, GainResult
from load_tests.experiments.measure import Run
from load_tests.experiments.plots import plot_gain


def run(mode: str, jct: float) -> Run:
    times = np.arange(20, dtype=np.float64)
    rates = {f"{host}-snic:rx": np.full(20, 1e7) for host in ("p0", "d0")}
    figures: dict[str, Any] = {"jct_s": jct, "snic_utilisation": 0.9, "failed_turns": 0}
    return Run("1P1D", mode, 0, figures, {"p0-snic": {"rx": 1, "tx": 2}}, times, rates)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[GainPlan]:
    """The command on a machine that allows a testbed, with runs whose figures are given: Basic 20 s, the others 10 s."""
    plans: list[GainPlan] = []

    def run_gain(plan: GainPlan, say: Any) -> GainResult:
        plans.append(plan)
        return GainResult(plan, [run(mode, 20.0 if mode == "basic" else 10.0) for mode in plan.modes])

    monkeypatch.setattr(command, "unavailable", lambda: None)
    monkeypatch.setattr(command, "run_gain", run_gain)
    return plans


def gain(*arguments: str) -> Any:
    return CliRunner().invoke(command.main, ["gain", *arguments])


def test_json_has_the_promised_figures(measured: list[GainPlan]) -> None:
    result = gain("--json", "--shapes", "1P1D", "--modes", "basic,split")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["speedup_over_basic"] == {"1P1D": {"split": 2.0}}
    assert figures["bound"] == {"1P1D": 2.0}
    assert figures["snic_max_over_avg"] == pytest.approx(1.0)
    assert [entry["jct_s"] for entry in figures["runs"]] == [20.0, 10.0]
    assert figures["runs"][0]["nic_bytes"] == {"p0-snic": {"rx": 1, "tx": 2}}


def test_options_reach_the_plan(measured: list[GainPlan]) -> None:
    gain(
        "--snic",
        "50",
        "--cnic",
        "700",
        "--agents",
        "3",
        "--turns",
        "2",
        "--repeats",
        "4",
        "--nice",
        "-5",
        "--set",
        "storage.read_threads=2",
    )
    (plan,) = measured
    assert (plan.testbed.snic_bits, plan.testbed.cnic_bits, plan.testbed.nice) == (50_000_000, 700_000_000, -5)
    assert (plan.workload.agents, plan.workload.turns, plan.repeats) == (3, 2, 4)
    assert plan.overrides == ("storage.read_threads=2",)


def test_a_required_gain_that_is_missed_fails(measured: list[GainPlan]) -> None:
    assert gain("--quick", "--require", "1.9").exit_code == 0
    missed = gain("--quick", "--require", "2.1")
    assert missed.exit_code == 1
    assert "1P1D shorter_queue" in missed.output


def test_without_namespaces_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "unavailable", lambda: "network namespaces need root")
    result = gain("--quick")
    assert result.exit_code == command.SKIPPED
    assert "need root" in result.output


def test_wrong_shapes_are_refused(measured: list[GainPlan]) -> None:
    result = gain("--shapes", "1D1P")
    assert result.exit_code == 1
    assert "1P2D" in result.output


def test_plots_are_written(tmp_path: Path) -> None:
    plan = GainPlan(shapes=("1P1D",), modes=("basic", "split"))
    paths = plot_gain(GainResult(plan, [run("basic", 20.0), run("split", 10.0)]), tmp_path / "plots")
    assert [path.name for path in paths] == ["gain_jct.png", "gain_snic_1P1D.png"]
    assert all(path.stat().st_size > 5000 for path in paths)
