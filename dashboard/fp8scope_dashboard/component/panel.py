"""The Python side of the one component: headers, tables and charts, drawn by panel.js.

A chart is sent whole once for each browser session; after that only the columns that changed travel: `_sent` compares
every array with what was sent before and keeps the longest common start. What the person did comes back as an `Event`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import streamlit as st

from fp8scope_dashboard.component import assets
from fp8scope_dashboard.theme import PALETTES, Figure

Array = npt.NDArray[Any]


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


def header(key: str, *, crumbs: Sequence[Mapping[str, Any]], **parts: Any) -> Event | None:
    """The line at the top: where we are, links to neighbours, the state of the run."""
    return _mount(key, {"kind": "header", "crumbs": crumbs, **parts})


def table(key: str, rows: Sequence[Mapping[str, Any]], *, empty: str, **parts: Any) -> Event | None:
    """Rows of cells; a row with `to` is a link."""
    return _mount(key, {"kind": "table", "rows": rows, "empty": empty, **parts})


def chart(key: str, figure: Figure, *, height: int, view: Any = None, **parts: Any) -> Event | None:
    """A plotly figure whose arrays are numpy; `view` is the range that the person asked for, None while following."""
    arrays: dict[str, Array] = {}
    skeleton = _without_arrays(figure, arrays, "", {})
    known: _Sent | None = st.session_state.get(f"sent {key}")
    sent = _sent(known, arrays)
    st.session_state[f"sent {key}"] = sent
    message = {"figure": skeleton, "arrays": sent.messages, "version": sent.version, "base": sent.base}
    return _mount(key, {"kind": "chart", "height": height, "view": view, **message, **parts})


@dataclass(frozen=True)
class _Sent:
    """The newest message about a chart's arrays: `version` is made from `base`, or from nothing."""

    version: int
    base: int | None
    arrays: dict[str, Array]
    messages: dict[str, Any]


def _sent(known: _Sent | None, arrays: dict[str, Array]) -> _Sent:
    """What to send now; where nothing changed the same message again, which the browser knows by its version."""
    if known is None:
        return _Sent(1, None, arrays, _messages({}, arrays))
    shapes = [(name, a.shape[:-1], a.dtype) for name, a in arrays.items()]
    if shapes != [(name, a.shape[:-1], a.dtype) for name, a in known.arrays.items()]:
        return _Sent(known.version + 1, None, arrays, _messages({}, arrays))
    if all(
        a.shape == known.arrays[n].shape and _common_columns(known.arrays[n], a) == a.shape[-1]
        for n, a in arrays.items()
    ):
        return known
    return _Sent(known.version + 1, known.version, arrays, _messages(known.arrays, arrays))


def _messages(old: dict[str, Array], new: dict[str, Array]) -> dict[str, Any]:
    """Each array's columns after those that it shares with the old one."""
    messages = {}
    for name, array in new.items():
        keep = _common_columns(old[name], array) if name in old else 0
        part = np.ascontiguousarray(array[..., keep:])
        text = base64.b64encode(part.tobytes()).decode()
        messages[name] = {"dtype": array.dtype.str[1:], "shape": array.shape, "keep": keep, "base64": text}
    return messages


def _common_columns(old: Array, new: Array) -> int:
    """How many columns at the start are equal, bit for bit."""
    shared = min(old.shape[-1], new.shape[-1])
    word = f"u{new.dtype.itemsize}"
    differs = np.ascontiguousarray(old[..., :shared]).view(word) != np.ascontiguousarray(new[..., :shared]).view(word)
    columns = np.flatnonzero(differs.reshape(-1, shared).any(axis=0)) if shared else np.empty(0, int)
    return int(columns[0]) if columns.size else shared


def _without_arrays(value: Any, arrays: dict[str, Array], path: str, seen: dict[int, str]) -> Any:
    """`value` with every numpy array replaced by its name; the arrays go to `arrays`, in types that a browser has.

    An array that occurs twice travels once: `seen` has the name of each by its identity.
    """
    if isinstance(value, np.ndarray):
        if id(value) not in seen:
            seen[id(value)] = path
            arrays[path] = value.astype(np.int32 if value.dtype.kind in "iu" else value.dtype, copy=False)
        return {"$array": seen[id(value)]}
    if isinstance(value, dict):
        return {key: _without_arrays(item, arrays, f"{path}.{key}", seen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(item, arrays, f"{path}.{i}", seen) for i, item in enumerate(value)]
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


def _component() -> Any:
    return st.components.v2.component("fp8scope_panel", js=assets.loader(), isolate_styles=False)
