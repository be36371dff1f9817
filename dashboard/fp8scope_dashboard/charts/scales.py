"""The scales of a run as arXiv 2309.17224 draws them: over depth, over steps, and how many layers have which.

All of it comes from one heat map of scale_exp2, the log2 of the scale, which is what that paper calls scaling bias.
A *type* is a layer's name within its block (attn.qkv, mlp.fc1); the *depth* is the block's place in the model. The mode
is the value in whole powers of two that most columns of steps (or most layers) have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8core.records import Role
from fp8scope_collector.storage.reader import HeatMap, Slot
from fp8scope_dashboard import text, theme
from fp8scope_dashboard.charts.panels import blocks_of, flat_where_missing

Matrix = npt.NDArray[np.float64]
MOST_TYPES = 8
MOST_LINES = 24  # of one panel; of more layers the spread is drawn
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "circle-open", "square-open", "diamond-open", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Place:
    """Where a slot is: its row in the heat map, block and type; depth counts blocks from 0."""

    slot: Slot
    row: int
    block: str
    depth: int
    kind: str


def places(heatmap: HeatMap, slots: Sequence[Slot]) -> list[Place]:
    """The slots that are in blocks; where a model has none, each layer is a block of its own."""
    rows = {number: row for row, number in enumerate(heatmap.slots.tolist())}
    layers = list(dict.fromkeys(slot.layer for slot in slots))
    blocks = blocks_of(layers)
    if any(leaf for _, leaves in blocks for leaf in leaves):
        blocks = [(block, leaves) for block, leaves in blocks if leaves[0]]
    where = {
        (f"{block}.{leaf}" if leaf else block): (block, depth, leaf or "layer")
        for depth, (block, leaves) in enumerate(blocks)
        for leaf in leaves
    }
    return [Place(s, rows[s.slot], *where[s.layer]) for s in slots if s.layer in where and s.slot in rows]


def kinds_of(found: Sequence[Place]) -> list[str]:
    """The types of layers in model order, at most as many as can be told apart."""
    return list(dict.fromkeys(place.kind for place in found))[:MOST_TYPES]


def over_depth(heatmap: HeatMap, found: Sequence[Place]) -> tuple[theme.Figure, int]:
    """Each layer's most frequent scale over its depth, one panel for each role, one line for each type (Fig. 6)."""
    kinds, height, bottom = kinds_of(found), 250, 40
    traces: list[dict[str, Any]] = []
    layout = theme.layout(margin={"l": 52, "r": 8, "t": 24, "b": bottom}, hovermode="closest", dragmode=False)
    layout["annotations"], layout["shapes"] = [], []
    roles = _roles(found)
    depths = 1 + max((place.depth for place in found), default=0)
    for i, role in enumerate(roles):
        low, high = _columns(i, len(roles))
        for j, kind in enumerate(kinds):
            mine = [place for place in found if place.slot.role == role and place.kind == kind]
            y = modes(heatmap.high[[place.row for place in mine]])
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": np.array([place.depth for place in mine]),
                    "y": y,
                    "xaxis": _axis("x", i),
                    "yaxis": _axis("y", i),
                    "line": {"width": 1.2, "dash": _DASHES[j], "color": theme.ROLE_COLOR[role]},
                    "marker": {"symbol": _SYMBOLS[j], "size": 6, "color": theme.ROLE_COLOR[role]},
                    "hoverinfo": "none",
                    "about": {
                        "point": True,
                        "names": [place.slot.layer for place in mine],
                        "slots": [place.slot.slot for place in mine],
                        "lines": [["role", role.value], ["type", kind]],
                        "value": ["mode", "exp2"],
                    },
                }
            )
        layout[_axis("xaxis", i)] = _depth_axis(depths, [low, high], _axis("y", i))
        layout[_axis("yaxis", i)] = theme.value_axis(
            0.0, 1.0, anchor=_axis("x", i), **_scale_ticks(found, heatmap, role)
        )
        layout["annotations"].append(theme.label(f"<b>{role.value}</b>", 1.0, x=low, color=theme.ROLE_COLOR[role]))
    layout["yaxis"]["title"] = {"text": "log2 scale", "standoff": 4}
    return {"traces": traces, "layout": layout}, height


def legend(found: Sequence[Place]) -> list[str]:
    """What the marks of `over_depth` mean."""
    marks = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "circle-open": "○"}
    marks |= {"square-open": "□", "diamond-open": "◇", "x": "✕"}
    return [f"{marks[_SYMBOLS[j]]} {kind}" for j, kind in enumerate(kinds_of(found))]


