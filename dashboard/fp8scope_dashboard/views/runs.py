"""All runs: state, open findings, step, age, size, and the tensor that does worst; a row opens the run.

The filter's words must all occur in a run's name, tags or message; `state:` and `tag:` narrow to these. Ticked runs
are compared.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from fp8scope_collector.storage.reader import RunSummary, StorageError
from fp8scope_dashboard import links, queries, text
from fp8scope_dashboard.component import panel
from fp8scope_dashboard.views import shell

SHOWN = 200
COLUMNS = [
    ("", "", False),
    ("run", "run", False),
    ("state", "state", False),
    ("findings", "open findings", False),
    ("step", "last step", True),
    ("heard", "last message", True),
    ("started", "started", True),
    ("took", "duration", True),
    ("rows", "rows", True),
    ("ranks", "ranks", True),
    ("", "worst tensor of the newest 64 steps", False),
]
SEVERITIES = ("critical", "warning", "info")
_STATES = ("failed", "crashed", "stale", "running", "finished")


def view() -> None:
    """The list, refreshed by itself."""
    st.fragment(shell.guarded(shell.header), run_every=shell.TICK_S)(shell.here())
    with st.container(horizontal=True, vertical_alignment="center"):
        shell.filter_box(shell.here(), "filter: gpt tag:nightly state:running", width=320)
    st.fragment(shell.guarded(_list), run_every=shell.TICK_S)()


def _list() -> None:
    where = shell.here()
    runs = queries.runs()
    found = [run for run in runs if _matches(run, where.filter)]
    counts = queries.findings_by_severity()
    found = _sorted(found, where.sort, counts)
    running = sum(run.state == "running" for run in runs)
    subtitle = f"{text.count(len(runs))} runs, {text.count(running)} running"
    if len(found) != len(runs):
        subtitle = f"{text.count(len(found))} of {subtitle}"
    if len(found) > SHOWN:
        subtitle += f"; the first {SHOWN} are shown"
    rows = [_row(run, where, counts.get(run.id, {})) for run in found[:SHOWN]]
    empty = "No runs yet. " + shell.HOW_TO_RECORD.replace("`", "")
    if runs:
        empty = f"No run matches {where.filter!r}. Words must occur in name or tags; state:running, tag:name narrow."
    columns, actions = _columns(where), _actions(where, runs)
    event = panel.table("runs", rows, columns=columns, empty=empty, title="runs", subtitle=subtitle, actions=actions)
    if isinstance(event, panel.Tick):
        rest = tuple(ref for ref in where.runs if ref != event.name)
        shell.go(replace(where, runs=(*rest, event.name)[-links.MOST_RUNS :] if event.on else rest))
    shell.follow(event)


def _columns(where: links.Where) -> list[dict[str, Any]]:
    """Headings that sort, by what is worst or newest first."""
    columns = []
    for name, title, right in COLUMNS:
        column: dict[str, Any] = {"text": title, "right": right}
        if name:
            column["to"] = where.to(sort=f"-{name}" if where.sort == name else name)
            column["sorted"] = {name: "descending", f"-{name}": "ascending"}.get(where.sort, "")
        columns.append(column)
    return columns


def _actions(where: links.Where, runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """What can be done with the runs that are ticked."""
    known = {run.ref for run in runs}
    ticked = tuple(ref for ref in where.runs if ref in known)
    if not ticked:
        return []
    actions: list[dict[str, Any]] = [{"text": "untick all", "to": where.to(runs=())}]
    if len(ticked) >= 2:
        to = links.Where(view="compare", runs=ticked).params()
        actions.insert(0, {"text": f"compare {len(ticked)} runs", "to": to, "main": True})
    else:
        actions.insert(0, {"text": "tick another run to compare"})
    return actions


def _row(run: RunSummary, where: links.Where, findings: dict[str, int]) -> dict[str, Any]:
    now = time.time_ns()
    took = (run.last_seen_unix_ns - run.created_unix_ns) / 1e9
    step = "–" if run.last_step is None else text.count(run.last_step)
    dropped = f"{text.count(run.dropped_rows)} dropped" if run.dropped_rows else ""
    ticked = run.ref in where.runs
    rest = tuple(ref for ref in where.runs if ref != run.ref)
    tick = where.to(runs=rest if ticked else (*rest, run.ref)[-links.MOST_RUNS :])
    return {
        "to": links.Where(run=run.ref).params(),
        "cells": [
            {"check": {"on": ticked, "to": tick, "name": run.ref, "label": f"compare {run.ref}"}},
            {"text": run.ref, "style": "fs-main", "sub": ", ".join(run.tags), "link": True},
            {"text": run.state, "dot": shell.STATE_COLOR[run.state], "sub": run.outcome_message},
            _findings(run, findings),
            {"text": step, "right": True},
            {
                "text": f"{text.duration((now - run.last_seen_unix_ns) / 1e9)} ago",
                "right": True,
                "when": run.last_seen_unix_ns // 10**6,
            },
            {"text": "", "right": True, "when": run.created_unix_ns // 10**6},
            {"text": text.duration(took), "right": True},
            {"text": text.count(run.rows), "right": True, "sub": dropped},
            {"text": f"{run.ranks}/{run.world_size}", "right": True},
            _worst(run),
        ],
    }


def _findings(run: RunSummary, findings: dict[str, int]) -> dict[str, Any]:
    """How many are open and nobody has acknowledged, by severity."""
    marks = [
        {"dot": severity, "text": text.count(findings[severity])} for severity in SEVERITIES if severity in findings
    ]
    return {"marks": marks, "to": links.Where(view="findings", run=run.ref).params()} if marks else {"text": "–"}


def _worst(run: RunSummary) -> dict[str, Any]:
    """The worst tensor; a run whose rows cannot be read says so in its own row."""
    try:
        found = queries.worst(queries.database_url(), run.id, run.rows)
    except StorageError:
        return {"text": "rows cannot be read"}
    if found is None:
        return {"text": "no rows yet" if not run.rows else "no overflow", "style": "fs-quiet"}
    worst, quantity = found
    return {
        "text": worst.layer,
        "role": worst.role.value,
        "sub": f"{worst.role.value}, {text.share(worst.value)} {quantity}",
        "to": links.Where(run=run.ref, layer=worst.layer, role=worst.role).params(),
    }


def _matches(run: RunSummary, words: str) -> bool:
    tags = [tag.casefold() for tag in run.tags]
    everything = " ".join([run.ref, run.state, run.outcome_message, *run.tags]).casefold()
    for word in words.casefold().split():
        kind, colon, value = word.partition(":")
        if colon and kind == "state":
            fits = run.state == value
        elif colon and kind == "tag":
            fits = value in tags
        else:
            fits = word in everything
        if not fits:
            return False
    return True


def _sorted(runs: list[RunSummary], sort: str, counts: dict[int, dict[str, int]]) -> list[RunSummary]:
    """By a column, worst or newest or largest first; `-` turns it round. As given: heard from last first."""

    def key(run: RunSummary) -> Any:
        of_run = counts.get(run.id, {})
        return {
            "run": run.ref.casefold(),
            "state": _STATES.index(run.state),
            "findings": [-of_run.get(severity, 0) for severity in SEVERITIES],
            "step": -(run.last_step if run.last_step is not None else -1),
            "heard": -run.last_seen_unix_ns,
            "started": -run.created_unix_ns,
            "took": run.created_unix_ns - run.last_seen_unix_ns,
            "rows": -run.rows,
            "ranks": -run.world_size,
        }[sort.removeprefix("-")]

    if sort.removeprefix("-") not in [name for name, _, _ in COLUMNS if name]:
        return runs
    return sorted(runs, key=key, reverse=sort.startswith("-"))
