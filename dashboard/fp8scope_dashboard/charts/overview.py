"""The chart of the run page: scalars above, below them layers x steps, one facet for each role, one step axis.

Each quantity says what its colour means: shares on a log scale that begins at the smallest share seen (exact zeros have
the colour of the ground), headroom relative to the recipe's margin, the scale by how far it leaves its usual range (the
medians of what columns have as smallest and largest), so that a tensor that behaves as it always did has no colour.

A model with more layers than there are pixels has several layers in a row, whose colour is the worst one's: as with
columns of several steps, no extreme is lost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fp8core.records import Role
from fp8scope_collector.storage.reader import HeatMap, Scalar, Slot
from fp8scope_dashboard import text, theme
from fp8scope_dashboard.charts.panels import Stack, flat_where_missing, gaps_of, layer_axis, together, with_gaps

Matrix = npt.NDArray[np.float64]
Usual = npt.NDArray[np.float64]  # the usual lowest and highest value of each row: [2, rows, 1]

TITLES: dict[str, str] = {
    "headroom": "headroom − margin, bits",
    "scale_exp2": "log2 scale, distance from its usual range",
    "amax": "amax, log2",
    "overflow": "overflow, share of elements",
    "underflow": "underflow, share of elements",
    "subnormal": "subnormal, share of elements",
    "nonfinite": "NaN and Inf, share of elements",
    "sqnr_db": "SQNR − what the format gives normal data, dB",
    "spread": "amax, largest rank against smallest, bits",
}
SHARES = ("overflow", "underflow", "subnormal", "nonfinite")
# What the cast alone leaves of normally distributed data when the scale is right: 31.5 dB in E4M3, 25.5 dB in E5M2.
USUAL_SQNR_DB = {"E4M3FN": 31.5, "E4M3FNUZ": 31.5, "E5M2": 25.5, "E5M2FNUZ": 25.5}
WORDS: dict[str, tuple[str, str]] = {  # what the pointer calls it, and how it writes it
    "scale_exp2": ("scale", "exp2"),
    "amax": ("amax", "log2"),
    "headroom": ("headroom", "bits"),
    "sqnr_db": ("SQNR", "db"),
    "spread": ("spread", "bits"),
}
AGAINST: dict[str, tuple[str, str]] = {  # the same where only the distance from what is usual is known
    "headroom": ("vs margin", "change"),
    "sqnr_db": ("vs usual", "change"),
}
MAX_SCALARS = 3
_FACETS_PX = 640  # of all roles together, where there are many layers
_MEDIAN_COLUMNS, _QUANTILE_VALUES = 128, 20_000
MISSING, ZERO = -32768, -32767  # as panel.js reads fixed-point numbers


@dataclass(frozen=True)
class Shown:
    """A heat map made ready for the eye: coloured is `exact` less each row's `reference`; the pointer reads both.

    `worse` says which of several layers in one row counts: the one with the higher, the lower, or the farther colour.
    """

    exact: Matrix
    reference: Matrix | None
    scale: dict[str, Any]
    low: float
    high: float
    ticks: list[tuple[float, str]]
    title: str = ""
    per: int = 200  # the fixed-point unit that travels is 1/per
    lines: list[dict[str, Any]] = field(default_factory=list)  # what the pointer says
    usual: Usual | None = None  # of the scale, whose `exact` is the distance from it
    worse: Literal["high", "low", "far"] = "high"

    def of(self, rows: Sequence[int]) -> Matrix:
        """What the colour of these rows stands for."""
        return self.exact[rows] if self.reference is None else self.exact[rows] - self.reference[rows]


def overview(
    heatmap: HeatMap,
    slots: Sequence[Slot],
    scalars: Sequence[Scalar],
    first_step: int,
    last_step: int,
    *,
    shown: Shown | None = None,
) -> tuple[theme.Figure, int]:
    """The figure and its height in px; `slots` are the rows to show, in model order, `shown` what to colour."""
    shown = shown or made_ready(heatmap, slots)
    roles, per_role = _rows(slots)
    facet_px = float(np.clip(per_role * (12.5 if len(roles) == 1 else 4.4), *_facet_px(len(roles), per_role)))
    each = layers_a_row(slots)
    row_px = facet_px / per_role
    axis, boundaries, left = layer_axis([slot for slot in slots if slot.role == roles[0]], row_px)
    lines = list(by_importance(scalars))[:MAX_SCALARS]
    line_px = [84 if i == 0 else 40 for i in range(len(lines))]
    height = int(sum(line_px) + 24 * len(lines) + len(roles) * (facet_px + 26) + 44)
    stack = Stack(height, top=18, bottom=40)
    ticks = shown.ticks if len(roles) * facet_px > 240 else _fewer(shown)
    traces: list[dict[str, Any]] = []
    layout = theme.layout(margin={"l": left, "r": 64, "t": 18, "b": 40})
    layout["annotations"], layout["shapes"], layout["images"] = [], [], []
    for i, scalar in enumerate(lines):
        _add_scalar(traces, layout, scalar, i + 1, stack.take(line_px[i], 24))
    heat_top = 1.0
    for i, role in enumerate(roles):
        number = len(lines) + i + 1
        low, high = stack.take(facet_px, 26 if i + 1 < len(roles) else 0)
        heat_top = high if i == 0 else heat_top
        chosen = [j for j, slot in enumerate(slots) if slot.role == role]
        mine = [slots[j] for j in chosen]
        _add_facet(traces, layout, heatmap, mine, shown, chosen, number, (low, high), axis, facet_px, each)
        for boundary in boundaries:
            layout["shapes"].append(_boundary(boundary, number))
        heat_bottom = low
    layout["xaxis"] = theme.step_axis(first_step - 0.5, last_step + 0.5, anchor=_axis("y", len(lines) + len(roles)))
    layout["coloraxis"] = {
        "colorscale": shown.scale,
        "cmin": shown.low,
        "cmax": shown.high,
        "colorbar": {
            "x": 1.0,
            "xpad": 8,
            "y": heat_bottom,
            "yanchor": "bottom",
            "len": heat_top - heat_bottom,
            "ypad": 0,
            "thickness": 9,
            "outlinewidth": 0,
            "tickmode": "array",
            "tickvals": [value for value, _ in ticks],
            "ticktext": [name for _, name in ticks],
            "ticks": "",
        },
    }
    layout["annotations"].append(theme.label(shown.title, heat_top, x=1.0, xanchor="right"))
    return {"traces": traces, "layout": layout}, height


def layers_a_row(slots: Sequence[Slot]) -> int:
    """How many layers share a row, so that each row has a pixel."""
    roles, per_role = _rows(slots)
    return math.ceil(per_role / _facet_px(len(roles), per_role)[1])


def clicked(shown: Shown, slots: Sequence[Slot], number: int, column: int) -> Slot | None:
    """The slot that a click on the row of slot `number` means: of several layers the worst in that column."""
    here = next((slot for slot in slots if slot.slot == number), None)
    if here is None:
        return None
    mine = [i for i, slot in enumerate(slots) if slot.role == here.role]
    each = layers_a_row(slots)
    first = mine.index(slots.index(here)) // each * each
    row = mine[first : first + each]
    if not 0 <= column < shown.exact.shape[1]:
        return here
    values = shown.of(row)[:, column]
    badness = {"high": values, "low": -values, "far": np.abs(values)}[shown.worse]
    return slots[row[int(np.argmax(np.where(np.isnan(badness), -np.inf, badness)))]]


def _fewer(shown: Shown) -> list[tuple[float, str]]:
    """Every other tick: of a map around a middle with that, of shares with zero and one."""
    if shown.low == -shown.high:
        return shown.ticks[len(shown.ticks) // 2 % 2 :: 2]
    return [shown.ticks[0], *shown.ticks[1::2]]


def _rows(slots: Sequence[Slot]) -> tuple[list[Role], int]:
    """The roles that there are, and how many slots the largest has."""
    counts = {role: sum(slot.role == role for slot in slots) for role in Role}
    return [role for role, count in counts.items() if count], max(counts.values())


def _facet_px(roles: int, per_role: int) -> tuple[float, float]:
    """The least and the greatest height of a facet."""
    return 70 if per_role < 8 else 150, _FACETS_PX / roles + 70


def made_ready(heatmap: HeatMap, slots: Sequence[Slot], usual: Usual | None = None) -> Shown:
    """What is coloured and how, in words; `usual` as `ready`."""
    return _worded(heatmap, ready(heatmap, np.searchsorted(heatmap.slots, [s.slot for s in slots]), slots, usual))


def ready(heatmap: HeatMap, rows: npt.NDArray[np.int64], slots: Sequence[Slot], usual: Usual | None = None) -> Shown:
    """What is coloured and how, for the given rows; `usual` is that of all rows of a map of scales, where known."""
    quantity: str = heatmap.quantity
    every = np.array_equal(rows, np.arange(heatmap.slots.size))
    low, high = (side if every else side[rows] for side in (heatmap.low, heatmap.high))
    if quantity in SHARES:
        return _shares(quantity, high)
    if quantity == "headroom":
        margins = np.array([slot.margin for slot in slots], dtype=np.float64)[:, None]
        ticks = [(-6.0, "−6"), (-4.0, "−4"), (-2.0, "−2"), (0.0, "margin"), (2.0, "+2"), (4.0, "+4"), (6.0, "+6")]
        return Shown(low, margins, _maps(theme.HEADROOM), -6, 6, ticks, worse="low")
    if quantity == "sqnr_db":
        expected = np.array([USUAL_SQNR_DB.get(slot.format, np.nan) for slot in slots])[:, None]
        ticks = [(-12.0, "−12"), (-8.0, "−8"), (-4.0, "−4"), (0.0, "usual"), (4.0, "+4"), (8.0, "+8"), (12.0, "+12")]
        return Shown(low, expected, _maps(theme.HEADROOM), -12, 12, ticks, worse="low")
    if quantity == "spread":
        top = max(2.0, math.ceil(float(np.nanmax(high)))) if np.isfinite(high).any() else 2.0
        ends = np.unique(np.linspace(0, top, 5).round())
        colors = {name: [("$ground"), *shades] for name, shades in theme.SPREAD.items()}
        return Shown(high, None, _maps(colors), 0.0, top, [(mark, f"{mark:.0f}") for mark in ends])
    if quantity == "amax":
        with np.errstate(divide="ignore"):
            z = np.where(high > 0, np.log2(high), np.nan)
        bottom, top = _bounds(z)
        marks = np.unique(np.linspace(bottom, top, 6).round())
        maps = _maps({"light": theme.CIVIDIS, "dark": theme.CIVIDIS})
        return Shown(z, None, maps, bottom, top, [(mark, text.exp2(mark)) for mark in marks])
    lowest, highest = usual_range(heatmap)[:, rows] if usual is None else usual[:, rows]
    above, below = high - highest, low - lowest
    change = np.where(above >= -below, np.fmax(above, 0.0), np.fmin(below, 0.0))
    change[np.isnan(above)] = np.nan
    some = slice(None, None, -(-change.size // _QUANTILE_VALUES) if change.size else 1)
    size = max(2.0, math.ceil(_quantile(np.abs(change[:, some]), 0.99)))
    marks = np.unique(np.linspace(-size, size, 5).round())
    words = [(mark, f"{mark:+.0f}".replace("-", "−") if mark else "0") for mark in marks]
    where = np.stack([lowest, highest])
    return Shown(change, None, _maps(theme.DIVERGING), -size, size, words, usual=where, worse="far")


def _worded(heatmap: HeatMap, shown: Shown) -> Shown:
    """With the words and the precision of its quantity."""
    quantity: str = heatmap.quantity
    name, form = WORDS.get(quantity, (quantity, "log10share"))
    lines: list[dict[str, Any]] = [{"name": name, "format": form}]
    if quantity == "scale_exp2":
        lines = [{"name": name, "format": form, "usual": True}, {"name": "vs usual", "format": "change"}]
    per = 1000 if quantity in SHARES else 100 if quantity == "sqnr_db" else 200
    return replace(shown, title=TITLES[quantity], per=per, lines=lines)


def fixed(values: Matrix, per: int) -> npt.NDArray[np.int16]:
    """Values in units of 1/per, half as large as floats; NaN and the zero of a log scale have codes of their own."""
    codes = np.clip(np.round(np.nan_to_num(values) * per), ZERO + 1, -MISSING - 1)
    return np.where(np.isnan(values), MISSING, np.where(values <= -99, ZERO, codes)).astype(np.int16)


def _shares(quantity: str, ratio: Matrix) -> Shown:
    with np.errstate(divide="ignore"):
        z = np.where(ratio > 0, np.log10(ratio), np.where(np.isnan(ratio), np.nan, -99.0))
    smallest = float(np.nanmin(np.where(z > -99, z, np.nan))) if (z > -99).any() else -6.0
    bottom = min(-3.0, math.floor(smallest))
    zero = 0.07 * -bottom  # the part of the bar below the smallest share: zero
    colors = theme.LOST if quantity in ("underflow", "subnormal") else theme.SHARE
    scale = {"$theme": {name: theme.share_scale(shades, 0.07 / 1.07) for name, shades in colors.items()}}
    every = 1 if -bottom <= 6 else 2
    ticks = [(bottom - zero / 2, "0")] + [(float(e), text.share(10.0**e)) for e in range(0, int(bottom) - 1, -every)]
    return Shown(z, None, scale, bottom - zero, 0.0, ticks)


def _add_scalar(
    traces: list[Any], layout: dict[str, Any], scalar: Scalar, number: int, domain: tuple[float, float]
) -> None:
    gaps = gaps_of(scalar.step, scalar.last)
    middle = (scalar.step + scalar.last) / 2
    (x, low), (_, high) = with_gaps(middle, scalar.low, gaps), with_gaps(middle, scalar.high, gaps)
    mean = (low + high) / 2
    band = {"type": "scatter", "mode": "lines", "xaxis": "x", "yaxis": _axis("y", number), "hoverinfo": "skip", "x": x}
    if (high > low).any():
        bottom, top = flat_where_missing(low, high)
        filled = {"line": {"width": 0}, "fillcolor": "$grid"}
        traces.append(band | filled | {"y": bottom.astype(np.float32)})
        traces.append(band | filled | {"y": top.astype(np.float32), "fill": "tonexty"})
    line = {"line": {"width": 1.3, "color": "$text"}, "hoverinfo": "none"}
    about = {"name": text.shorten(scalar.name, 24), "format": "number"}
    traces.append(band | line | {"y": mean.astype(np.float32), "about": about})
    if scalar.missing.any():
        nan = {
            "mode": "markers",
            "marker": {"symbol": "x-thin", "size": 7, "line": {"width": 1.5, "color": "$critical"}},
        }
        there = np.flatnonzero(scalar.missing)
        lowest = float(np.nanmin(scalar.low)) if np.isfinite(scalar.low).any() else 0.0
        traces.append(band | nan | {"x": middle[there], "y": np.full(there.size, lowest, np.float32)})
    finite = mean[np.isfinite(mean)]
    spread = (float(np.nanmin(scalar.low)), float(np.nanmax(scalar.high))) if finite.size else (0.0, 1.0)
    pad = (spread[1] - spread[0]) * 0.08 or abs(spread[0]) * 0.1 or 1.0
    layout[_axis("yaxis", number)] = theme.value_axis(*domain, range=[spread[0] - pad, spread[1] + pad], nticks=3)
    now = f"  {text.number(float(finite[-1]))}" if finite.size else ""
    name = text.plain(text.shorten(scalar.name, 40))
    layout["annotations"].append(theme.label(f"<b>{name}</b>{now}", domain[1], color="$text"))
    if scalar.missing.any():
        first = int(scalar.step[np.flatnonzero(scalar.missing)[0]])
        note = f"NaN at {text.count(int(scalar.missing.sum()))} steps, first {text.count(first)}"
        layout["annotations"].append(theme.label(note, domain[1], x=1.0, xanchor="right", color="$critical"))


def _add_facet(
    traces: list[Any],
    layout: dict[str, Any],
    heatmap: HeatMap,
    slots: Sequence[Slot],
    shown: Shown,
    rows: Sequence[int],
    number: int,
    domain: tuple[float, float],
    axis: dict[str, Any],
    height_px: float,
    each: int,
) -> None:
    about: dict[str, Any] = {"role": slots[0].role.value, "width": heatmap.width, "per": shown.per}
    z: dict[str, Any] = {"per": shown.per}
    if each == 1:
        z["$fixed"] = about["values"] = fixed(shown.exact[rows], shown.per)
        if shown.reference is not None:  # the browser subtracts: one matrix travels, not two
            z["rows"] = shown.reference[rows, 0].tolist()
        about |= {"lines": shown.lines, "names": [slot.layer for slot in slots]}
        if shown.usual is not None:
            about["usual"] = shown.usual[:, rows, 0].T.tolist()
    else:
        z["$fixed"] = about["values"] = fixed(_worst_of(shown.of(rows), each, shown.worse), shown.per)
        words = AGAINST.get(heatmap.quantity) if shown.reference is not None else None
        lines = [{"name": words[0], "format": words[1]}] if words else shown.lines[-1:]
        about |= {"lines": lines, "names": _row_names(tuple(slot.layer for slot in slots), each)}
    about["slots"] = [slot.slot for slot in slots[::each]]
    role = slots[0].role
    kinds = sorted({(slot.format, slot.margin) for slot in slots})
    traces.append(
        {
            "type": "heatmap",
            "xaxis": "x",
            "yaxis": _axis("y", number),
            "x": heatmap.steps + (heatmap.width - 1) / 2,
            "y": np.arange(len(about["slots"])) * np.float32(each) + np.float32(each - 1) / 2,  # rows are layers
            "z": z,
            "coloraxis": "coloraxis",
            "hoverinfo": "none",
            "hoverongaps": False,
            "about": about,
        }
    )
    layout[_axis("yaxis", number)] = axis | {
        "domain": list(domain),
        "range": [len(slots) - 0.5, -0.5],
        "fixedrange": True,
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
    }
    layout["images"].append(
        {
            "source": {"$theme": {name: _hatch(colors["hatch"], height_px) for name, colors in theme.PALETTES.items()}},
            "xref": "paper",
            "yref": "paper",
            "x": 0,
            "y": domain[1],
            "sizex": 1,
            "sizey": domain[1] - domain[0],
            "sizing": "fill",
            "xanchor": "left",
            "yanchor": "top",
            "layer": "below",
        }
    )
    kind = ", ".join(f"{form or 'format unknown'}, margin {margin}" for form, margin in kinds)
    title = f"<b>{role.value}</b>  <span style='font-size:10px'>{kind}</span>"
    layout["annotations"].append(theme.label(title, domain[1], color=theme.ROLE_COLOR[role]))


@functools.lru_cache(maxsize=64)
def _row_names(layers: tuple[str, ...], each: int) -> list[str]:
    return [together(layers[i : i + each]) for i in range(0, len(layers), each)]


def _worst_of(values: Matrix, each: int, worse: str) -> Matrix:
    """Rows of `each` layers, the worst of them in each column; NaN where nothing is recorded of any."""
    rows = -(-len(values) // each)
    whole = np.full((rows * each, values.shape[1]), np.nan)
    whole[: len(values)] = values
    groups = whole.reshape(rows, each, -1)
    high, low = np.fmax.reduce(groups, axis=1), np.fmin.reduce(groups, axis=1)
    if worse == "far":
        return np.asarray(np.where(high >= -low, high, low))
    return np.asarray(high if worse == "high" else low)


def _boundary(y: float, number: int) -> dict[str, Any]:
    line = {"color": "$ground", "width": 1}
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "yref": _axis("y", number),
        "y0": y,
        "y1": y,
        "line": line,
    }


def _hatch(color: str, height_px: float) -> str:
    """A data address of diagonal lines: where nothing is recorded."""
    size = f"width='1400' height='{height_px:.0f}'"
    pattern = (
        f"<svg xmlns='http://www.w3.org/2000/svg' {size}><defs><pattern id='h' width='7' height='7' "
        "patternUnits='userSpaceOnUse' patternTransform='rotate(45)'><line x1='0' y1='0' x2='0' y2='7' "
        f"stroke='{color}' stroke-width='2.4'/></pattern></defs><rect {size} fill='url(#h)'/></svg>"
    )
    return "data:image/svg+xml," + pattern.replace("#", "%23").replace("<", "%3C").replace(">", "%3E")


def by_importance(scalars: Sequence[Scalar]) -> list[Scalar]:
    """loss first, then gradient norms, then the rest by name; constant ones last."""

    def rank(scalar: Scalar) -> tuple[bool, int, str]:
        name = scalar.name.lower()
        order = 0 if name == "loss" else 1 if "loss" in name else 2 if "grad" in name else 3
        return bool(np.nanmax(scalar.high, initial=-np.inf) == np.nanmin(scalar.low, initial=np.inf)), order, name

    return sorted(scalars, key=rank)


def usual_range(heatmap: HeatMap) -> Usual:
    """Of each row the medians of its columns' smallest and largest values: [2, rows, 1]."""
    return np.stack([_median(heatmap.low), _median(heatmap.high)])


