"""What computing a prompt costs a prefill engine, fitted to its own last batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW, LEAST = 256, 6  # batches


@dataclass(frozen=True, slots=True)
class FittedCost:
    """Seconds of a batch: fixed_s + token_s per computed token + pair_s per pair of a computed token and one before it."""

    fixed_s: float
    token_s: float
    pair_s: float


class PrefillCost:
    """Least squares of relative errors over the last `WINDOW` batches, with no coefficient below 0. One thread adds and fits.

    Where all batches were alike, a coefficient may stand for another one: the curve is right for such batches, and a guess for others until
    one has come.
    """

    def __init__(self) -> None:
        self._rows: deque[tuple[float, float, float, float]] = deque(maxlen=WINDOW)
        self._fitted: FittedCost | None = None
        self._new = 0

    def add(self, chunks: Iterable[tuple[int, int]], seconds: float) -> None:
        """A batch of (cached, new) tokens took `seconds`, waiting for KV not included."""
        if seconds <= 0:
            return
        sizes = list(chunks)
        pairs = sum(new * (cached + new / 2) for cached, new in sizes)
        self._rows.append((1.0, float(sum(new for _, new in sizes)), pairs, seconds))
        self._new += 1

    def fitted(self) -> FittedCost | None:
        """None before there are `LEAST` batches, and while nothing says that more tokens cost more."""
        if len(self._rows) >= LEAST and self._new > len(self._rows) // 16:
            self._new = 0
            self._fitted = _fit(np.array(self._rows))
        return self._fitted


def _fit(rows: npt.NDArray[np.float64]) -> FittedCost | None:
    relative = rows[:, :3] / rows[:, 3:]
    scale = relative.max(axis=0)
    left = [column for column in range(3) if scale[column] > 0]
    coefficients = np.zeros(3)
    while left:
        solution = np.linalg.lstsq(relative[:, left] / scale[left], np.ones(len(rows)), rcond=None)[0]
        if solution.min() >= 0:
            coefficients[left] = solution / scale[left]
            break
        left.pop(int(solution.argmin()))
    fixed_s, token_s, pair_s = (float(value) for value in coefficients)
    return FittedCost(fixed_s, token_s, pair_s) if token_s or pair_s else None
