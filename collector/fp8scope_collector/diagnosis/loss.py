"""The losses among a window's scalars, each with the values before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fp8scope_collector.diagnosis.window import LOOKBACK_SCALARS, Floats, Window


@dataclass(frozen=True)
class Loss:
    """One value of a loss: `row` is the index in the window of the first recorded step from its step on."""

    row: int
    value: float
    before: Floats


def losses(window: Window) -> Iterator[Loss]:
    """The new values of every scalar whose name ends in "loss"."""
    seen = window.steps[window.fresh - 1] if window.fresh else -1
    for name, series in window.scalars.items():
        if name.lower().endswith("loss"):
            rows = np.minimum(np.searchsorted(window.steps, series.steps), window.steps.size - 1)
            for i in np.flatnonzero(series.steps > seen):
                yield Loss(int(rows[i]), float(series.values[i]), series.values[max(0, i - LOOKBACK_SCALARS) : i])
