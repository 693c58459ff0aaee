"""The commands, with runs whose figures are given in place of measured ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from load_tests.experiments import __main__ as command
from load_tests.experiments import ablation, balance, bench, compute_bound, gain, interference, online, overload, read_tail, scaling
from load_tests.experiments.experiment import Say, Setup
from load_tests.experiments.measure import Load, Run
from load_tests.experiments.modes import DUAL, Mode
from tests.unit.load_tests.runs import run, turn


class GivenBench:
    """Basic takes 20 s, dual-path systems 10 s, others 15 s; TTFT grows with the rate; overload refuses half."""

    def __init__(self, setup: Setup, loads: Sequence[Load]) -> None:
        self.setup, self.loads = setup, loads
        self.measured: list[tuple[str, str]] = []

    def measure(
        self, shape: str, mode: str | Mode, loads: Sequence[Load] | None = None, repeat: int = 0, failures: bool = False
    ) -> list[Run]:
        name = mode if isinstance(mode, str) else mode.name
        self.measured.append((shape, name))
        jct = {"basic": 20.0, **dict.fromkeys(DUAL, 10.0)}.get(name, 15.0)
        runs = []
        for load in self.loads if loads is None else loads:
            refused = failures and load.name == "200%"
            records = [
                turn(agent, agent / 2, load.agents_per_s + 1, "OverloadedError: full" if refused and agent % 2 else "")
                for agent in range(8)
            ]
            runs.append(run(shape, name, jct, load=load.name, records=records, agents_per_s=load.agents_per_s))
        return runs


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> list[GivenBench]:
    """The command on a machine that allows a testbed. Returns what was opened."""
    opened: list[GivenBench] = []

    @contextlib.contextmanager
    def open_bench(setup: Setup, loads: Sequence[Load], say: Say) -> Iterator[GivenBench]:
        opened.append(GivenBench(setup, loads))
        yield opened[-1]

    monkeypatch.setattr(command, "unavailable", lambda: None)
    for module in (ablation, balance, compute_bound, gain, online, overload, read_tail, scaling):
        monkeypatch.setattr(module, "open_bench", open_bench)
    return opened


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(command.main, list(arguments))


def test_json_of_gain_has_the_promised_figures(benches: list[GivenBench]) -> None:
    result = invoke("gain", "--json", "--shapes", "1P1D", "--modes", "basic,layerwise,split")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["speedup_over_basic"] == {"1P1D": {"layerwise": pytest.approx(4 / 3), "split": 2.0}}
    assert figures["bound"] == {"1P1D": 2.0}
    assert figures["snic_max_over_avg"] == pytest.approx(1.0)
    assert [entry["jct_s"] for entry in figures["runs"]] == [20.0, 15.0, 10.0]
    assert figures["runs"][0]["nic_bytes"] == {"p0-snic": {"rx": 1, "tx": 2}}
    assert {"p50", "p99"} <= set(figures["runs"][0]["ttft_s"])


@pytest.mark.parametrize("name", [name for name in command.NAMES if name != "interference"])
def test_every_experiment_prints_json_and_plots(benches: list[GivenBench], name: str, tmp_path: Path) -> None:
    result = invoke(name, "--quick", "--json", "--plots", str(tmp_path))
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["experiment"] == name
    assert {(entry["testbed"], entry["mode"]) for entry in figures["runs"]} == set(benches[0].measured)
    plots = list(tmp_path.iterdir())
    assert plots and all(path.stat().st_size > 5000 for path in plots)


def test_every_experiment_has_help() -> None:
    for name in command.NAMES:
        result = invoke(name, "--help")
        assert result.exit_code == 0 and "--require" in result.output


def test_options_reach_the_setup(benches: list[GivenBench]) -> None:
    given = "--snic 50 --cnic 700 --agents 3 --turns 2 --repeats 4 --nice -5 --set storage.read_threads=2 --modes basic,split"
    assert invoke("gain", *given.split()).exit_code == 0
    (opened,) = benches
    setup = opened.setup
    assert (setup.testbed.snic_bits, setup.testbed.cnic_bits, setup.testbed.nice) == (50_000_000, 700_000_000, -5)
    assert (setup.workload.agents, setup.workload.turns, setup.repeats) == (3, 2, 4)
    assert setup.overrides == ("storage.read_threads=2",)
    assert len(opened.measured) == 4 * 2 * len(setup.shapes)


def test_a_required_gain_that_is_missed_fails(benches: list[GivenBench]) -> None:
    assert invoke("gain", "--quick", "--require", "1.9").exit_code == 0
    missed = invoke("gain", "--quick", "--require", "2.1")
    assert missed.exit_code == 1
    assert "1P1D shorter_queue" in missed.output


def test_without_namespaces_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "unavailable", lambda: "network namespaces need root")
    result = invoke("gain", "--quick")
    assert result.exit_code == command.SKIPPED
    assert "need root" in result.output


@pytest.mark.parametrize("arguments", [["--shapes", "1D1P"], ["--modes", "quantum"]])
def test_wrong_names_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "unavailable", lambda: None)
    monkeypatch.setattr(bench, "open_testbed", lambda spec: pytest.fail("a testbed was opened"))
    result = invoke("gain", *arguments)
    assert result.exit_code == 1
    assert arguments[1] in result.output


def sweep(mode: str, points: dict[float, float]) -> list[Run]:
    return [run("1P1D", mode, 10.0, load=str(rate), records=[turn(0, 0.0, ttft)], agents_per_s=rate) for rate, ttft in points.items()]


def test_capacity_is_where_ttft_crosses_the_slo() -> None:
    result = online.OnlineResult("online", online.SETUP)
    slo = result.slo().ttft_s
    result.runs = (
        sweep("basic", {0.1: slo / 2, 0.2: slo * 2}) + sweep("split", {0.2: 1.0, 0.3: slo, 0.4: 9 * slo}) + sweep("pool", {0.1: slo + 1})
    )
    assert result.capacity("1P1D", "basic") == pytest.approx(0.15)
    assert result.capacity("1P1D", "split") == pytest.approx(0.3)
    assert result.capacity("1P1D", "pool") is None
    assert result.over_basic()["1P1D"]["split"] == pytest.approx(2.0)


def test_goodput_counts_answers_in_time_only() -> None:
    records = [turn(agent, agent, 1.0, "OverloadedError: full" if agent % 2 else "") for agent in range(5)]
    records.append(turn(5, 0.0, overload.DEADLINE_S))
    result = overload.OverloadResult("overload", overload.SETUP)
    assert result.goodput(run("1P1D", "split", 9.0, records=records)) == pytest.approx(3 / 9)


def test_interference_compares_latencies_with_and_without_kv() -> None:
    result = interference.InterferenceResult(interference.SETUP)
    for classes, kv, seconds in ((True, False, 0.010), (True, True, 0.011), (False, False, 0.010), (False, True, 0.080)):
        result.traffic.append(interference.Traffic(classes, kv, tuple((float(at), seconds) for at in range(20)), 0.9))
    figures = result.figures()
    assert figures["slowdown_with_classes"]["p50"] == pytest.approx(1.1)
    assert figures["slowdown_without_classes"]["p99"] == pytest.approx(8.0)
    assert result.missed(0.9) == [] and result.missed(0.95)


def test_a_failed_turn_fails_the_run_unless_failures_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from load_tests.experiments.job import Answer, PhaseAnswer
    from load_tests.testbed.errors import TestbedError
    from load_tests.testbed.spec import TestbedSpec

    record = {"agent": 0, "turn": 0, "prompt": 9, "wanted": 1, "started": 1.0, "finished": 2.0, "error": "OverloadedError: full"}
    testbed = SimpleNamespace(
        spec=TestbedSpec(), folder=tmp_path, overrides=lambda bucket, hosts: [], network=SimpleNamespace(shape=lambda *_: None),
        counters=SimpleNamespace(between=lambda start, end: []),
    )  # fmt: skip
    setup = Setup()
    one = bench.Bench(testbed, setup, [Load(setup.workload)], lambda text: None)  # type: ignore[arg-type]
    monkeypatch.setattr(one, "_drive", lambda job, name, timeout_s: Answer([PhaseAnswer(1.0, 2.0, [record], 0.0)], {}))
    with pytest.raises(TestbedError, match="1 turns failed: OverloadedError"):
        one.measure("1P1D", "split")
    assert one.measure("1P1D", "split", failures=True)[0].figures["failed_turns"] == 1
