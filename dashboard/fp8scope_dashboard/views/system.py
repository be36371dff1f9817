"""How the service does: what comes in and how late, what was dropped and why, the database, the agents."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import streamlit as st

from fp8scope_collector.storage.reader import SystemState
from fp8scope_dashboard import links, queries, text
from fp8scope_dashboard.collector import Service
from fp8scope_dashboard.component import panel
from fp8scope_dashboard.views import shell

SHOWN = 200
SKEWED_S = 2.0


def view() -> None:
    """Refreshed by itself."""
    where = shell.here()
    st.fragment(shell.guarded(_page), run_every=shell.TICK_S)(where)


def _page(where: links.Where) -> None:
    shell.header(where)
    state, rates = queries.system()
    service = queries.service()
    left, middle, right = st.columns(3, gap="medium")
    with left:
        _table("ingest", "ingest", _ingest(state, rates))
    with middle:
        _table("database", "database", _database(state, rates))
    with right:
        _table("collector", "collector", _collector(service))
    _drops(state)
    _agents(state)


def _table(key: str, title: str, facts: list[tuple[str, str, str]], subtitle: str = "") -> None:
    rows = [
        {"cells": [{"text": name, "style": "fs-sub"}, {"text": value, "style": "fs-mono", "sub": note}]}
        for name, value, note in facts
    ]
    panel.table(key, rows, title=title, subtitle=subtitle, empty="", style="fs-facts")


def _ingest(state: SystemState, rates: queries.Rates) -> list[tuple[str, str, str]]:
    now = time.time_ns()
    sending = [s for s in state.sources if not s.outcome and now - s.last_seen_unix_ns < 60e9]
    lag = max(((now - s.last_seen_unix_ns) / 1e9 for s in sending), default=None)
    return [
        ("rows a second", "–" if rates.rows is None else text.number(rates.rows), rates.over),
        ("sending now", f"{text.count(len(sending))} of {text.count(state.total_sources)} sources", ""),
        ("longest silence", "–" if lag is None else text.duration(lag), "of those that send; the lag of their data"),
        ("rows in all", text.count(state.total_rows), ""),
    ]


def _database(state: SystemState, rates: queries.Rates) -> list[tuple[str, str, str]]:
    each = state.database_bytes / state.total_rows if state.total_rows else float("nan")
    growth = "–" if rates.bytes is None else f"{text.size(rates.bytes * 3600)} an hour"
    return [
        ("size", text.size(state.database_bytes), ""),
        ("growth", growth, rates.over),
        ("bytes a row", text.number(each), "everything counted"),
        ("engine", state.engine, f"schema {state.version}"),
    ]


def _collector(service: Service) -> list[tuple[str, str, str]]:
    if service.problem:
        return [("address", service.url, service.problem), ("", "", "FP8SCOPE_METRICS names another")]

    def said(value: float | None, words: Any = text.number) -> str:
        return "–" if value is None else str(words(value))

    return [
        ("queue", said(service.queue_bytes, text.size), "batches that wait for the writer"),
        ("agents connected", said(service.open_streams), ""),
        ("a commit takes", said(service.commit_s, lambda s: f"{text.number(s * 1000)} ms"), "mean since it started"),
        ("batches refused", said(service.refused_batches), f"version {service.version}, {service.url}"),
    ]


def _drops(state: SystemState) -> None:
    """Rows that agents dropped, by reason and run."""
    dropped: Counter[tuple[str, str]] = Counter()
    for source in state.sources:
        for reason, lost in source.drops.items():
            dropped[source.run, reason] += lost
    rows = [
        {
            "to": links.Where(run=run).params(),
            "cells": [{"text": run}, {"text": reason}, {"text": text.count(count), "right": True}],
        }
        for (run, reason), count in dropped.most_common(20)
    ]
    columns = [{"text": "run"}, {"text": "reason"}, {"text": "rows", "right": True}]
    empty = "No agent has dropped a row."
    shell.follow(panel.table("drops", rows, columns=columns, title="dropped by agents", subtitle="", empty=empty))


def _agents(state: SystemState) -> None:
    now = time.time_ns()
    columns = [
        {"text": "run"},
        {"text": "rank", "right": True},
        {"text": "life", "right": True},
        {"text": "host"},
        {"text": "agent"},
        {"text": "torch"},
        {"text": "last step", "right": True},
        {"text": "rows", "right": True},
        {"text": "last message", "right": True},
        {"text": "clock skew", "right": True},
    ]
    rows = []
    for source in state.sources[:SHOWN]:
        skewed = abs(source.clock_skew_s) > SKEWED_S
        skew = f"{text.number(source.clock_skew_s * 1000)} ms"
        age = text.duration((now - source.last_seen_unix_ns) / 1e9)
        host, device = source.environment.get("host", "–"), source.environment.get("device", "")
        rows.append(
            {
                "to": links.Where(run=source.run).params(),
                "cells": [
                    {"text": source.run},
                    {"text": str(source.rank), "right": True},
                    {"text": str(source.incarnation), "right": True},
                    {"text": host, "sub": device},
                    {"text": source.agent_version},
                    {"text": source.environment.get("torch", "–")},
                    {"text": "–" if source.last_step is None else text.count(source.last_step), "right": True},
                    {"text": text.count(source.rows), "right": True},
                    {"text": f"{age} ago", "right": True, "when": source.last_seen_unix_ns // 10**6},
                    {"text": skew, "right": True, "dot": "warning" if skewed else None},
                ],
            }
        )
    subtitle = f"the {SHOWN} heard from last of {text.count(state.total_sources)}" if len(state.sources) > SHOWN else ""
    empty = "No agent has connected yet."
    shell.follow(panel.table("agents", rows, columns=columns, title="agents", subtitle=subtitle, empty=empty))
