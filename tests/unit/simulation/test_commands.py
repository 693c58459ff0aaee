"""The simulator's commands, end to end on tiny runs."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
from click.testing import CliRunner

from dualpath_ray.cli import main
from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation import kept_cells, planner
from dualpath_ray.simulation import reproduce as module
from dualpath_ray.simulation.commands import bench_scheduler, plan, reproduce, simulate
from dualpath_ray.simulation.experiment import Experiment, run
from dualpath_ray.simulation.kept_cells import KeptCells
from dualpath_ray.simulation.reference import EXPERIMENTS, ReferenceCell, reference_cells
from dualpath_ray.simulation.reproduce import Reproduction, ablation_steps, document, ratios
from dualpath_ray.simulation.scheduler_bench import bench


def test_simulate_one_cell() -> None:
    options = [
        "--model",
        "ds-27b",
        "--nodes",
        "1P1D",
        "--mal",
        "32K",
        "--agents",
        "4",
        "--mode",
        "basic",
        "--append-scale",
        "2",
        "--generation-scale",
        "1",
        "--json",
    ]
    result = CliRunner().invoke(simulate, options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["jct_s"] > 10 and found["agents_done"] == 4
    assert set(found["ttft_share"]) == {"queued", "allocated", "read", "prefill"}


def test_simulate_from_a_file_with_overrides_and_exports(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: ds-27b\nmal: 32K\nagents: 3\ncluster: {prefill_nodes: 1, decode_nodes: 1}\n")
    options = [
        str(config),
        "--set",
        "agents=2",
        "--json",
        "--chrome-trace",
        str(tmp_path / "t.json"),
        "--parquet",
        str(tmp_path / "t.parquet"),
        "--timeline",
        str(tmp_path / "timeline.parquet"),
    ]
    result = CliRunner().invoke(simulate, options)
    assert result.exit_code == 0, result.output
    timeline = pandas.read_parquet(tmp_path / "timeline.parquet")
    assert {"time_s", "queued", "running", "snic_p0", "snic_d0", "staging_free_d0"} <= set(timeline)
    assert list(timeline["time_s"]) == [10.0 * (i + 1) for i in range(len(timeline))] and timeline["snic_p0"].between(0, 1.001).all()
    assert json.loads(result.stdout)["agents_done"] == 2
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"prefill", "decode"}
    assert (tmp_path / "t.parquet").stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--set", "cluster.node.snic_bytes_per_s=0"], "snic_bytes_per_s"),
        (["--set", "cluster.prefill_nodes=0"], "prefill_nodes"),
        (["--set", "cluster.node.hbm_bytes=-1"], "hbm_bytes"),
        (["--model", "gpt-9"], "model"),
        (["--mode", "magic"], "mode"),
        (["--nodes", "0P1D"], "nodes"),
        (["--set", "nonsense=1"], "nonsense"),
        (["--set", "cluster.sharing=never"], "cluster.sharing"),
        (["--set", "model={name: m}"], "model.layers"),
        (["--model", "ds-27b", "--nodes", "1P1D", "--set", "cluster.node.hbm_bytes=14.5e9"], "hbm_bytes"),
        (["--model", "ds-27b", "--nodes", "1P1D", "--set", "cluster.node.staging_bytes=1e6"], "staging_bytes"),
        (["--set", "cluster.block_tokens=128", "--set", "cluster.batch_tokens=64"], "batch_tokens"),
        (["--append-scale", "inf"], "append_scale"),
        (["--set", "cluster.node.hbm_bytes=.nan"], "hbm_bytes"),
        (["--agents", "99999999999"], "agents"),
        (["--set", "agents=["], "agents"),
    ],
)
def test_impossible_specs_are_refused_by_name(options: list[str], field: str) -> None:
    result = CliRunner().invoke(simulate, options)
    assert isinstance(result.exception, ConfigError)
    assert field in str(result.exception) and "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("option", "content"),
    [
        ("--trace", b"\xff\xfe"),
        ("--trace", b'{"turns": [[1, 2]], "cols": ["gen"]}'),
        ("--trace", b'{"turns": 3}'),
        ("--trace", b'{"hash_ids": [1]}'),
        ("--trace", b"3"),
        ("", b"\xff\xfe"),
        ("--model", b"{"),
        ("--model", b"[1]"),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(tmp_path: Path, option: str, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    named = tmp_path if option == "--model" else tmp_path / "config.json"
    result = CliRunner().invoke(main, ["simulate", "--agents", "1", *([option] if option else []), str(named)])
    assert result.exit_code == 2
    assert "config.json" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("reproduce fig13 --online-seconds nan", "--online-seconds"),
        ("reproduce fig99", "fig99"),
        ("plan --model ds-27b --gpus 8 --aps 1", "--gpus"),
        ("plan --model ds-660b --gpus 16 --aps 1", "gpus"),
        ("plan --model ds-27b --gpus 16 --aps inf", "aps"),
        ("plan --model ds-27b --gpus 16 --aps 1 --slo ttft=nan", "ttft"),
        ("bench scheduler --engines 0", "--engines"),
        ("bench scheduler --rate inf", "--rate"),
        ("bench scheduler --engines 16 --rate 0.1 --seconds 1", "rate"),
        ("simulate --no-such-option", "--no-such-option"),
        ("simulate --agents 1 --parquet /no/such/turns.parquet", "/no/such/turns.parquet"),
    ],
)
def test_impossible_commands_end_with_one_line_and_status_2(line: str, name: str) -> None:
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 2
    *progress, error = result.stderr.splitlines()
    assert error.startswith("Error: ") and name in error
    assert not [part for part in progress if not line.startswith("plan")]


def test_a_run_that_cannot_go_on_ends_with_an_error(tmp_path: Path) -> None:
    """A prompt larger than a prefill GPU's memory, without layerwise prefill, is never fetched."""
    line = f"simulate --nodes 2P4D --mode basic --agents 2 --set cluster.node.hbm_bytes=72e9 --timeline {tmp_path / 'timeline.parquet'}"
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 2 and "never be placed" in result.stderr


