"""What all views share: going from one to another, the address, the line of status, and sentences instead of errors."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import streamlit as st

from fp8scope_collector.storage.reader import RunSummary, StorageError
from fp8scope_dashboard import links, queries, text
from fp8scope_dashboard.component import panel

TICK_S = 2.0
STATE_COLOR = {"running": "info", "stale": "warning", "finished": "muted", "failed": "critical"}
HOW_TO_RECORD = (
    'Attach a training job: `fp8scope_agent.attach(model, run="my-run")`. It appears here with its first message.'
)


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """A view or a fragment that turns a database that cannot be read into a sentence; the next tick tries again."""

    @functools.wraps(function)
    def run(*arguments: Any) -> None:
        try:
            function(*arguments)
        except StorageError as error:
            st.error(_escaped(f"{error}"))
            st.caption("This page tries again by itself every few seconds.")
            st.fragment(_retry, run_every=TICK_S)()

    return run


def _retry() -> None:
    """Reruns the page once the database answers."""
    try:
        queries.reader().runs()
    except StorageError:
        return
    st.rerun()


def here() -> links.Where:
    """The place that the address names."""
    return links.parse(st.query_params.to_dict())


def move(where: links.Where) -> None:
    """Changes the address of this view. Setting it to what it is would put it into the browser's history again."""
    if here() != where:
        st.query_params.from_dict(where.params())


def follow(event: panel.Event | None) -> None:
    """Opens the view of a link that was clicked; other events are the caller's."""
    if isinstance(event, panel.Go):
        go(links.parse(event.params))


def go(where: links.Where) -> None:
    """Opens another view, or this one elsewhere: a new entry of the browser's history."""
    move(where)
    st.rerun()


def live(run: RunSummary) -> float | None:
    """How often a view of this run asks for news: never once it has ended."""
    return TICK_S if run.state in ("running", "stale") else None


def status(run: RunSummary) -> list[dict[str, str]]:
    """The state of a run in a line: state, step, age, ranks, losses."""
    age = text.duration((time.time_ns() - run.last_seen_unix_ns) / 1e9)
    parts = [{"text": run.state, "color": STATE_COLOR[run.state]}]
    if run.last_step is not None:
        parts.append({"text": f"step {text.count(run.last_step)}"})
    parts.append({"text": f"{age} ago", "title": "age of the last message"})
    parts.append({"text": f"{run.ranks}/{run.world_size} ranks"})
    if run.incarnations > 1:
        parts.append({"text": f"incarnation {run.incarnations}", "title": "process lives: the run was resumed"})
    if run.dropped_rows:
        dropped = f"{text.count(run.dropped_rows)} rows dropped"
        parts.append({"text": dropped, "color": "warning", "title": "rows that the agents had to drop before sending"})
    return parts


def crumbs(run: RunSummary | None = None, where: links.Where | None = None) -> list[dict[str, Any]]:
    """fp8scope, runs, the run, the layer: each with its link."""
    found: list[dict[str, Any]] = [{"text": "fp8scope", "to": {}}]
    found.append({"text": "runs", "to": {} if run else None})
    if run:
        to_run = where.to(layer="", role=None, step=None) if where and where.layer else None
        found.append({"text": run.ref, "to": to_run})
    if where and where.layer:
        found.append({"text": where.layer, "to": None})
    return found


def pick_run(where: links.Where) -> RunSummary | None:
    """The run of the address, or a sentence about which there are."""
    run = queries.run(where.run)
    if run is None:
        follow(panel.header("header", crumbs=crumbs()))
        known = ", ".join(run.ref for run in queries.runs()[:8]) or "none yet"
        st.warning(_escaped(f"Run {where.run!r} is not in this database. Runs here: {known}."))
    return run


def choose(
    label: str, options: list[str], chosen: str, names: Mapping[str, str], change: Callable[[str], links.Where]
) -> None:
    """A choice that the address decides: a change goes to the address first."""
    key = f"{label} {chosen}"

    def changed() -> None:
        move(change(st.session_state[key] or chosen))

    st.segmented_control(
        label,
        options,
        default=chosen,
        key=key,
        on_change=changed,
        format_func=lambda option: names.get(option, option),
        label_visibility="collapsed",
        required=True,
    )


def zoomed(where: links.Where, event: panel.Zoom, last_step: int) -> links.Where:
    """Where a zoom leads: to its range, following if it reaches the newest step, or back to everything."""
    if event.first_step is None or event.last_step is None or event.last_step - event.first_step < 1:
        return replace(where, first_step=None, last_step=None)
    end = None if event.last_step >= last_step else event.last_step
    return replace(where, first_step=event.first_step or None, last_step=end)


def escaped(value: str) -> str:
    """Text from a training job for streamlit's markdown: shown as it is."""
    return _escaped(value)


def _escaped(value: str) -> str:
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!<>|$~:&^=" else c for c in value)
