"""What verifying checksums costs a load: reads with and without it, in pairs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall time, and processor time of the whole process."""

    seconds: float
    cpu_seconds: float


def costed(action: Callable[[], None]) -> Cost:
    cpu, start = time.process_time(), time.perf_counter()
    action()
    return Cost(time.perf_counter() - start, time.process_time() - cpu)


@dataclass(slots=True)
class ChecksumCost:
    """Reads of `nbytes` each. The two of a pair follow each other at once, in turns in either order, so that both meet the same noise.

    What remains of the noise shows in the quartiles of the pairs' differences: a median between quartiles of either sign is not resolved
    by wall time. Processor time is what it is, whoever else uses the machine.
    """

    nbytes: int
    pairs: list[tuple[Cost, Cost]] = field(default_factory=list)

    def measure(self, read: Callable[[bool], Cost]) -> None:
        """One more pair; `read` is told whether to verify."""
        if len(self.pairs) % 2 == 0:
            checked = read(True)
            self.pairs.append((checked, read(False)))
        else:
            unchecked = read(False)
            self.pairs.append((read(True), unchecked))

    def figures(self) -> dict[str, Any]:
        """`checksum_cost`: share of a load's time; `checksum_cpu_s_per_gb` beside all that a load needs, `read_cpu_s_per_gb`."""
        shares = [(checked.seconds - unchecked.seconds) / checked.seconds for checked, unchecked in self.pairs]
        used = [checked.cpu_seconds - unchecked.cpu_seconds for checked, unchecked in self.pairs]
        gb = self.nbytes / 1e9
        return {
            "checksum_cost": statistics.median(shares),
            "checksum_cost_quartiles": quartiles(shares),
            "checksum_cost_pairs": len(shares),
            "checksum_cpu_s_per_gb": statistics.median(used) / gb,
            "read_cpu_s_per_gb": statistics.median(checked.cpu_seconds for checked, _ in self.pairs) / gb,
        }


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]
