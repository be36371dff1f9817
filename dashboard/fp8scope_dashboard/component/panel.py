"""The Python side of the one component: headers, tables and charts, drawn by panel.js.

A chart is sent whole once for each browser session; after that only the columns that changed travel: `_delta` compares
every array with what was sent before and keeps the longest common start. What the person did comes back as an `Event`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly
import streamlit as st

from fp8scope_dashboard.theme import PALETTES, Figure

Array = npt.NDArray[Any]

_HERE = Path(__file__).parent
PLOTLY_URL = f"fp8scope/plotly-{plotly.__version__}.min.js"  # served by asgi.py; a new version has a new address


@dataclass(frozen=True)
class Go:
    """A link was clicked: go to the view of these query parameters."""

    params: dict[str, str]


@dataclass(frozen=True)
class Click:
    """A cell or a curve of `slot` was clicked at `step`."""

    slot: int
    step: int


@dataclass(frozen=True)
class Zoom:
    """A range of steps was drawn with the pointer; None at both ends: a double click, show everything."""

    first_step: int | None
    last_step: int | None


Event = Go | Click | Zoom


def header(key: str, *, crumbs: list[Mapping[str, Any]], **parts: Any) -> Event | None:
    """The line at the top: where we are, links to neighbours, the state of the run."""
    return _mount(key, {"kind": "header", "crumbs": crumbs, **parts})


def table(key: str, rows: list[Mapping[str, Any]], *, empty: str, **parts: Any) -> Event | None:
    """Rows of cells; a row with `to` is a link."""
    return _mount(key, {"kind": "table", "rows": rows, "empty": empty, **parts})


def chart(key: str, figure: Figure, *, height: int, view: Any = None, **parts: Any) -> Event | None:
    """A plotly figure whose arrays are numpy; `view` is the range that the person asked for, None while following."""
    sent: dict[str, Any] = st.session_state.setdefault(f"sent {key}", {"version": 0, "arrays": {}})
    arrays: dict[str, Array] = {}
    skeleton = _without_arrays(figure, arrays, "")
    messages, whole = _delta(sent["arrays"], arrays)
    if sent["version"] == 0 or whole:
        base = None
    else:
        base = sent["version"]
    changed = base is None or any(m["keep"] < m["shape"][-1] for m in messages.values()) or _shrunk(sent, arrays)
    if not changed:
        base, messages = sent["base"], sent["messages"]
    else:
        sent.update(version=sent["version"] + 1, arrays=arrays, base=base, messages=messages)
    message = {"figure": skeleton, "arrays": messages, "version": sent["version"], "base": base}
    result = _mount(key, {"kind": "chart", "plotly": PLOTLY_URL, "height": height, "view": view, **message, **parts})
    return result


def _shrunk(sent: dict[str, Any], arrays: dict[str, Array]) -> bool:
    return any(array.shape != sent["arrays"][name].shape for name, array in arrays.items())


def _delta(old: dict[str, Array], new: dict[str, Array]) -> tuple[dict[str, Any], bool]:
    """The messages for `new` on top of `old`, and whether nothing of `old` can be used."""
    whole = old.keys() != new.keys() or any(
        a.shape[:-1] != old[n].shape[:-1] or a.dtype != old[n].dtype for n, a in new.items()
    )
    messages = {}
    for name, array in new.items():
        keep = 0 if whole else _common_columns(old[name], array)
        part = np.ascontiguousarray(array[..., keep:])
        text = base64.b64encode(part.tobytes()).decode()
        messages[name] = {"dtype": array.dtype.str[1:], "shape": array.shape, "keep": keep, "base64": text}
    return messages, whole


def _common_columns(old: Array, new: Array) -> int:
    """How many columns at the start are equal, bit for bit."""
    shared = min(old.shape[-1], new.shape[-1])
    word = f"u{new.dtype.itemsize}"
    differs = np.ascontiguousarray(old[..., :shared]).view(word) != np.ascontiguousarray(new[..., :shared]).view(word)
    columns = np.flatnonzero(differs.reshape(-1, shared).any(axis=0)) if shared else np.empty(0, int)
    return int(columns[0]) if columns.size else shared


def _without_arrays(value: Any, arrays: dict[str, Array], path: str) -> Any:
    """`value` with every numpy array replaced by its name; the arrays go to `arrays`, in types that a browser has."""
    if isinstance(value, np.ndarray):
        narrow = {"i": np.int32, "u": np.int32}.get(value.dtype.kind, value.dtype)
        arrays[path] = value.astype(narrow, copy=False)
        return {"$array": path}
    if isinstance(value, dict):
        return {key: _without_arrays(item, arrays, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(item, arrays, f"{path}.{i}") for i, item in enumerate(value)]
    return value


def _mount(key: str, data: dict[str, Any]) -> Event | None:
    component = _component()
    result = component(
        key=key,
        data={**data, "palettes": PALETTES},
        on_go_change=_ignore,
        on_click_change=_ignore,
        on_zoom_change=_ignore,
        on_resync_change=lambda: st.session_state.pop(f"sent {key}", None),
    )
    return next(_events(result), None)


def _events(result: Any) -> Iterator[Event]:
    """What the browser reported, checked: it may send anything."""
    match result.get("go"):
        case {"params": dict(params)}:
            yield Go({str(name): str(value) for name, value in params.items()})
    match result.get("click"):
        case {"slot": int(slot), "step": int(step)}:
            yield Click(slot, step)
    match result.get("zoom"):
        case {"from": int() | None as first, "to": int() | None as last}:
            yield Zoom(first, last)


def _ignore() -> None:
    """A trigger needs a callback; the value is read from the result."""


@st.cache_resource(show_spinner=False)
def _sources() -> tuple[str, str]:
    return (_HERE / "panel.js").read_text(), (_HERE / "panel.css").read_text()


def _component() -> Any:
    js, css = _sources()
    return st.components.v2.component("fp8scope_panel", js=js, css=css, isolate_styles=False)
