"""Runs against each other: the difference of two heat maps, where it begins, and curves of several runs on one axis.

Values are compared in the unit that people compare them in: powers of two for scale, amax and headroom, decibels for
the SQNR, powers of ten for shares (a share of zero counts as one in a hundred million). One unit (three decibels) is a
difference worth a look: runs that differ by a seed differ by less almost everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8core.records import Role
from fp8scope_collector.storage.reader import HeatMap, Quantity, Scalar, Series, Slot
from fp8scope_dashboard import text, theme
from fp8scope_dashboard.charts import overview
from fp8scope_dashboard.charts.panels import Stack, gaps_of, with_gaps

Matrix = npt.NDArray[np.float64]
_SMALLEST_SHARE = 1e-8
_NAMES = {"scale_exp2": "log2 scale", "amax": "log2 amax", "sqnr_db": "SQNR"}
UNITS = {"scale_exp2": "bits", "amax": "bits", "headroom": "bits", "spread": "bits", "sqnr_db": "dB"}


@dataclass(frozen=True)
class Aligned:
    """Two heat maps of one quantity with the same rows (`slots`, as the first run numbers them) and columns."""

    quantity: Quantity
    width: int
    first_column: int
    slots: list[Slot]
    one: Matrix
    other: Matrix

    @property
    def difference(self) -> Matrix:
        """The other run less the first, in the quantity's unit; NaN where one of them has nothing."""
        return self.other - self.one


@dataclass(frozen=True)
class Divergence:
    """The first column in which a tensor differs by at least a unit, and the tensor that differs most there."""

    slot: Slot
    first_step: int
    last_step: int
    one: float
    other: float


def threshold(quantity: str) -> float:
    """The difference that counts."""
    return 3.0 if quantity == "sqnr_db" else 1.0


def aligned(one: HeatMap, slots: Sequence[Slot], other: HeatMap, other_slots: Sequence[Slot]) -> Aligned:
    """Both maps on the rows that the runs share, in columns as wide as the wider one's."""
    width = max(one.width, other.width)
    one, other = coarser(one, width), coarser(other, width)
    numbers = {(slot.layer, slot.role): slot.slot for slot in other_slots}
    shared = [slot for slot in slots if (slot.layer, slot.role) in numbers]
    theirs = [numbers[slot.layer, slot.role] for slot in shared]
    start = min(one.first_column, other.first_column)
    end = max(heatmap.first_column + heatmap.low.shape[1] for heatmap in (one, other))
    a = _placed(one, [slot.slot for slot in shared], start, end)
    b = _placed(other, theirs, start, end)
    return Aligned(one.quantity, width, start, shared, a, b)


