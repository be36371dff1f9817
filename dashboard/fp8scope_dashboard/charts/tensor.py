"""The chart of the tensor page: what the format can hold, in the tensor's own units, and where the tensor lies in it.

The window is [smallest subnormal, max] divided by the scale, so it moves as the scale moves; amax is a line inside it,
overflow a strip above and underflow a strip below, and each change of the scale a tick. Where a point stands for
several steps the window's top is the lowest of them and amax the highest: the picture errs towards the bad case.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8core.formats import FORMATS, Fp8Format
from fp8scope_collector.storage.reader import Histograms, Series, Slot
from fp8scope_dashboard import text, theme
from fp8scope_dashboard.charts.panels import Stack, flat_where_missing, gaps_of, with_gaps

Floats = npt.NDArray[np.float64]

# What `tensor_figure` and the table beside it read.
FIELDS = (
    *("amax", "scale_min", "scale_max", "scale_exp2", "headroom", "numel", "zeros"),
    *("overflow", "underflow", "subnormal", "nonfinite", "sum_sq"),
    *("overflow_ratio", "underflow_ratio", "subnormal_ratio", "sqnr_db"),
)
MARGIN = {"l": 78, "r": 16, "t": 22, "b": 40}
_LINE = {"type": "scatter", "mode": "lines", "xaxis": "x", "hoverinfo": "none"}
_STEPS = {"shape": "hv"}


def tensor_figure(
    series: Series,
    slot: Slot,
    first_step: int,
    last_step: int,
    step: int | None,
    histograms: Histograms | None = None,
) -> tuple[theme.Figure, int]:
    """Window, strips, scale, headroom, shares and SQNR of one tensor on one step axis; `step` is marked.

    Where magnitudes were sampled, their density lies behind the window.
    """
    heights = {"overflow": 13, "window": 270, "underflow": 13, "scale": 70, "headroom": 78, "shares": 92, "sqnr": 64}
    gaps = {"overflow": 2, "window": 2, "underflow": 30, "scale": 26, "headroom": 26, "shares": 26, "sqnr": 0}
    height = sum(heights.values()) + sum(gaps.values()) + MARGIN["t"] + MARGIN["b"]
    stack = Stack(height, MARGIN["t"], MARGIN["b"])
    domain = {name: stack.take(px, gaps[name]) for name, px in heights.items()}
    layout = theme.layout(margin=MARGIN, hovermode="x")
    layout["annotations"], layout["shapes"] = [], []
    traces: list[dict[str, Any]] = []
    series = _interrupted(series)
    fmt = FORMATS.get(slot.format)
    if fmt is not None:
        held = f"band: what {fmt} holds in this tensor's units, max {text.number(fmt.max)} / scale; pale: subnormal"
        legend = f"{held}  ·  line: <b>amax</b>  ·  dotted: rms  ·  ticks: the scale changed"
        layout["annotations"].append(theme.label(legend, 1.0))
    if histograms is not None and histograms.step.size:
        traces.append(density(histograms, _axis("y", 2)))
    _strip(traces, layout, series, "overflow", 1, domain["overflow"], slot)
    _window(traces, layout, series, fmt, slot, 2, domain["window"])
    _strip(traces, layout, series, "underflow", 3, domain["underflow"], slot)
    _scale(traces, layout, series, 4, domain["scale"])
    _headroom(traces, layout, series, slot, 5, domain["headroom"], first_step, last_step)
    _shares(traces, layout, series, 6, domain["shares"])
    _sqnr(traces, layout, series, 7, domain["sqnr"])
    layout["xaxis"] = theme.step_axis(first_step - 0.5, last_step + 0.5, anchor="y7")
    if step is not None:
        line = {"color": "$text", "width": 1, "dash": "dot"}
        layout["shapes"].append(
            {"type": "line", "xref": "x", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1, "line": line}
        )
        at: dict[str, Any] = {
            "xref": "x",
            "x": step,
            "xanchor": "left",
            "xshift": 3,
            "yanchor": "top",
            "font": {"size": 10, "color": "$text"},
        }
        layout["annotations"].append(theme.label(f"step {text.count(step)}", domain["window"][1], **at))
    return {"traces": traces, "layout": layout}, height


def small_figure(series: Series, slot: Slot, first_step: int, last_step: int) -> tuple[theme.Figure, int]:
    """Only the window of a tensor, small: for the other roles of a layer."""
    height = 170
    layout = theme.layout(margin={"l": 52, "r": 10, "t": 22, "b": 34}, hovermode="x")
    layout["annotations"], layout["shapes"] = [], []
    traces: list[dict[str, Any]] = []
    series = _interrupted(series)
    _window(traces, layout, series, FORMATS.get(slot.format), slot, 1, (0.0, 1.0), small=True)
    name = f"<b>{slot.role.value}</b>  <span style='font-size:10px'>{slot.format}, margin {slot.margin}</span>"
    layout["annotations"].append(theme.label(name, 1.0, color=theme.ROLE_COLOR[slot.role]))
    layout["xaxis"] = theme.step_axis(first_step - 0.5, last_step + 0.5, anchor="y", nticks=5, title={"text": ""})
    return {"traces": traces, "layout": layout}, height


def _interrupted(series: Series) -> Series:
    """The series with a missing point in each gap."""
    gaps = gaps_of(series.step, series.last)
    if not gaps.size:
        return series
    middle = _middle(series)
    first, last = (
        np.insert(ends, np.repeat(gaps, 2), np.stack([series.last[gaps - 1], series.step[gaps]], 1).ravel())
        for ends in (series.step, series.last)
    )
    low, high = ({n: with_gaps(middle, v, gaps)[1] for n, v in side.items()} for side in (series.low, series.high))
    return Series(first, last, np.insert(series.count, np.repeat(gaps, 2), 0), low, high)


def _window(
    traces: list[Any],
    layout: dict[str, Any],
    series: Series,
    fmt: Fp8Format | None,
    slot: Slot,
    number: int,
    domain: tuple[float, float],
    *,
    small: bool = False,
) -> None:
    """What the format can hold as bands, rms and amax as lines in it; changes of the scale as marks below."""
    x, yaxis = _middle(series), _axis("y", number)
    amax_low, amax_high = _log2(series.low["amax"]), _log2(series.high["amax"])
    rms = _log2(series.high["sum_sq"] / np.where(series.high["numel"] > 0, series.high["numel"], np.nan)) / 2
    edges = [amax_high, rms]
    if fmt is not None:
        limits = [
            math.log2(v) - series.high["scale_exp2"] for v in (fmt.smallest_subnormal, fmt.smallest_normal, fmt.max)
        ]
        edges += limits
        _bands(traces, x, limits, yaxis, theme.ROLE_COLOR[slot.role])
    found = np.concatenate([edge[np.isfinite(edge)] for edge in edges])
    low, high = _padded(float(found.min()), float(found.max())) if found.size else (-8.0, 8.0)
    if fmt is not None and not small:
        _scale_marks(traces, x, series.high["scale_exp2"], yaxis, low + 0.022 * (high - low))
    line = _LINE | {"x": x, "yaxis": yaxis}
    if (amax_high > amax_low).any():
        bottom, top = flat_where_missing(amax_low, amax_high)
        traces.append(line | {"y": _f4(bottom), "line": {"width": 0}, "hoverinfo": "skip"})
        filled = {"fill": "tonexty", "fillcolor": "$grid", "line": {"width": 0}, "hoverinfo": "skip"}
        traces.append(line | {"y": _f4(top)} | filled)
    about = {"format": "log2", "slot": slot.slot}
    dotted = {"width": 1, "dash": "dot", "color": "$muted"}
    traces.append(line | {"y": _f4(rms), "line": dotted, "about": about | {"name": "rms"}})
    traces.append(
        line | {"y": _f4(amax_high), "line": {"width": 1.5, "color": "$text"}, "about": about | {"name": "amax"}}
    )
    ticks = _powers(low, high, 4 if small else 8)
    layout[_axis("yaxis", number)] = theme.value_axis(*domain, range=[low, high], **_exponents(ticks))
    if not small:
        layout[_axis("yaxis", number)]["title"] = {"text": "value", "standoff": 4}


def density(histograms: Histograms, yaxis: str) -> dict[str, Any]:
    """The share of elements in each power of two, log scale, at the steps where they were sampled."""
    counts = histograms.counts[1:255].astype(np.float64)
    share = counts / np.maximum(histograms.counts.sum(axis=0), 1)
    with np.errstate(divide="ignore"):
        z = np.where(share > 0, np.log10(share), np.nan)
    used = np.flatnonzero(np.isfinite(z).any(axis=1))
    rows = slice(used[0], used[-1] + 1) if used.size else slice(0, 1)
    return {
        "type": "heatmap",
        "xaxis": "x",
        "yaxis": yaxis,
        "x": (histograms.step + histograms.last) / 2,
        "y": np.arange(1, 255)[rows] - 127 + 0.5,  # the middle of 2**e to 2**(e + 1)
        "z": z[rows].astype(np.float32),
        "zmin": -7,
        "zmax": 0,
        "colorscale": [(0.0, "$ground"), (1.0, "$faint")],
        "showscale": False,
        "hoverinfo": "skip",
        "hoverongaps": False,
    }


def _bands(traces: list[Any], x: Floats, limits: list[Floats], yaxis: str, color: str) -> None:
    """From the smallest subnormal to the smallest normal pale, from there to the maximum stronger."""
    base = _LINE | {"x": x, "yaxis": yaxis}
    none = {"width": 0, **_STEPS}
    subnormal, normal, largest = (_f4(limit) for limit in flat_where_missing(*limits))
    about = {"format": "log2"}
    fill = {"fill": "tonexty", "fillcolor": "$band2"}
    edge = {"width": 1, "color": color, **_STEPS}
    traces += [
        base | {"y": subnormal, "line": none, "about": about | {"name": "subnormal"}},
        base | {"y": normal, "line": none, "about": about | {"name": "normal"}} | fill,
        base | {"y": largest, "line": none, "hoverinfo": "skip"} | fill | {"fillcolor": "$band"},
        base | {"y": _f4(limits[2]), "line": edge, "about": about | {"name": "max"}},
    ]


def _scale_marks(traces: list[Any], x: Floats, scale: Floats, yaxis: str, y: float) -> None:
    """A small mark at each point whose scale differs from the one before."""
    changed = np.flatnonzero(np.abs(np.diff(scale, prepend=np.nan)) > 0)
    if changed.size:
        marker = {"symbol": "line-ns", "size": 6, "line": {"width": 1, "color": "$muted"}}
        at = {"x": x[changed], "y": np.full(changed.size, y, np.float32), "yaxis": yaxis}
        traces.append(_LINE | at | {"mode": "markers", "marker": marker, "hoverinfo": "skip"})


def _strip(
    traces: list[Any],
    layout: dict[str, Any],
    series: Series,
    kind: str,
    number: int,
    domain: tuple[float, float],
    slot: Slot,
) -> None:
    """One thin row of shares, coloured as the heat map colours them."""
    ratio = series.high[f"{kind}_ratio"]
    with np.errstate(divide="ignore"):
        z = np.where(ratio > 0, np.log10(ratio), np.where(np.isnan(ratio), np.nan, -99.0))
    colors = theme.SHARE if kind == "overflow" else theme.LOST
    traces.append(
        {
            "type": "heatmap",
            "xaxis": "x",
            "yaxis": _axis("y", number),
            "x": _middle(series),
            "y": np.arange(1),
            "z": z[None, :].astype(np.float32),
            "zmin": -6.4,
            "zmax": 0,
            "colorscale": {"$theme": {name: theme.share_scale(shades, 0.4 / 6.4) for name, shades in colors.items()}},
            "showscale": False,
            "hoverinfo": "skip",
        }
    )
    layout[_axis("yaxis", number)] = {
        "domain": list(domain),
        "fixedrange": True,
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
        "tickmode": "array",
        "tickvals": [0],
        "ticktext": [kind],
        "showline": False,
    }
    low, high = domain
    line = {"color": "$line", "width": 1}
    layout["shapes"].append(
        {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "yref": "paper", "y0": low, "y1": high, "line": line}
    )


def _scale(traces: list[Any], layout: dict[str, Any], series: Series, number: int, domain: tuple[float, float]) -> None:
    low, high = series.low["scale_exp2"], series.high["scale_exp2"]
    _band(traces, series, low, high, number, "$text", {"name": "scale", "format": "exp2"}, stepped=True)
    bottom, top = _range(low, high, least=2.0)
    ticks = _powers(bottom, top, 4)
    layout[_axis("yaxis", number)] = theme.value_axis(*domain, range=[bottom, top], **_exponents(ticks))
    layout["annotations"].append(theme.label("<b>scale</b>, multiplies into FP8", domain[1]))


def _headroom(
    traces: list[Any],
    layout: dict[str, Any],
    series: Series,
    slot: Slot,
    number: int,
    domain: tuple[float, float],
    first_step: int,
    last_step: int,
) -> None:
    low, high = series.low["headroom"], series.high["headroom"]
    _band(traces, series, low, high, number, "$text", {"name": "headroom", "format": "bits"}, worst=low)
    bottom, top = _range(low, high, least=2.0)
    bottom, top = min(bottom, -0.4), max(top, slot.margin + 0.6)
    axis = _axis("y", number)
    ends = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": axis}
    layout["shapes"] += [
        {
            "type": "rect",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "yref": axis,
            "y0": bottom,
            "y1": 0,
            "line": {"width": 0},
            "fillcolor": "$overflow",
            "opacity": 0.1,
            "layer": "below",
        },
        ends | {"y0": slot.margin, "y1": slot.margin, "line": {"color": "$muted", "width": 1, "dash": "dash"}},
    ]
    layout[_axis("yaxis", number)] = theme.value_axis(*domain, range=[bottom, top], nticks=4)
    layout["annotations"].append(
        theme.label(f"<b>headroom</b>, bits; dashed: margin {slot.margin}; below 0: clipping", domain[1])
    )


def _shares(
    traces: list[Any], layout: dict[str, Any], series: Series, number: int, domain: tuple[float, float]
) -> None:
    axis = {"yaxis": _axis("y", number)}
    x = _middle(series)
    smallest = 1e-3
    for kind, style in (("underflow", {"dash": "solid", "width": 1.1}), ("overflow", {"dash": "solid", "width": 1.5})):
        ratio = series.high[f"{kind}_ratio"]
        positive = np.where(ratio > 0, ratio, np.nan)
        if np.isfinite(positive).any():
            smallest = min(smallest, float(np.nanmin(positive)))
        with np.errstate(divide="ignore"):
            y = np.log10(positive)
        about = {"name": kind, "format": "share", "values": ratio.astype(np.float32)}
        traces.append(
            _LINE
            | axis
            | {
                "mode": "lines+markers",
                "marker": {"size": 2.5},
                "x": x,
                "y": _f4(y),
                "line": style | {"color": f"${kind}"},
                "about": about,
            }
        )
    bottom = math.floor(math.log10(smallest)) - 0.3
    ticks = list(range(0, math.floor(bottom), -2 if bottom < -4 else -1))
    layout[_axis("yaxis", number)] = theme.value_axis(
        *domain, range=[bottom, 0.2], tickmode="array", tickvals=ticks, ticktext=[text.share(10.0**t) for t in ticks]
    )
    layout["annotations"].append(theme.label("<b>overflow</b>", domain[1], color="$overflow"))
    layout["annotations"].append(theme.label("<b>underflow</b>", domain[1], color="$underflow", xshift=58))
    layout["annotations"].append(theme.label("share of elements; zero is not drawn", domain[1], xshift=124))


def _sqnr(traces: list[Any], layout: dict[str, Any], series: Series, number: int, domain: tuple[float, float]) -> None:
    low, high = series.low["sqnr_db"], series.high["sqnr_db"]
    _band(traces, series, low, high, number, "$text", {"name": "SQNR", "format": "db"}, worst=low)
    bottom, top = _range(low, high, least=4.0)
    layout[_axis("yaxis", number)] = theme.value_axis(*domain, range=[bottom, top], nticks=3)
    layout["annotations"].append(theme.label("<b>SQNR</b>, dB", domain[1]))


def _band(
    traces: list[Any],
    series: Series,
    low: Floats,
    high: Floats,
    number: int,
    color: str,
    about: dict[str, Any],
    *,
    worst: Floats | None = None,
    stepped: bool = False,
) -> None:
    """A line with the band of its extremes behind it, where a point stands for several steps."""
    axis = {"yaxis": _axis("y", number)}
    shape = _STEPS if stepped else {}
    x = _middle(series)
    if (high > low).any():
        band = _LINE | axis | {"x": x, "line": {"width": 0} | shape, "hoverinfo": "skip"}
        bottom, top = flat_where_missing(low, high)
        traces.append(band | {"y": _f4(bottom)})
        traces.append(band | {"y": _f4(top), "fill": "tonexty", "fillcolor": "$band"})
    line = {"width": 1.2, "color": color} | shape
    traces.append(_LINE | axis | {"x": x, "y": _f4(high if worst is None else worst), "line": line, "about": about})


def _exponents(ticks: list[int]) -> dict[str, Any]:
    """Ticks at powers of two, written as such."""
    return {"tickmode": "array", "tickvals": ticks, "ticktext": [text.exp2(tick) for tick in ticks]}


def _range(low: Floats, high: Floats, *, least: float) -> tuple[float, float]:
    """The limits of an axis for these values, at least `least` apart."""
    if not np.isfinite(low).any():
        return 0.0, least
    bottom, top = float(np.nanmin(low[np.isfinite(low)])), float(np.nanmax(high[np.isfinite(high)]))
    pad = max((top - bottom) * 0.1, (least - (top - bottom)) / 2, 0.2)
    return bottom - pad, top + pad


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little room above, and room for the marks of scale changes below."""
    return low - 0.05 * (high - low) - 0.8, high + 0.03 * (high - low) + 0.2


def _powers(low: float, high: float, most: int) -> list[int]:
    """Integer exponents for at most `most` ticks within [low, high]."""
    each = max(1, math.ceil((high - low) / most))
    each = next((nice for nice in (1, 2, 4, 8, 16, 32, 64) if nice >= each), each)
    return [e for e in range(math.ceil(low), math.floor(high) + 1) if e % each == 0]


def _log2(values: Floats) -> Floats:
    """log2 of what is above zero; NaN elsewhere."""
    return np.log2(np.where(values > 0, values, np.nan))


def _middle(series: Series) -> Floats:
    return (series.step + series.last) / 2


def _f4(values: Floats) -> npt.NDArray[np.float32]:
    return values.astype(np.float32)


def _axis(name: str, number: int) -> str:
    return name if number == 1 else f"{name}{number}"
