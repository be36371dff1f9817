"""One look for every chart: colours by meaning, colour maps, and the one layout that all figures start from.

Figures are plain dicts for plotly.js and name colours by token, "$text" or "$input"; the browser replaces tokens by the
palette of the theme that it shows (`PALETTES`), so that a switch between light and dark needs nobody's help.
Roles keep one colour everywhere (Okabe and Ito's, which the colour-blind can tell apart). A colour map starts at the
plot's own ground: exact zero has no colour, and no data is hatched, in both themes.
"""

from __future__ import annotations

from typing import Any, Final

from fp8core.records import Role

Figure = dict[str, Any]
ColorScale = list[tuple[float, str]]

_RUNS: Final = [f"run{i}" for i in range(8)]  # of runs that are compared; the first is the others' measure
RUN_COLORS: Final = [f"${name}" for name in _RUNS]

PALETTES: Final[dict[str, dict[str, str]]] = {
    "light": {
        "text": "#1b1f24",
        "muted": "#69727d",
        "faint": "#a7afb8",
        "grid": "#e9ebee",
        "line": "#c9ced4",
        "ground": "#ffffff",
        "hatch": "#d3d7dc",
        "band": "rgba(0,114,178,0.13)",
        "band2": "rgba(0,114,178,0.055)",
        "spread": "rgba(27,31,36,0.24)",
        "spread2": "rgba(27,31,36,0.09)",
        "input": "#0072B2",
        "weight": "#7d848c",
        "grad_output": "#D98A00",
        "overflow": "#D55E00",
        "underflow": "#A2568A",
        "critical": "#D55E00",
        "warning": "#B27B00",
        "info": "#0072B2",
        **dict(
            zip(
                _RUNS,
                ["#1b1f24", "#009E73", "#C4569A", "#8A6D00", "#4FA3D8", "#7A5BC0", "#B0602B", "#8b949e"],
                strict=True,
            )
        ),
    },
    "dark": {
        "text": "#dde3ea",
        "muted": "#8f9aa6",
        "faint": "#5d6873",
        "grid": "#20272e",
        "line": "#39434c",
        "ground": "#151a1f",
        "hatch": "#313a43",
        "band": "rgba(86,180,233,0.19)",
        "band2": "rgba(86,180,233,0.08)",
        "spread": "rgba(221,227,234,0.28)",
        "spread2": "rgba(221,227,234,0.11)",
        "input": "#56B4E9",
        "weight": "#a3acb6",
        "grad_output": "#E69F00",
        "overflow": "#F0743A",
        "underflow": "#CC79A7",
        "critical": "#F0743A",
        "warning": "#E6B422",
        "info": "#56B4E9",
        **dict(
            zip(
                _RUNS,
                ["#dde3ea", "#2FC79B", "#E08BC2", "#D9BE4A", "#7CC4EE", "#AE97E8", "#E09A66", "#7d8790"],
                strict=True,
            )
        ),
    },
}

ROLE_COLOR: Final = {role: f"${role.value}" for role in Role}

# Maps by theme, from the healthy or zero end on. The browser takes the one of its theme.
DIVERGING: Final[dict[str, list[str]]] = {  # a falling scale is a growing tensor: warm
    "light": ["#7a3403", "#c9650a", "#f2a04b", "#fdd9a9", "#f3f3f1", "#c6dbef", "#6baed6", "#2171b5", "#08306b"],
    "dark": ["#ffe0a8", "#eda13f", "#b06a17", "#5f3a12", "#1d242b", "#1b4468", "#2f7fc1", "#6db3ee", "#b9dcff"],
}
HEADROOM: Final[dict[str, list[str]]] = {  # below the margin: clipping near; above: range not used
    "light": ["#7f1d00", "#D55E00", "#f09a5c", "#fbd5b5", "#f3f3f1", "#d5e5f2", "#93c0e0", "#3f8fc6", "#0b4a83"],
    "dark": ["#ffd2b0", "#ff9a5c", "#d9601f", "#6b3113", "#1d242b", "#173a55", "#1f6a9f", "#56B4E9", "#c3e7ff"],
}
SHARE: Final[dict[str, list[str]]] = {
    "light": ["#fcd2a6", "#f9a65f", "#ee7628", "#cc4c02", "#8c2d04", "#3d1100"],
    "dark": ["#57280d", "#8f3d0c", "#cf5a14", "#f58a3c", "#ffc07f", "#fff0da"],
}
LOST: Final[dict[str, list[str]]] = {
    "light": ["#ead7e6", "#d3aecb", "#b97fac", "#98518a", "#6d2a63", "#351033"],
    "dark": ["#3a2037", "#643359", "#93507f", "#c07aa8", "#e2aed0", "#fbe6f4"],
}
SPREAD: Final[dict[str, list[str]]] = {
    "light": ["#d5e5f2", "#93c0e0", "#3f8fc6", "#0b4a83", "#052342"],
    "dark": ["#173a55", "#1f6a9f", "#56B4E9", "#9fd4f5", "#e4f4ff"],
}
CIVIDIS: Final = [
    "#00224e",
    "#123570",
    "#3b496c",
    "#575d6d",
    "#707173",
    "#8a8678",
    "#a59c74",
    "#c3b369",
    "#e1cc55",
    "#fee838",
]


def scale(colors: list[str], start: float = 0.0) -> ColorScale:
    """Colours spread evenly over [start, 1]."""
    return [(start + (1 - start) * i / (len(colors) - 1), color) for i, color in enumerate(colors)]


def share_scale(colors: list[str], zero_until: float) -> ColorScale:
    """A map whose part below `zero_until` is the plot's ground: exact zeros; the next shade is clearly another."""
    return [(0.0, "$ground"), (zero_until, "$ground"), *scale(colors, zero_until)]


def layout(**changes: Any) -> dict[str, Any]:
    """The layout that every figure starts from."""
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 11, "color": "$muted", "family": "$font"},
        "showlegend": False,
        "dragmode": "zoom",
        "hovermode": "closest",
        "hoverdistance": -1,
        "spikedistance": -1,
        "uirevision": "fp8scope",
        "margin": {"l": 60, "r": 20, "t": 8, "b": 38},
    } | changes


def step_axis(first_step: float, last_step: float, **changes: Any) -> dict[str, Any]:
    """The step axis, the same on all panels of a page."""
    return {
        "range": [first_step, last_step],
        "title": {"text": "step", "standoff": 6},
        "separatethousands": True,
        "tickformat": ",d",
        "showgrid": False,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "$line",
        "linecolor": "$line",
        "showspikes": True,
        "spikemode": "across",
        "spikesnap": "cursor",
        "spikethickness": 1,
        "spikedash": "solid",
        "spikecolor": "$faint",
    } | changes


def value_axis(low: float, high: float, **changes: Any) -> dict[str, Any]:
    """A value axis of one panel that covers the part [low, high] of the figure's height."""
    return {
        "domain": [low, high],
        "showgrid": True,
        "gridcolor": "$grid",
        "zeroline": False,
        "fixedrange": True,
        "nticks": 4,
        "ticks": "",
        "exponentformat": "power",
    } | changes


def label(text: str, y: float, *, color: str = "$muted", x: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A line of text above a panel; `text` must be escaped for plotly."""
    return {
        "text": text,
        "x": x,
        "y": y,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "align": "left",
        "font": {"size": 11, "color": color},
    } | changes