def test_a_plan_passes_over_clusters_that_are_too_small_for_the_model() -> None:
    base = {"model": "ds-660b", "mal": "32K", "aps": 0.05, "duration_s": 150.0}
    found = planner.plan(Experiment.model_validate(base), 32, 4.0, 0.05, ("ours",))
    assert found["found"] and found["choice"]["gpus"] == 32
    assert "does not fit on 8 GPUs" in found["too_small"]


def test_online_run_reports_latency_and_overload() -> None:
    base = Experiment.model_validate(
        {"model": "ds-27b", "mal": "32K", "cluster": {"prefill_nodes": 1, "decode_nodes": 1}, "aps": 0.1, "duration_s": 200.0}
    )
    light = run(base)
    assert not light["overloaded"] and 0 < light["ttft_s"]["mean"] < 2
    heavy = run(base.model_copy(update={"aps": 20.0, "mode": "basic"}))
    assert heavy["overloaded"]


def test_reference_tables() -> None:
    cells = reference_cells()
    assert {cell.experiment for cell in cells} == set(EXPERIMENTS)
    assert len(reference_cells("fig7")) == 2 * 3 * 3 * 4
    assert next(c for c in cells if c.metric == "ttft_s@0.45").aps == 0.45


def test_document_sums_up_errors() -> None:
    def cell(experiment: str, mode: str, ours: float, paper: float) -> dict[str, object]:
        named = {"experiment": experiment, "model": "m", "mal": "64K", "agents": 1, "mode": mode, "metric": "jct_s"}
        return {**named, "ours": ours, "paper": paper, "relative_error": ours / paper - 1}

    cells = [
        cell("fig7", "basic", 200, 100),
        cell("fig7", "ours", 50, 100),
        cell("ablation", "basic", 10, 10),
        cell("ablation", "ours", 5, 6),
    ]
    assert ratios(cells)[0]["ours"] == 4.0
    assert ablation_steps(cells) == [{"step": "ours", "ours": 0.5, "paper": 0.4}]
    errors = document(cells)["mean_abs_rel_error"]
    assert errors["fig7_jct"] == pytest.approx(0.75)
    assert errors["fig7_ratio"] == pytest.approx(3.0)
    assert errors["ablation"] == pytest.approx(0.1)


def test_settings_are_simulated_once_and_in_any_number_of_processes() -> None:
    wanted = [
        ReferenceCell("fig7", "ds-27b", 1, 1, "32K", agents, mode, metric, 100.0, 0.0)
        for agents in (2, 1)
        for mode in ("basic", "ours")
        for metric in ("jct_s", "ttft_s")
    ]
    lines: list[str] = []
    alone = Reproduction(lines.append).fill(wanted)
    assert len(lines) == 4
    assert [(cell["agents"], cell["mode"], cell["metric"]) for cell in alone[:3]] == [
        (1, "basic", "jct_s"),
        (1, "basic", "ttft_s"),
        (1, "ours", "jct_s"),
    ]
    assert Reproduction(jobs=2).fill(wanted) == alone

    told: list[str] = []

    def note(line: str) -> None:
        told.append(line)
        if len(told) == 2:
            raise KeyboardInterrupt

    done = Reproduction(note).fill(wanted)
    assert done == [cell for cell in alone if cell["agents"] == 2], "the largest were first"
    assert told[-1].startswith("interrupted")


