"""The worst tensors: what the newest steps lost to NaN, overflow and underflow, in this order, with when it began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fp8scope_collector.storage.reader import HeatMap, Quantity, Slot
from fp8scope_dashboard import text
from fp8scope_dashboard.charts.panels import spark

LOSSES: tuple[Quantity, ...] = ("nonfinite", "overflow", "underflow")
_WORDS = {"nonfinite": "NaN, Inf", "overflow": "overflow", "underflow": "underflow"}


@dataclass(frozen=True)
class Worst:
    """One entry: the largest share within the newest steps, since when, and its course over the steps shown."""

    slot: Slot
    what: str
    share: float
    since: str
    spark: list[float | None]
    color: str


def worst(maps: Sequence[HeatMap], slots: Sequence[Slot], recent_steps: int, limit: int) -> list[Worst]:
    """The slots that lost most, the worst kind of loss first, each slot once."""
    entries: list[Worst] = []
    listed: set[int] = set()
    numbers = [slot.slot for slot in slots]
    for heatmap in maps:
        recent = -(-recent_steps // heatmap.width)
        rows = np.searchsorted(heatmap.slots, numbers)
        newest = np.fmax.reduce(heatmap.high[:, -recent:], axis=1, initial=np.nan)[rows]
        for i in np.argsort(-newest, kind="stable").tolist():
            slot = slots[i]
            if not newest[i] > 0 or len(entries) == limit:
                break
            if slot.slot not in listed:
                listed.add(slot.slot)
                shares = heatmap.high[rows[i]]
                color = "underflow" if heatmap.quantity == "underflow" else "overflow"
                since = _since(shares > 0, heatmap.steps)
                bars = spark(_heights(shares))
                entries.append(Worst(slot, _WORDS[heatmap.quantity], float(newest[i]), since, bars, color))
    return entries


def _heights(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Shares on a log scale from one in ten million: 0 to 1, zero stays 0."""
    with np.errstate(divide="ignore"):
        heights = np.clip(np.log10(shares) / 7 + 1, 0.08, 1)
    return np.where(shares > 0, heights, np.where(np.isnan(shares), np.nan, 0.0))


def _since(bad: npt.NDArray[np.bool_], steps: npt.NDArray[np.int64]) -> str:
    """When the present episode began: a tenth of what is shown without a loss would have ended it."""
    columns = np.flatnonzero(bad)
    breaks = np.flatnonzero(np.diff(columns) > max(2, bad.size // 10))
    start = columns[breaks[-1] + 1] if breaks.size else columns[0]
    return f"since step {text.count(int(steps[start]))}"
