"""The paper's figures and tables as data (`data/paper.csv`), read off with the stated error."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class ReferenceCell:
    """One number of the paper. `metric` may carry an arrival rate, as in `ttft_s@0.4`. `agents` is 0 for online runs."""

    experiment: str
    model: str
    prefill_nodes: int
    decode_nodes: int
    mal: str
    agents: int
    mode: str
    metric: str
    paper: float
    reading_error: float

    @property
    def aps(self) -> float | None:
        """Arrival rate of the metric, or None."""
        _, _, rate = self.metric.partition("@")
        return float(rate) if rate else None


def reference_cells(experiment: str = "all") -> list[ReferenceCell]:
    """Cells of one experiment, or of all."""
    text = resources.files("dualpath_ray.simulation").joinpath("data/paper.csv").read_text()
    cells = [
        ReferenceCell(
            row["experiment"],
            row["model"],
            int(row["prefill_nodes"]),
            int(row["decode_nodes"]),
            row["mal"],
            int(row["agents"]),
            row["mode"],
            row["metric"],
            float(row["paper"]),
            float(row["reading_error"]),
        )
        for row in csv.DictReader(text.splitlines())
    ]
    return [cell for cell in cells if experiment in ("all", cell.experiment)]


EXPERIMENTS = ("fig7", "table3", "fig10", "fig12", "fig13", "ablation")
