"""What all views share: going from one to another, the address, the line of status, and sentences instead of errors."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from fp8scope_collector.storage.reader import RunSummary, StorageError
from fp8scope_dashboard import links, names, queries, text
from fp8scope_dashboard.component import panel

TICK_S = 2.0
STATE_COLOR = {"running": "info", "stale": "warning", "finished": "muted", "crashed": "critical", "failed": "critical"}
RUN_VIEWS, GLOBAL_VIEWS = ("", "scales", "findings"), ("findings", "system", "settings")
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
            st.error(escaped(f"{error}"))
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
    """Opens the view of a link that was clicked, or acknowledges a finding; other events are the caller's."""
    if isinstance(event, panel.Go):
        go(links.parse(event.params))
    elif isinstance(event, panel.Acknowledge):
        problem = queries.acknowledge(event.findings, by=event.by, reason=event.reason)
        if problem:
            st.toast(escaped(problem))
        else:
            st.rerun()


def go(where: links.Where) -> None:
    """Opens another view, or this one elsewhere: a new entry of the browser's history."""
    move(where)
    st.rerun()


def live(run: RunSummary) -> float | None:
    """How often a view of this run asks for news: never once it has ended."""
    return TICK_S if run.state in ("running", "stale", "crashed") else None


def _status(run: RunSummary) -> list[dict[str, Any]]:
    """The state of a run in a line: state, step, age, ranks, losses."""
    age = text.duration((time.time_ns() - run.last_seen_unix_ns) / 1e9)
    parts: list[dict[str, Any]] = [{"text": run.state, "color": STATE_COLOR[run.state], "title": run.outcome_message}]
    if run.last_step is not None:
        parts.append({"text": f"step {text.count(run.last_step)}"})
    parts.append({"text": f"{age} ago", "title": "last message", "when": run.last_seen_unix_ns // 10**6})
    parts.append({"text": f"{run.ranks}/{run.world_size} ranks"})
    if run.incarnations > 1:
        parts.append({"text": f"incarnation {run.incarnations}", "title": "process lives: the run was resumed"})
    if run.dropped_rows:
        dropped = f"{text.count(run.dropped_rows)} rows dropped"
        parts.append({"text": dropped, "color": "warning", "title": "rows that the agents had to drop before sending"})
    return parts


def filter_box(where: links.Where, placeholder: str, *, width: int = 190) -> None:
    """A text field whose content is the filter of the address."""
    key = f"filter {where.filter}"

    def changed() -> None:
        move(replace(where, filter=st.session_state[key].strip()))

    st.text_input(
        "filter",
        where.filter,
        names.LONGEST_FILTER,
        key,
        on_change=changed,
        placeholder=placeholder,
        label_visibility="collapsed",
        width=width,
    )


def header(where: links.Where, run: RunSummary | None = None, *, nav: Sequence[Mapping[str, Any]] = ()) -> None:
    """The line at the top: where we are, what else there is, neighbours, the state of the run; follows its links."""
    crumbs: list[dict[str, Any]] = [{"text": "fp8scope", "to": {}}]
    crumbs.append({"text": "runs", "to": {} if where != links.Where() else None})
    found = queries.open_findings()
    if run is None:
        tabs = [("runs", "", {}), *((view, view, {"view": view}) for view in GLOBAL_VIEWS)]
        status = []
        if where.view:
            crumbs = [crumbs[0], {"text": where.view, "to": None}]
    else:
        tabs = [(view or "overview", view, where.leave(view=view)) for view in RUN_VIEWS]
        status = _status(run)
        at_run = not where.layer and not where.view
        crumbs.append({"text": run.ref, "to": None if at_run else where.leave()})
        if where.layer:
            crumbs.append({"text": where.layer, "to": None})
    if run is not None:
        tabs.append(("compare", "compare", links.Where(view="compare", runs=(run.ref,)).params()))
    shown = []
    for name, view, to in tabs:
        count = sum(found.values()) if run is None else found.get(run.id, 0)
        here = where.view == view and not where.layer
        shown.append({"text": name, "to": to, "here": here, "count": count if view == "findings" and count else None})
    follow(panel.header("header", crumbs=crumbs, tabs=shown, nav=nav, status=status))


def pick_run(where: links.Where) -> RunSummary | None:
    """The run of the address, or a sentence about which there are."""
    run = queries.run(where.run)
    if run is None:
        header(replace(where, run="", layer="", view=""))
        known = ", ".join(run.ref for run in queries.runs()[:8]) or "none yet"
        st.warning(escaped(f"Run {where.run!r} is not in this database. Runs here: {known}."))
    return run


def choose(
    label: str, options: Sequence[str], chosen: str, words: Mapping[str, str], change: Callable[[str], links.Where]
) -> None:
    """A choice that the address decides: a change goes to the address first."""
    key = f"{label} {chosen}"  # has the value: going back in the browser moves the control, too

    def changed() -> None:
        move(change(st.session_state[key] or chosen))

    st.segmented_control(
        label,
        options,
        default=chosen,
        key=key,
        on_change=changed,
        format_func=lambda option: words.get(option, option),
        label_visibility="collapsed",
        required=True,
    )


def range_slider(where: links.Where, run: RunSummary) -> None:
    """The range as a slider; its right end at the newest step follows the run."""
    first, last = run.first_step or 0, run.last_step or 0
    if last <= first:
        return
    start = min(max(first, where.first_step or first), last)
    end = last if where.last_step is None else max(start, min(last, where.last_step))
    key = f"range {first} {start} {where.last_step}"

    def changed() -> None:
        new_start, new_end = st.session_state[key]
        first_step, last_step = new_start if new_start > first else None, new_end if new_end < last else None
        move(replace(where, first_step=first_step, last_step=last_step))

    st.slider("steps", first, last, (start, end), key=key, on_change=changed, label_visibility="collapsed", width=190)


def steps_of(where: links.Where, run: RunSummary) -> tuple[int, int]:
    """The first and last step that a view of this run shows."""
    newest = run.last_step or 0
    last = newest if where.last_step is None else min(newest, where.last_step)
    return max(run.first_step or 0, where.first_step or 0), last


def zoomed(where: links.Where, event: panel.Zoom, last_step: int) -> links.Where:
    """Where a zoom leads: to its range, following if it reaches the newest step, or back to everything.

    Nearly reaching it is reaching it: a run goes on while somebody draws.
    """
    if event.first_step is None or event.last_step is None or event.last_step - event.first_step < 1:
        return replace(where, first_step=None, last_step=None)
    newest = last_step - max(1, (last_step - event.first_step) // 40)
    end = None if event.last_step >= newest else event.last_step
    return replace(where, first_step=event.first_step or None, last_step=end)


def escaped(value: str) -> str:
    """Text from a training job for streamlit's markdown: shown as it is."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!<>|$~:&^=" else c for c in value)