def coarser(heatmap: HeatMap, width: int) -> HeatMap:
    """The map with columns of `width` steps, a power of two not below its own; extremes are kept."""
    factor = width // heatmap.width
    columns = heatmap.low.shape[1]
    if factor == 1 or not columns:
        return replace(heatmap, width=width)
    first = heatmap.first_column // factor
    starts = np.flatnonzero(np.diff((heatmap.first_column + np.arange(columns)) // factor, prepend=first - 1))
    low, high = np.fmin.reduceat(heatmap.low, starts, axis=1), np.fmax.reduceat(heatmap.high, starts, axis=1)
    return replace(heatmap, width=width, first_column=first, low=low, high=high)


def divergence(pair: Aligned) -> Divergence | None:
    """Where the runs begin to differ; None: nowhere."""
    size = np.abs(np.nan_to_num(pair.difference))
    columns = np.flatnonzero((size >= threshold(pair.quantity)).any(axis=0))
    if not columns.size:
        return None
    column = int(columns[0])
    row = int(np.argmax(size[:, column]))
    first = (pair.first_column + column) * pair.width
    values = float(pair.one[row, column]), float(pair.other[row, column])
    return Divergence(pair.slots[row], first, first + pair.width - 1, *values)


def said(quantity: str, value: float) -> str:
    """A compared value as people write the quantity."""
    if quantity in ("scale_exp2", "amax"):
        return text.exp2(round(value, 2))
    if quantity in UNITS:
        return f"{text.number(value)} {UNITS[quantity]}"
    return text.share(0.0 if value <= math.log10(_SMALLEST_SHARE) else 10.0**value)


def difference(pair: Aligned) -> overview.Shown:
    """The difference as a heat map's colours: none where the runs agree, warm and cold where not."""
    values = pair.difference
    unit = UNITS.get(pair.quantity, "powers of ten")
    size = 2.0
    if np.isfinite(values).any():
        size = max(2.0 * threshold(pair.quantity), math.ceil(float(np.nanquantile(np.abs(values), 0.98))))
    marks = np.unique(np.linspace(-size, size, 5).round())
    ticks = [(float(mark), f"{mark:+.0f}".replace("-", "−") if mark else "0") for mark in marks]
    return overview.Shown(
        exact=values,
        reference=None,
        scale={"$theme": {name: theme.scale(shades) for name, shades in theme.DIVERGING.items()}},
        low=-size,
        high=size,
        ticks=ticks,
        title=f"{_NAMES.get(pair.quantity, pair.quantity)}, difference in {unit}",
        per=200,
        lines=[{"name": "difference", "format": "change"}],
        worse="far",
    )


def difference_map(
    pair: Aligned, shown: overview.Shown, heatmap: HeatMap, first_step: int, last_step: int
) -> tuple[theme.Figure, int]:
    """The difference with the run page's rows."""
    columns = replace(
        heatmap,
        width=pair.width,
        first_column=pair.first_column,
        slots=np.arange(len(pair.slots)),
        low=shown.exact,
        high=shown.exact,
    )
    return overview.overview(columns, pair.slots, [], first_step, last_step, shown=shown)


def scalar_curves(
    curves: Sequence[tuple[str, Sequence[Scalar]]], names: Sequence[str], first_step: int, last_step: int
) -> tuple[theme.Figure, int]:
    """Some numbers of the training loop, one panel each with all runs."""
    height = 18 + 40 + 110 * len(names) + 24 * max(0, len(names) - 1)
    stack = Stack(height, 18, 40)
    traces: list[dict[str, Any]] = []
    layout = theme.layout(margin={"l": 60, "r": 64, "t": 18, "b": 40}, hovermode="x")
    layout["annotations"], layout["shapes"] = [], []
    for i, name in enumerate(names):
        low, high = stack.take(110, 24)
        for number, (run, scalars) in enumerate(curves):
            scalar = next((scalar for scalar in scalars if scalar.name == name), None)
            if scalar is not None and scalar.step.size:
                middle = (scalar.low + scalar.high) / 2
                traces.append(_curve(scalar.step, scalar.last, middle, run, number, i, "number"))
        layout[_axis("yaxis", i)] = theme.value_axis(low, high, nticks=4)
        title = f"<b>{text.plain(text.shorten(name, 40))}</b>"
        layout["annotations"].append(theme.label(title, high, color="$text"))
    layout["xaxis"] = theme.step_axis(first_step - 0.5, last_step + 0.5, anchor=_axis("y", len(names) - 1))
    return {"traces": traces, "layout": layout}, height


def tensor_curves(
    curves: Sequence[tuple[str, Series]], role: Role, first_step: int, last_step: int, step: int | None
) -> tuple[theme.Figure, int]:
    """Scale, amax, headroom and SQNR of one tensor in all runs."""
    fields = [
        ("scale_exp2", "scale, log2", "exp2"),
        ("amax", "amax, log2", "log2"),
        ("headroom", "headroom, bits", "bits"),
    ]
    fields += [("sqnr_db", "SQNR, dB", "db")]
    height = 18 + 40 + 92 * len(fields) + 24 * (len(fields) - 1)
    stack = Stack(height, 18, 40)
    traces: list[dict[str, Any]] = []
    layout = theme.layout(margin={"l": 60, "r": 64, "t": 18, "b": 40}, hovermode="x")
    layout["annotations"], layout["shapes"] = [], []
    for i, (field, title, form) in enumerate(fields):
        low, high = stack.take(92, 24)
        for number, (run, series) in enumerate(curves):
            values = series.high[field] if field in ("amax", "scale_exp2") else series.low[field]
            if field == "amax":
                values = np.log2(np.where(values > 0, values, np.nan))
            traces.append(_curve(series.step, series.last, values, run, number, i, form, stepped=field == "scale_exp2"))
        layout[_axis("yaxis", i)] = theme.value_axis(low, high, nticks=4)
        layout["annotations"].append(theme.label(f"<b>{title}</b>", high, color="$text"))
    if step is not None:
        at = {"type": "line", "xref": "x", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1}
        layout["shapes"].append(at | {"line": {"color": "$text", "width": 1, "dash": "dot"}})
    layout["xaxis"] = theme.step_axis(first_step - 0.5, last_step + 0.5, anchor=_axis("y", len(fields) - 1))
    return {"traces": traces, "layout": layout}, height


def _curve(
    step: npt.NDArray[np.int64],
    last: npt.NDArray[np.int64],
    values: Matrix,
    run: str,
    number: int,
    panel: int,
    form: str,
    *,
    stepped: bool = False,
) -> dict[str, Any]:
    x, y = with_gaps((step + last) / 2, values, gaps_of(step, last)) if step.size else (step, values)
    return {
        "type": "scatter",
        "mode": "lines",
        "xaxis": "x",
        "yaxis": _axis("y", panel),
        "x": x,
        "y": y.astype(np.float32),
        "line": {"width": 1.3, "color": theme.RUN_COLORS[number], **({"shape": "hv"} if stepped else {})},
        "hoverinfo": "none",
        "about": {"name": text.shorten(run, 28), "format": form},
    }


def _placed(heatmap: HeatMap, numbers: Sequence[int], start: int, end: int) -> Matrix:
    """The rows of these slots in the columns [start, end), in the unit of comparison."""
    placed = np.full((len(numbers), end - start), np.nan)
    rows = np.searchsorted(heatmap.slots, numbers)
    low_is_worse = heatmap.quantity in ("headroom", "sqnr_db")
    values = (heatmap.low if low_is_worse else heatmap.high)[rows]
    if heatmap.quantity == "amax":
        values = np.log2(np.where(values > 0, values, np.nan))
    elif heatmap.quantity in overview.SHARES:
        values = np.log10(np.maximum(values, _SMALLEST_SHARE))
    at = heatmap.first_column - start
    placed[:, at : at + values.shape[1]] = values
    return placed


def _axis(name: str, number: int) -> str:
    return name if number == 0 else f"{name}{number + 1}"
