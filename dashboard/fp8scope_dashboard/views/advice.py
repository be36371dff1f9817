"""What a run says about recipes that it did not use: the constants that would do, and how long a scale may be kept.

Below the charts of scales. The advisers are the collector's (`fp8scope advise` prints the same). They read every row of
the run, so that a long one is read only when somebody asks, and a very long one not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from fp8scope_collector.advisers import ConstantAdvice, RefreshAdvice
from fp8scope_collector.storage.reader import RunSummary
from fp8scope_dashboard import queries, text
from fp8scope_dashboard.component import panel

AT_ONCE = 200_000  # rows: two seconds
MOST_ROWS = 2_000_000


def section(run: RunSummary) -> None:
    """The advice, or what it takes to get it."""
    panel.title("advice", "advice", "what other recipes would have to be told, from this run's tensors alone")
    if run.rows > MOST_ROWS:
        command = f"fp8scope advise {run.ref} --db {queries.shown_database()}"
        st.caption(f"That reads all {text.count(run.rows)} rows, which is for the command line: `{_code(command)}`")
        return
    if run.rows > AT_ONCE and not st.button(f"read {text.count(run.rows)} rows and advise", type="tertiary"):
        return
    with st.spinner("Reading every row of the run"):
        constant, refresh = queries.advice(run)
    columns = [
        {"text": "role"},
        {"text": "a constant scale", "right": True},
        {"text": "below it, lost precision of"},
        {"text": "above it, clipped tails of"},
        {"text": "nothing clips up to", "right": True},
        {"text": "keep a scale for", "right": True},
        {"text": "changes a step", "right": True},
        {"text": "drift", "right": True},
    ]
    by_role = {advice.role: advice for advice in refresh}
    rows = [_row(advice, by_role.get(advice.role) if advice.role else None) for advice in constant]
    empty = "No row of this run says how large its tensors were: amax, numel and sum_sq are needed."
    panel.table("advice table", rows, columns=columns, empty=empty, style="fs-tight")


def _row(constant: ConstantAdvice, refresh: RefreshAdvice | None) -> dict[str, Any]:
    low, high = constant.lower, constant.upper
    between = f"{text.exp2(low.scale_exp2)} … {text.exp2(high.scale_exp2)}"
    if low.scale_exp2 == high.scale_exp2:
        between = text.exp2(low.scale_exp2)
    none = "one tensor needs a larger scale than another bears"
    who: dict[str, Any] = {"text": "all roles"}
    if constant.role is not None:
        who = {"text": constant.role.value, "mark": constant.role.value}
    cells = [
        who,
        {"text": "none" if constant.empty else between, "right": True, "title": none if constant.empty else ""},
        {"text": low.tensor, "sub": f"needs {text.exp2(low.scale_exp2)}"},
        {"text": high.tensor, "sub": f"bears {text.exp2(high.scale_exp2)}"},
        {"text": text.exp2(constant.never_clips.scale_exp2), "right": True, "title": constant.never_clips.tensor},
    ]
    if refresh is None:
        return {"cells": [*cells, *({"text": ""} for _ in range(3))]}
    steps = "1 step" if refresh.interval == 1 else f"{refresh.interval} steps"
    return {
        "cells": [
            *cells,
            {"text": steps, "right": True, "title": _beyond(refresh)},
            {"text": text.share(refresh.flips_per_step), "right": True, "title": "share of steps with another scale"},
            {"text": f"{refresh.drift:+.0f} bits".replace("-", "−") if round(refresh.drift) else "none", "right": True},
        ]
    }


def _beyond(refresh: RefreshAdvice) -> str:
    """What the next longer interval would cost."""
    longer: Sequence[int] = [interval for interval in refresh.clipped_steps if interval > refresh.interval]
    if not longer:
        return "the run is too short to try a longer one"
    return f"kept for {longer[0]} steps, {text.share(refresh.clipped_steps[longer[0]])} of the steps would clip"


def _code(command: str) -> str:
    """A command between backticks of markdown."""
    return command.replace("`", "'")
