"""What this dashboard was started with: to read, not to change."""

from __future__ import annotations

import importlib.metadata
import os

from fp8scope_collector.storage.reader import STALE_AFTER_S, StorageError
from fp8scope_dashboard import collector, login, queries
from fp8scope_dashboard.charts import panels
from fp8scope_dashboard.component import panel
from fp8scope_dashboard.views import shell

_PACKAGES = ("fp8scope-dashboard", "fp8scope-collector", "fp8core", "streamlit", "plotly", "sqlalchemy", "numpy")


def view() -> None:
    """Three tables; secrets are left out."""
    shell.header(shell.here())
    asked = login.required()
    allowed = ", ".join(sorted(asked.allow)) if asked else ""
    facts = [
        ("database", queries.shown_database(), "--db, FP8SCOPE_DB"),
        ("schema", _schema(), "made by `fp8scope serve` or `fp8scope migrate`"),
        ("listens at", os.environ.get("FP8SCOPE_LISTEN", ""), "--listen, FP8SCOPE_LISTEN"),
        ("collector's metrics", os.environ.get("FP8SCOPE_METRICS") or collector.DEFAULT_URL, "FP8SCOPE_METRICS"),
        ("sign-in", f"OpenID Connect at {asked.origin}" if asked else "none: who reaches it sees all", "--login FILE"),
        ("may look", allowed or "everybody", "`allow` in the login file"),
    ]
    fixed = [
        ("a live view asks", f"every {shell.TICK_S:g} s", "while its run has not ended"),
        ("a run is stale", f"after {STALE_AFTER_S:g} s of silence", "and running again with its next message"),
        ("columns of a heat map", f"at most {panels.MAX_COLUMNS}", "each a power of two of steps, extremes kept"),
        ("points of a curve", f"at most {panels.MAX_POINTS}", "extremes kept"),
        ("findings read", f"at most {queries.MOST_FINDINGS} a run", "the worst and newest"),
    ]
    versions = [(name, importlib.metadata.version(name), "") for name in _PACKAGES]
    for title, rows in (("settings", facts), ("fixed", fixed), ("versions", versions)):
        cells = [
            [
                {"text": name, "style": "fs-sub"},
                {"text": value, "style": "fs-mono"},
                {"text": note, "style": "fs-quiet"},
            ]
            for name, value, note in rows
        ]
        panel.table(
            title, [{"cells": c} for c in cells], title=title, subtitle="", empty="", style="fs-facts fs-settings"
        )


def _schema() -> str:
    try:
        state, _ = queries.system()
    except StorageError as error:
        return str(error)
    return f"{state.engine}, version {state.version}"