def _median(values: Matrix) -> Matrix:
    """Each row's median in whole powers of two, as a column; 0 where nothing is recorded."""
    if not values.shape[1]:
        return np.zeros((len(values), 1))
    some = values[:, :: -(-values.shape[1] // _MEDIAN_COLUMNS)]  # from the start on: a new column rarely moves it
    if np.isnan(some).any():
        some = np.where(np.isnan(some).all(axis=1, keepdims=True), 0.0, some)
        return np.asarray(np.round(np.nanmedian(some, axis=1, keepdims=True)), dtype=np.float64)
    return np.asarray(np.round(np.median(some, axis=1, keepdims=True)), dtype=np.float64)


def _quantile(values: Matrix, q: float) -> float:
    """A quantile of what is finite, of large arrays from every n-th value."""
    some = values.ravel()[:: max(1, values.size // _QUANTILE_VALUES)]
    return float(np.quantile(some[np.isfinite(some)], q)) if np.isfinite(some).any() else 0.0


def _bounds(z: Matrix) -> tuple[float, float]:
    if not np.isfinite(z).any():
        return 0.0, 1.0
    low, high = _quantile(z, 0.001), _quantile(z, 0.999)
    return (low, high) if high - low > 1 else (low - 1, high + 1)


def _maps(colors: dict[str, list[str]]) -> dict[str, Any]:
    return {"$theme": {name: theme.scale(shades) for name, shades in colors.items()}}


def _axis(name: str, number: int) -> str:
    return name if number == 1 else f"{name}{number}"
