"""The Python side of the one component: headers, tables and charts, drawn by panel.js.

A chart is sent whole when its page is opened; after that only what changed travels: `_sent` compares the figure's frame
and every array with what was sent before, and of an array keeps the longest common start. What the person did comes
back as an `Event`.
"""

from __future__ import annotations

import base64
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import streamlit as st

from fp8scope_dashboard.component import assets
from fp8scope_dashboard.theme import Figure

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


@dataclass(frozen=True)
class Acknowledge:
    """Somebody says that findings were seen: who and why."""

    findings: tuple[int, ...]
    by: str
    reason: str


@dataclass(frozen=True)
class Tick:
    """A row of a table was ticked, or no longer is."""

    name: str
    on: bool


Event = Go | Click | Zoom | Acknowledge | Tick


def header(key: str, *, crumbs: Sequence[Mapping[str, Any]], **parts: Any) -> Event | None:
    """The line at the top: where we are, links to neighbours, the state of the run."""
    return _mount(key, {"kind": "header", "crumbs": crumbs, **parts})


def title(key: str, text: str, subtitle: str) -> None:
    """A heading above a chart, and what it shows in small."""
    _mount(key, {"kind": "table", "rows": [], "empty": "", "title": text, "subtitle": subtitle})


def table(key: str, rows: Sequence[Mapping[str, Any]], *, empty: str, **parts: Any) -> Event | None:
    """Rows of cells; a row with `to` is a link."""
    return _mount(key, {"kind": "table", "rows": rows, "empty": empty, **parts})


def findings(key: str, entries: Sequence[Mapping[str, Any]], *, empty: str, **parts: Any) -> Event | None:
    """Findings as lines that open to why, what to do and the form to acknowledge."""
    return _mount(key, {"kind": "findings", "entries": entries, "empty": empty, **parts})


def tree(key: str, nodes: Sequence[Mapping[str, Any]]) -> Event | None:
    """Modules to unfold; each is a link."""
    return _mount(key, {"kind": "tree", "nodes": nodes})


def chart(key: str, figure: Figure, *, height: int, view: Any = None, **parts: Any) -> Event | None:
    """A plotly figure whose arrays are numpy; `view` is the range that the person asked for, None while following."""
    arrays: dict[str, Array] = {}
    skeleton = _without_arrays(figure, arrays, "", {})
    frame = {"height": height, "view": view, "figure": skeleton, **parts}
    known: _Sent | None = st.session_state.get(f"sent {key}")
    sent = _sent(known, arrays, frame)
    st.session_state[f"sent {key}"] = sent
    return _mount(key, {"kind": "chart", "version": sent.version, "base": sent.base, **sent.message})


def forget() -> None:
    """What was sent counts no more: a script that runs anew may be looked at by a browser that drew nothing yet."""
    for key in [key for key in st.session_state if str(key).startswith("sent ")]:
        del st.session_state[key]


@dataclass(frozen=True)
class _Sent:
    """The newest message about a chart: `version` is made from `base`, or from nothing."""

    version: int
    base: int | None
    arrays: dict[str, Array]
    frame: dict[str, Any]
    message: dict[str, Any]


_versions = itertools.count(time.time_ns() // 1000)  # a restarted server does not count anew


def _sent(known: _Sent | None, arrays: dict[str, Array], frame: dict[str, Any]) -> _Sent:
    """What to send now: what changed of the frame and of the arrays, or everything."""
    if known is None or known.arrays.keys() != arrays.keys():
        return _Sent(next(_versions), None, arrays, frame, {"frame": {"is": frame}, "arrays": _messages({}, arrays)})
    changes, columns = patch(known.frame, frame), _messages(known.arrays, arrays)
    if changes is None and not columns:
        return _Sent(known.version, known.version, arrays, frame, {"frame": None, "arrays": {}})
    return _Sent(next(_versions), known.version, arrays, frame, {"frame": changes, "arrays": columns})


def patch(old: Any, new: Any) -> dict[str, Any] | None:
    """What makes `new` of `old`: {"is": value}, or {"in": patches by key, "out": keys that go}; None: nothing."""
    if isinstance(old, dict) and isinstance(new, dict):
        inside = {key: patch(old[key], value) if key in old else {"is": value} for key, value in new.items()}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        inside = {str(i): patch(a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))}
    else:
        return None if type(old) is type(new) and old == new else {"is": new}
    inside = {key: change for key, change in inside.items() if change is not None}
    gone = [key for key in old if key not in new] if isinstance(old, dict) else []
    if not inside and not gone:
        return None
    return {"in": inside, "out": gone} if gone else {"in": inside}


def _messages(old: dict[str, Array], new: dict[str, Array]) -> dict[str, Any]:
    """Each changed array's columns after those that it shares with the old one."""
    messages = {}
    for name, array in new.items():
        before = old.get(name)
        if before is not None and (before.shape[:-1], before.dtype) != (array.shape[:-1], array.dtype):
            before = None
        keep = 0 if before is None else _common_columns(before, array)
        if before is not None and keep == array.shape[-1] == before.shape[-1]:
            continue
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
            whole = value.dtype.kind in "iu" and value.dtype != np.int16
            arrays[path] = value.astype(np.int32 if whole else value.dtype, copy=False)
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
        data=data,
        on_go_change=_ignore,
        on_click_change=_ignore,
        on_zoom_change=_ignore,
        on_acknowledge_change=_ignore,
        on_tick_change=_ignore,
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
    match result.get("tick"):
        case {"name": str(name), "on": bool(on)}:
            yield Tick(name, on)
    match result.get("acknowledge"):
        case {"findings": list(findings), "by": str(by), "reason": str(reason)}:
            yield Acknowledge(tuple(number for number in findings if type(number) is int), by, reason)


def _ignore() -> None:
    """A trigger needs a callback; the value is read from the result."""


def _component() -> Any:
    return st.components.v2.component("fp8scope_panel", js=assets.loader(), isolate_styles=False)
