"""How one tensor differs over the ranks: amax of each on the page's step axis, and below it how far they lie apart.

The band is from the smallest to the largest amax of any rank, exact at every resolution; the pointer says which ranks
these were. Up to eight ranks have a line each. Ranks of data-parallel training see different data of one distribution:
they differ by a bit or so at random. One that is always the largest, or a spread that grows, is a rank that computes
something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fp8scope_collector.storage.reader import Ranks, Series, Spread
from fp8scope_dashboard import text, theme
from fp8scope_dashboard.charts.panels import Floats, Stack, flat_where_missing, gaps_of, with_gaps
from fp8scope_dashboard.charts.tensor import MARGIN

MOST_LINES = 8
_OFTEN = 0.6  # of the columns: with two ranks chance alone makes one of them the largest in about half


@dataclass(frozen=True)
class RankValues:
    """One tensor by rank: `spread` has its extremes, `bits` how far apart ranks are, `each` the single ranks."""

    spread: Spread
    bits: Series
    each: Ranks


def ranks_figure(found: RankValues, first_step: int, last_step: int, step: int | None) -> tuple[theme.Figure, int]:
    """amax by rank and the spread in bits, on the axis of the chart above."""
    height = MARGIN["t"] + 150 + 26 + 64 + MARGIN["b"]
    stack = Stack(height, MARGIN["t"], MARGIN["b"])
    above, below = stack.take(150, 26), stack.take(64)
    layout = theme.layout(margin=MARGIN, hovermode="x")
    layout["annotations"], layout["shapes"] = [], []
    traces: list[dict[str, Any]] = []
    _amax(traces, layout, found, above)
    _bits(traces, layout, found.bits, below)
    layout["xaxis"] = theme.step_axis(first_step - 0.5, last_step + 0.5, anchor="y2")
    if step is not None:
        line = {"color": "$text", "width": 1, "dash": "dot"}
        mark = {"type": "line", "xref": "x", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1, "line": line}
        layout["shapes"].append(mark)
    return {"traces": traces, "layout": layout}, height


def verdict(found: RankValues) -> str:
    """Which rank stands out, and where ranks are farthest apart: the panel in one line."""
    words = []
    apart = found.spread.high > found.spread.low  # where all are equal, none stands out
    for side, ranks in (("largest", found.spread.high_rank), ("smallest", found.spread.low_rank)):
        if apart.any():
            counts = np.bincount(ranks[apart])
            share = counts.max() / apart.size
            if share >= _OFTEN:
                where = "everywhere" if share == 1 else f"in {text.share(float(share))} of the columns"
                words.append(f"rank {int(counts.argmax())} is the {side} {where}")
    high = np.round(found.bits.high["spread"], 2)  # of equal ones the first
    if np.isfinite(high).any():
        if not np.nanmax(high):
            return "all ranks are equal"
        at = int(np.nanargmax(high))
        first, last = int(found.bits.step[at]), int(found.bits.last[at])
        steps = f"step {text.count(first)}" if first == last else f"steps {text.count(first)} – {text.count(last)}"
        words.append(f"farthest apart at {steps}: {text.bits(float(high[at]))}")
    return "; ".join(words)


def _amax(traces: list[Any], layout: dict[str, Any], found: RankValues, domain: tuple[float, float]) -> None:
    spread, each = found.spread, found.each
    line = {"type": "scatter", "mode": "lines", "xaxis": "x", "yaxis": "y", "hoverinfo": "none"}
    gaps = gaps_of(spread.step, spread.last)
    middle = (spread.step + spread.last) / 2
    (x, low), (_, high) = (with_gaps(middle, _log2(side), gaps) for side in (spread.low, spread.high))
    by_rank = [_with_gaps(ranks, gaps) for ranks in (spread.low_rank, spread.high_rank)]
    bottom, top = flat_where_missing(low, high)
    none = {"width": 0}
    for y, shown, side, ranks in ((bottom, low, "smallest", by_rank[0]), (top, high, "largest", by_rank[1])):
        about = {"name": side, "format": "log2", "values": shown.astype(np.float32), "ranks": ranks}
        fill = {"fill": "tonexty", "fillcolor": "$band"} if side == "largest" else {}
        traces.append(line | {"x": x, "y": y.astype(np.float32), "line": none, "about": about} | fill)
    if each.ranks.size <= MOST_LINES:
        own_gaps = gaps_of(each.step, each.last)
        names = []
        for i, rank in enumerate(each.ranks.tolist()):
            own_x, y = with_gaps((each.step + each.last) / 2, _log2(each.high[i]), own_gaps)
            color = theme.RUN_COLORS[i]
            about = {"name": f"rank {rank}", "format": "log2"}
            drawn = {"x": own_x, "y": y.astype(np.float32), "line": {"width": 1.1, "color": color}, "about": about}
            traces.append(line | drawn)
            names.append((f"<b>rank {rank}</b>", color))
        for i, (name, color) in enumerate(reversed(names)):
            layout["annotations"].append(
                theme.label(name, domain[1], color=color, x=1.0, xanchor="right", xshift=-48 * i)
            )
    values = np.concatenate([side[np.isfinite(side)] for side in (low, high)])
    ends = (float(values.min()), float(values.max())) if values.size else (-1.0, 1.0)
    pad = max(0.3, 0.06 * (ends[1] - ends[0]))
    low_end, high_end = ends[0] - pad, ends[1] + pad
    distance = next((nice for nice in (1, 2, 4, 8, 16) if (high_end - low_end) / nice <= 6), 32)
    ticks = [e for e in range(int(np.ceil(low_end)), int(np.floor(high_end)) + 1) if e % distance == 0]
    shown_ticks: dict[str, Any] = {"tickmode": "array", "tickvals": ticks, "ticktext": [text.exp2(t) for t in ticks]}
    layout["yaxis"] = theme.value_axis(*domain, range=[low_end, high_end], **shown_ticks)
    words = "<b>amax</b> of each rank; band: smallest to largest"
    layout["annotations"].append(theme.label(words, domain[1]))


def _bits(traces: list[Any], layout: dict[str, Any], bits: Series, domain: tuple[float, float]) -> None:
    gaps = gaps_of(bits.step, bits.last)
    x, y = with_gaps((bits.step + bits.last) / 2, bits.high["spread"], gaps)
    style = {"line": {"width": 1.2, "color": "$text"}, "about": {"name": "spread", "format": "bits"}}
    base = {"type": "scatter", "mode": "lines", "xaxis": "x", "yaxis": "y2", "hoverinfo": "none"}
    traces.append(base | {"x": x, "y": y.astype(np.float32)} | style)
    most = float(np.nanmax(y)) if np.isfinite(y).any() else 0.0
    layout["yaxis2"] = theme.value_axis(*domain, range=[0, max(1.0, 1.12 * most)], nticks=4)
    words = "<b>spread</b>, bits: log2 of the largest rank's amax over the smallest's, worst step"
    layout["annotations"].append(theme.label(words, domain[1]))


def _with_gaps(ranks: Any, gaps: Any) -> list[int]:
    """Ranks with a place for each missing point that `with_gaps` puts in."""
    return np.insert(ranks, np.repeat(gaps, 2), -1).tolist()


def _log2(values: Floats) -> Floats:
    return np.log2(np.where(values > 0, values, np.nan))