def over_steps(heatmap: HeatMap, found: Sequence[Place], first_step: int, last_step: int) -> tuple[theme.Figure, int]:
    """The scale of every layer over steps, faceted by type and role; the first and last blocks stand out (Figs 7-9).

    Of more than MOST_LINES layers, those between are two bands: from the lowest to the highest, and the middle half.
    """
    kinds, roles = kinds_of(found), _roles(found)
    row, gap, top, bottom = 108, 14, 24, 40
    height = top + bottom + len(kinds) * row + (len(kinds) - 1) * gap
    inside = height - top - bottom
    traces: list[dict[str, Any]] = []
    layout = theme.layout(margin={"l": 52, "r": 8, "t": top, "b": bottom})
    layout["annotations"], layout["shapes"] = [], []
    deepest = max((place.depth for place in found), default=0)
    x: Matrix = heatmap.steps + np.float64((heatmap.width - 1) / 2)
    for i, role in enumerate(roles):
        left, right = _columns(i, len(roles))
        ticks = _scale_ticks(found, heatmap, role)
        for j, kind in enumerate(kinds):
            number = i * len(kinds) + j
            up = 1 - (row + gap) * j / inside
            mine = [place for place in found if place.slot.role == role and place.kind == kind]
            if len(mine) > MOST_LINES:
                traces += _bands(heatmap.high[[place.row for place in mine]], x, _axis("x", i), _axis("y", number))
                mine = [place for place in mine if place.depth in (0, deepest)]
            for place in sorted(mine, key=lambda place: place.depth in (0, deepest)):
                traces.append(_line(heatmap, place, deepest, x, _axis("x", i), _axis("y", number), role))
            layout[_axis("yaxis", number)] = theme.value_axis(up - row / inside, up, anchor=_axis("x", i), **ticks)
            words = f"<b>{role.value}</b>  {text.plain(kind)}" if j == 0 else text.plain(kind)
            color = theme.ROLE_COLOR[role] if j == 0 else "$muted"
            layout["annotations"].append(theme.label(words, up, x=left, color=color))
        layout[_axis("xaxis", i)] = theme.step_axis(
            first_step - 0.5,
            last_step + 0.5,
            domain=[left, right],
            anchor=_axis("y", (i + 1) * len(kinds) - 1),
            nticks=6,
            **({} if i == 0 else {"matches": "x"}),
        )
    return {"traces": traces, "layout": layout}, height


def per_step(heatmap: HeatMap, found: Sequence[Place], first_step: int, last_step: int) -> tuple[theme.Figure, int]:
    """How many layers have which scale at each step, and the mode as a line; a panel for each role."""
    roles = _roles(found)
    traces: list[dict[str, Any]] = []
    layout = theme.layout(margin={"l": 52, "r": 8, "t": 24, "b": 40})
    layout["annotations"], layout["shapes"] = [], []
    x = heatmap.steps + (heatmap.width - 1) / 2
    for i, role in enumerate(roles):
        left, right = _columns(i, len(roles))
        values = np.round(heatmap.high[[place.row for place in found if place.slot.role == role]])
        finite = values[np.isfinite(values)]
        if not finite.size:
            continue
        exponents = np.arange(int(finite.min()), int(finite.max()) + 1)
        counts = np.stack([(values == exponent).sum(axis=0) for exponent in exponents])
        share = np.where(counts > 0, counts / max(1, len(values)), np.nan)
        traces.append(
            {
                "type": "heatmap",
                "xaxis": _axis("x", i),
                "yaxis": _axis("y", i),
                "x": x,
                "y": exponents,
                "z": share.astype(np.float32),
                "zmin": 0,
                "zmax": 1,
                "colorscale": [(0.0, "$ground"), (1.0, theme.ROLE_COLOR[role])],
                "showscale": False,
                "hoverinfo": "none",
                "hoverongaps": False,
                "about": {
                    "names": [text.exp2(float(exponent)) for exponent in exponents],
                    "role": role.value,
                    "width": heatmap.width,
                    "lines": [{"name": "layers", "format": "share", "minus": True}],
                },
            }
        )
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "xaxis": _axis("x", i),
                "yaxis": _axis("y", i),
                "x": x,
                "y": modes(values.T).astype(np.float32),
                "line": {"width": 1.3, "color": "$text", "shape": "hvh"},
                "hoverinfo": "skip",
            }
        )
        layout[_axis("xaxis", i)] = theme.step_axis(
            first_step - 0.5,
            last_step + 0.5,
            domain=[left, right],
            anchor=_axis("y", i),
            nticks=6,
            **({} if i == 0 else {"matches": "x"}),
        )
        layout[_axis("yaxis", i)] = theme.value_axis(
            0.0, 1.0, anchor=_axis("x", i), **_scale_ticks(found, heatmap, role), showgrid=False
        )
        layout["annotations"].append(theme.label(f"<b>{role.value}</b>", 1.0, x=left, color=theme.ROLE_COLOR[role]))
    return {"traces": traces, "layout": layout}, 230