def test_an_interrupted_reproduction_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [ReferenceCell("fig7", "ds-27b", 1, 1, "32K", count, "ours", "jct_s", 100.0, 0.0) for count in (2, 1)]
    file = tmp_path / "cells.jsonl"
    done = Reproduction(kept=KeptCells(file, 60.0)).fill(cells[:1])
    simulated: list[int] = []

    def count_and_simulate(wanted: list[ReferenceCell], online_s: float) -> list[dict[str, object]]:
        simulated.append(wanted[0].agents)
        return simulate_cells(wanted, online_s)

    simulate_cells = module._simulate
    monkeypatch.setattr(module, "_simulate", count_and_simulate)
    assert Reproduction(kept=KeptCells(file, 60.0)).fill(cells)[1:] == done
    assert simulated == [1]
    Reproduction(kept=KeptCells(file, 30.0)).fill(cells)
    assert simulated == [1, 2, 1], "online runs of another length are others"
    monkeypatch.setattr(kept_cells, "build", lambda: "another")
    assert KeptCells(file, 60.0).find(cells) is None
    file.write_text("{}\n")
    result = CliRunner().invoke(reproduce, ["fig13", "--resume", str(file)])
    assert isinstance(result.exception, ConfigError) and "line 1" in str(result.exception)


def test_reproduce_and_plots(tmp_path: Path) -> None:
    assert CliRunner().invoke(reproduce, ["fig7", "--max-agents", "1", "--json"]).exit_code == 0
    from dualpath_ray.simulation.plots import plot_reproduction

    cells = [
        {"experiment": "fig7", "model": "m", "mal": "64K", "agents": 1, "mode": "ours", "metric": "jct_s", "ours": 1.0, "paper": 2.0},
        {
            "experiment": "fig10",
            "model": "m",
            "mal": "64K",
            "agents": 0,
            "mode": "ours",
            "metric": "ttft_s@0.1",
            "ours": None,
            "paper": 2.0,
        },
    ]
    for part, ours in (("queued", 0.4), ("read", 0.6)):
        cells.append({"experiment": "fig12", "model": "m", "mode": "ours", "metric": f"{part}_share@0.2", "ours": ours, "paper": 0.5})
    for mode, ours in (("basic", 10.0), ("layerwise", 9.0)):
        cells.append({"experiment": "ablation", "agents": 1, "mode": mode, "metric": "jct_s", "ours": ours, "paper": 10.0})
    names = [file.name for file in plot_reproduction(cells, tmp_path)]
    assert names == ["fig7.png", "fig10_ttft.png", "fig12.png", "ablation.png"]


def test_plan_finds_a_cluster() -> None:
    options = ["--model", "ds-27b", "--gpus", "16", "--aps", "0.05", "--mal", "32K", "--duration", "200", "--json"]
    result = CliRunner().invoke(plan, options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["found"] and found["choice"]["gpus"] == 16
    choice = found["choice"]
    assert choice["shares"][choice["binds"]] == max(choice["shares"].values()) and choice["relief"]


def test_a_plan_that_fails_names_what_binds() -> None:
    base = {"model": "ds-27b", "mal": "64K", "aps": 2.0, "duration_s": 150.0, "cluster": {"node": {"snic_bytes_per_s": 5e9}}}
    slow_storage = planner.plan(Experiment.model_validate(base), 16, 4.0, 0.05)
    assert not slow_storage["found"] and slow_storage["choice"]["binds"] == "storage NIC"
    base["cluster"] = {"node": {"hbm_bytes": 18e9}}
    assert planner.plan(Experiment.model_validate(base), 16, 4.0, 0.05)["choice"]["binds"] == "decode memory"


def test_scheduler_bench_reports_all_keys() -> None:
    result = CliRunner().invoke(bench_scheduler, ["--engines", "24", "--seconds", "0.5", "--rate", "200", "--json"])
    found = json.loads(result.stdout)
    assert {"decisions_per_s", "decision_p50_s", "decision_p99_s", "cores_at_paper_rate", "rss_bytes"} <= set(found)
    assert bench(24, 200.0, 0.5)["decisions"] == found["decisions"] == 100
