"""All runs: state, step, age, size, and the tensor that does worst; a row opens the run."""

from __future__ import annotations

import time
from typing import Any

import streamlit as st

from fp8scope_collector.storage.reader import RunSummary, StorageError
from fp8scope_dashboard import links, queries, text
from fp8scope_dashboard.component import panel
from fp8scope_dashboard.views import shell

COLUMNS = [
    {"text": "run"},
    {"text": "state"},
    {"text": "last step", "right": True},
    {"text": "last message", "right": True},
    {"text": "duration", "right": True},
    {"text": "rows", "right": True},
    {"text": "ranks", "right": True},
    {"text": "worst tensor of the newest 50 steps"},
]


def view() -> None:
    """The list, refreshed by itself."""
    st.fragment(shell.guarded(_list), run_every=shell.TICK_S)()


def _list() -> None:
    runs = queries.runs()
    running = sum(run.state == "running" for run in runs)
    summary = [{"text": f"{text.count(len(runs))} runs"}, {"text": f"{text.count(running)} running"}]
    shell.follow(panel.header("header", crumbs=shell.crumbs(), status=summary))
    rows = [_row(run) for run in runs]
    empty = "No runs yet. " + shell.HOW_TO_RECORD.replace("`", "")
    shell.follow(panel.table("runs", rows, columns=COLUMNS, empty=empty))


def _row(run: RunSummary) -> dict[str, Any]:
    age = (time.time_ns() - run.last_seen_unix_ns) / 1e9
    took = (run.last_seen_unix_ns - run.created_unix_ns) / 1e9
    step = "–" if run.last_step is None else text.count(run.last_step)
    dropped = f"{text.count(run.dropped_rows)} dropped" if run.dropped_rows else ""
    return {
        "to": links.Where(run=run.ref).to(),
        "cells": [
            {"text": run.ref, "style": "fs-main", "sub": ", ".join(run.tags)},
            {"text": run.state, "dot": shell.STATE_COLOR[run.state], "sub": run.outcome_message},
            {"text": step, "right": True},
            {"text": f"{text.duration(age)} ago", "right": True},
            {"text": text.duration(took), "right": True},
            {"text": text.count(run.rows), "right": True, "sub": dropped},
            {"text": f"{run.ranks}/{run.world_size}", "right": True},
            _worst(run),
        ],
    }


def _worst(run: RunSummary) -> dict[str, Any]:
    """The worst tensor; a run whose rows cannot be read says so in its own row."""
    try:
        found = queries.worst(queries.database_url(), run.id, run.rows)
    except StorageError:
        return {"text": "rows cannot be read"}
    if found is None:
        return {"text": "no rows yet" if not run.rows else "no overflow"}
    worst, quantity = found
    return {
        "text": worst.layer,
        "role": worst.role.value,
        "sub": f"{worst.role.value}, {text.share(worst.value)} {quantity}",
    }
