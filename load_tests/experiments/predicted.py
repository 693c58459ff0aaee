"""Job completion times that the simulator predicts for the testbed, beside what was measured on it.

`python -m load_tests.experiments.predicted` takes the measurements of measured.csv (docs/experiments.md, Gain). With `--gain FILE` those of
`gain --json` are taken, and the workload that they were made with.
"""

from __future__ import annotations

import csv
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import yaml

from dualpath_ray.simulation.cluster_spec import parse_nodes
from dualpath_ray.simulation.experiment import Experiment, run
from load_tests.experiments.workload import Workload

HERE = Path(__file__).parent
WORKLOAD = Workload()  # of measured.csv
SIMULATED_AS = {"layerwise": "layerwise_scheduled"}  # how the simulator calls a measured mode, where the names differ
NOT_SIMULATED = ("oracle", "recompute", "cheapest")  # other NICs, other hits, cost curves of their own


@dataclass(frozen=True, slots=True)
class Comparison:
    shape: str
    mode: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def measured(gain: Path | None) -> tuple[Workload, list[tuple[str, str, float]]]:
    """The workload; shape, mode and JCT of each measurement."""
    if gain is None:
        with (HERE / "measured.csv").open() as file:
            return WORKLOAD, [(row["shape"], row["mode"], float(row["jct_s"])) for row in csv.DictReader(file)]
    document = json.loads(gain.read_text())
    rows = [
        (row["testbed"], SIMULATED_AS.get(row["mode"], row["mode"]), float(row["jct_s"]))
        for row in document["runs"]
        if row["mode"] not in NOT_SIMULATED
    ]
    return Workload(**document["workload"]), rows


def sessions(workload: Workload) -> str:
    """The workload as a trace file of the simulator."""
    lines = []
    for context, trajectory in zip(workload.contexts, workload.trajectories, strict=True):
        lines.append(json.dumps({"context": context, "turns": [[turn.append, turn.generate] for turn in trajectory.turns]}))
    return "\n".join(lines) + "\n"


def predict(shape: str, mode: str, trace: Path) -> float:
    document = yaml.safe_load((HERE / "testbed.yaml").read_text())
    prefill, decode = parse_nodes(shape)
    document["cluster"] |= {"prefill_nodes": prefill, "decode_nodes": decode}
    document |= {"mode": mode, "trace": str(trace)}
    return float(run(Experiment.model_validate(document))["jct_s"])


@click.command()
@click.option("--gain", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Output of `gain --json`.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(gain: Path | None, as_json: bool) -> None:
    """Predicted beside measured job completion times of the testbed."""
    workload, runs = measured(gain)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as trace:
        trace.write(sessions(workload))
        trace.flush()
        rows = [Comparison(shape, mode, predict(shape, mode, Path(trace.name)), jct) for shape, mode, jct in runs]
    if as_json:
        names = ("shape", "mode", "predicted_s", "measured_s", "error")
        click.echo(json.dumps([{name: getattr(row, name) for name in names} for row in rows]))
        return
    click.echo(f"{'shape':6} {'mode':20} {'predicted s':>11} {'measured s':>10} {'error':>7}")
    for row in rows:
        click.echo(f"{row.shape:6} {row.mode:20} {row.predicted_s:11.1f} {row.measured_s:10.1f} {row.error:+7.1%}")


if __name__ == "__main__":
    main()
