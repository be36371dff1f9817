"""The Python side of the one component: headers, tables and charts, drawn by panel.js.

A chart is sent whole when its page is opened; after that only what changed travels (message.py). What the person did
comes back as an `Event`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st

from fp8scope_dashboard.component import assets, message
from fp8scope_dashboard.theme import Figure


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
    known: message.Sent | None = st.session_state.get(f"sent {key}")
    sent = message.changed(known, figure, height=height, view=view, **parts)
    st.session_state[f"sent {key}"] = sent
    return _mount(key, message.chart(sent))


def forget() -> None:
    """What was sent counts no more: a script that runs anew may be looked at by a browser that drew nothing yet."""
    for key in [key for key in st.session_state if str(key).startswith("sent ")]:
        del st.session_state[key]


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
