"""The heat maps of live runs: each tick fetches only what is new.

They are kept per (run, quantities, range) and shared by everybody who looks at them. Each tick asks the run's cursor
and reads the columns that may have changed; a resume or a new column width reads all again.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import streamlit as st

from fp8scope_collector.storage.reader import HeatMap, Progress, Quantity, Reader
from fp8scope_dashboard import queries
from fp8scope_dashboard.charts import overview, panels

Matrix = overview.Matrix
Ints = panels.Ints


@dataclass
class LiveHeatMaps:
    """Heat maps of some quantities over one range, extended by what is new; `last_step` None follows the run."""

    run_id: int
    quantities: tuple[Quantity, ...]
    first_step: int
    last_step: int | None
    progress: Progress | None = None
    _maps: list[_Growing] = field(default_factory=list)
    _read_at: float = 0.0
    _usual: tuple[int, overview.Usual] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def usual_range(self, heatmap: HeatMap) -> overview.Usual:
        """Where the scales usually are, kept until there are a tenth more columns, so that old columns stay."""
        columns = heatmap.low.shape[1]
        known = self._usual
        if known is None or not known[0] <= columns <= 1.1 * known[0]:
            known = self._usual = (columns, overview.usual_range(heatmap))
        return known[1]

    def read(self) -> dict[Quantity, HeatMap]:
        """The maps as they are now, at most half a second old; none before the first row."""
        with self._lock:
            if time.monotonic() - self._read_at > 0.5:
                self._update(queries.reader())
                self._read_at = time.monotonic()
            return {growing.quantity: growing.map() for growing in self._maps}

    def _update(self, source: Reader) -> None:
        before, now = self.progress, source.progress(self.run_id)
        if now is None or now == before:
            return
        end = now.last_step if self.last_step is None else self.last_step
        whole = True
        if self._maps and before is not None and before.lives == now.lives and self._maps[0].columns:
            width, first_column = self._maps[0].width, self._maps[0].first_column
            whole = end // width - first_column + 1 > panels.MAX_COLUMNS
        if whole:
            self._usual = None
            found = source.heatmaps(
                self.run_id, self.quantities, first_step=self.first_step, last_step=end, max_columns=panels.MAX_COLUMNS
            )
            self._maps = [_Growing.of(heatmap) for heatmap in found]
        else:
            assert before is not None
            since = max(before.settled_step + 1, first_column * width)
            parts = source.heatmaps(self.run_id, self.quantities, first_step=since, last_step=end, width=width)
            for growing, part in zip(self._maps, parts, strict=True):
                growing.extend(part)
        self.progress = now


@dataclass
class _Growing:
    """One heat map with room for columns to come: a tick writes its few, and copies nothing."""

    quantity: Quantity
    width: int
    first_column: int
    slots: Ints
    columns: int
    low: Matrix
    high: Matrix

    @classmethod
    def of(cls, heatmap: HeatMap) -> _Growing:
        """A map that was read, with room."""
        columns = heatmap.low.shape[1]
        room = np.full((heatmap.slots.size, max(columns, panels.MAX_COLUMNS) - columns), np.nan)
        low, high = (np.hstack([side, room]) for side in (heatmap.low, heatmap.high))
        return cls(heatmap.quantity, heatmap.width, heatmap.first_column, heatmap.slots, columns, low, high)

    def extend(self, part: HeatMap) -> None:
        """Takes in the extremes of newer steps, which may have been known of some ranks before."""
        if not part.low.shape[1] or part.slots.size != self.slots.size:
            return
        start = part.first_column - self.first_column
        self.columns = max(self.columns, start + part.low.shape[1])
        here = slice(start, start + part.low.shape[1])
        self.low[:, here] = np.fmin(self.low[:, here], part.low)
        self.high[:, here] = np.fmax(self.high[:, here], part.high)

    def map(self) -> HeatMap:
        """What is known now."""
        low, high = (side[:, : self.columns] for side in (self.low, self.high))
        return HeatMap(self.quantity, self.width, self.first_column, self.slots, low, high)


@st.cache_resource(max_entries=24, show_spinner=False)
def live_heatmaps(
    _url: str, run_id: int, quantities: tuple[Quantity, ...], first_step: int, last_step: int | None
) -> LiveHeatMaps:
    """The shared heat maps of this run, these quantities and this range."""
    return LiveHeatMaps(run_id, quantities, first_step, last_step)
