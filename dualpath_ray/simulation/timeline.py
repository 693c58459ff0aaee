"""What a run looked like over time: use of the storage NICs, queues, free staging."""

from __future__ import annotations

from pathlib import Path

from dualpath_ray.simulation.simulator import Simulator

STEP_S = 10.0


class Timeline:
    """Samples of a run, to be taken every `STEP_S` simulated seconds."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._bytes = [0.0] * len(simulator.nodes)
        names = ["time_s", "agents_left", "queued", "running"]
        names += [f"{what}_{node}" for what in ("snic", "staging_free") for node in simulator.nodes]
        self.columns: dict[str, list[float]] = {name: [] for name in names}

    def sample(self) -> None:
        """One row: the used share of each storage NIC since the last row, and how the queues and each node's staging stand now."""
        simulator, core = self._simulator, self._simulator.core
        passed = [link.bytes for link in simulator.snics]
        used = [(now - before) / link.bandwidth / STEP_S for link, now, before in zip(simulator.snics, passed, self._bytes, strict=True)]
        free = [core.node_account(node).free_slots / simulator.slots if simulator.slots else 1.0 for node in simulator.nodes]
        row = [simulator.loop.now, simulator.agents_left, core.queued, core.running, *used, *free]
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(float(value))
        self._bytes = passed

    def write(self, path: str | Path) -> None:
        """A parquet table with a column per quantity and node."""
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(self.columns), path)