def histogram(heatmap: HeatMap, found: Sequence[Place]) -> tuple[theme.Figure, int]:
    """Which scales occur over the whole range: the share of (layer, column) cells of each role."""
    traces: list[dict[str, Any]] = []
    layout = theme.layout(margin={"l": 52, "r": 8, "t": 24, "b": 40}, dragmode=False, bargap=0.08)
    layout["annotations"], layout["shapes"] = [], []
    roles = _roles(found)
    for i, role in enumerate(roles):
        left, right = _columns(i, len(roles))
        values = np.round(heatmap.high[[place.row for place in found if place.slot.role == role]])
        exponents, counts = np.unique(values[np.isfinite(values)], return_counts=True)
        traces.append(
            {
                "type": "bar",
                "xaxis": _axis("x", i),
                "yaxis": _axis("y", i),
                "x": exponents,
                "y": (counts / max(1, counts.sum())).astype(np.float32),
                "marker": {"color": theme.ROLE_COLOR[role], "line": {"width": 0}},
                "hoverinfo": "none",
                "about": {
                    "point": True,
                    "names": [f"scale {text.exp2(float(exponent))}" for exponent in exponents],
                    "lines": [["role", role.value]],
                    "value": ["share", "share"],
                },
            }
        )
        layout[_axis("xaxis", i)] = {
            "domain": [left, right],
            "anchor": _axis("y", i),
            "title": {"text": "log2 scale", "standoff": 6},
            "showgrid": False,
            "zeroline": False,
            "ticks": "outside",
            "ticklen": 4,
            "tickcolor": "$line",
            "linecolor": "$line",
            "fixedrange": True,
            "dtick": max(1, -(-int(np.ptp(exponents)) // 8)) if exponents.size else 1,
        }
        axis = {"anchor": _axis("x", i), "tickformat": ".0%", "rangemode": "tozero"}
        layout[_axis("yaxis", i)] = theme.value_axis(0.0, 1.0, **axis)
        layout["annotations"].append(theme.label(f"<b>{role.value}</b>", 1.0, x=left, color=theme.ROLE_COLOR[role]))
    return {"traces": traces, "layout": layout}, 200


@dataclass(frozen=True)
class Summary:
    """One type and role in numbers, all in powers of two: the most frequent scale of all, first and last block."""

    kind: str
    role: Role
    overall: float
    first: float
    last: float
    lowest: float
    highest: float
    changes: float


def summaries(heatmap: HeatMap, found: Sequence[Place]) -> list[Summary]:
    """What the charts say, in numbers: `changes` is how often the scale moves by a power of two, per column."""
    rows: list[Summary] = []
    deepest = max((place.depth for place in found), default=0)
    for kind in kinds_of(found):
        for role in _roles(found):
            mine = [place for place in found if place.kind == kind and place.slot.role == role]
            values = np.round(heatmap.high[[place.row for place in mine]])
            if not np.isfinite(values).any():
                continue
            moved = np.abs(np.diff(values, axis=1)) >= 1
            known = np.isfinite(np.diff(values, axis=1)).sum()
            of_block = dict(zip((place.depth for place in mine), modes(values).tolist(), strict=True))
            rows.append(
                Summary(
                    kind,
                    role,
                    float(modes(values.reshape(1, -1))[0]),
                    of_block.get(0, np.nan),
                    of_block.get(deepest, np.nan),
                    float(np.nanmin(values)),
                    float(np.nanmax(values)),
                    float(moved.sum() / known) if known else np.nan,
                )
            )
    return rows


def modes(values: Matrix) -> Matrix:
    """Each row's whole power of two that occurs most, of equally frequent ones the smallest; NaN: nothing recorded."""
    there = np.isfinite(values)
    if not there.any():
        return np.full(len(values), np.nan)
    whole = np.round(values[there]).astype(np.int64)
    lowest, span = int(whole.min()), int(np.ptp(whole)) + 1
    row = np.nonzero(there)[0]
    counts = np.bincount(row * span + whole - lowest, minlength=len(values) * span).reshape(-1, span)
    return np.where(there.any(axis=1), counts.argmax(axis=1) + np.float64(lowest), np.nan)


def _bands(values: Matrix, x: Matrix, xaxis: str, yaxis: str) -> list[dict[str, Any]]:
    """Many layers at each column: the band from the lowest to the highest, within it that of the middle half."""
    ordered = np.sort(values, axis=0)  # NaN last
    known = np.isfinite(ordered).sum(axis=0)
    edges = [
        np.where(
            known > 0,
            np.take_along_axis(ordered, np.round(part * np.maximum(known - 1, 0))[None].astype(int), 0)[0],
            np.nan,
        )
        for part in (0, 0.25, 0.5, 0.75, 1)
    ]
    line = {"type": "scatter", "mode": "lines", "xaxis": xaxis, "yaxis": yaxis, "x": x, "hoverinfo": "none"}
    none = {"width": 0, "shape": "hvh"}
    low, quarter, middle, three_quarters, high = (edge.astype(np.float32) for edge in flat_where_missing(*edges))
    about = [{"about": {"name": name, "format": "exp2"}} for name in ("lowest", "1/4", "median", "3/4", "highest")]
    pale, strong = {"fill": "tonexty", "fillcolor": "$spread2"}, {"fill": "tonexty", "fillcolor": "$spread"}
    return [
        line | about[0] | {"y": low, "line": none},
        line | about[1] | pale | {"y": quarter, "line": none},
        line | about[3] | strong | {"y": three_quarters, "line": none},
        line | about[4] | pale | {"y": high, "line": none},
        line | about[2] | {"y": middle, "line": {"width": 0.8, "color": "$muted", "shape": "hvh"}},
    ]


def _line(
    heatmap: HeatMap, place: Place, deepest: int, x: Matrix, xaxis: str, yaxis: str, role: Role
) -> dict[str, Any]:
    """The first block's line solid and the last one's dashed in the role's colour, those between faint."""
    ends = {0: "solid", deepest: "dash"}
    line = {"width": 1.5, "dash": ends[place.depth], "color": theme.ROLE_COLOR[role]} if place.depth in ends else None
    return {
        "type": "scatter",
        "mode": "lines",
        "xaxis": xaxis,
        "yaxis": yaxis,
        "x": x,
        "y": heatmap.high[place.row].astype(np.float32),
        "line": (line or {"width": 0.8, "color": "$faint"}) | {"shape": "hvh"},
        "opacity": 1.0 if line else 0.75,
        "hoverinfo": "none",
        "about": {"name": text.shorten(place.slot.layer, 30), "format": "exp2", "slot": place.slot.slot},
    }


def _scale_ticks(found: Sequence[Place], heatmap: HeatMap, role: Role) -> dict[str, Any]:
    """One range of scales for all panels of a role, with ticks at powers of two."""
    rows = [place.row for place in found if place.slot.role == role]
    values = heatmap.high[rows]
    if not np.isfinite(values).any():
        return {"range": [-1, 1]}
    low, high = float(np.nanmin(values)) - 0.7, float(np.nanmax(values)) + 0.7
    each = next(nice for nice in (1, 2, 4, 8, 16, 32, 64) if (high - low) / nice <= 5 or nice == 64)
    ticks = [e for e in range(int(np.ceil(low)), int(np.floor(high)) + 1) if e % each == 0]
    return {"range": [low, high], "tickmode": "array", "tickvals": ticks, "ticktext": [text.exp2(t) for t in ticks]}


def _depth_axis(depths: int, domain: list[float], anchor: str) -> dict[str, Any]:
    return {
        "domain": domain,
        "anchor": anchor,
        "range": [-0.4, depths - 0.6],
        "title": {"text": "block", "standoff": 6},
        "showgrid": False,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "$line",
        "linecolor": "$line",
        "fixedrange": True,
        "nticks": min(depths, 12),
        "tickformat": "d",
    }


def _roles(found: Iterable[Place]) -> list[Role]:
    there = {place.slot.role for place in found}
    return [role for role in Role if role in there]


def _columns(i: int, count: int) -> tuple[float, float]:
    gap = 0.045
    width = (1 - gap * (count - 1)) / count
    return i * (width + gap), i * (width + gap) + width


def _axis(name: str, number: int) -> str:
    return name if number == 0 else f"{name}{number + 1}"
