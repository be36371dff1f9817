"""One run, live: what was found, then scalars and the heat map of layers x steps on one axis, the worst tensors beside.

A cell or an entry opens the tensor at that step. A range drawn in the chart becomes the range of the address, and the
columns get as fine as it allows; a double click goes back to the whole run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from fp8core.records import Role
from fp8scope_collector.storage.reader import QUANTITIES, HeatMap, Quantity, RunSummary, Slot
from fp8scope_dashboard import heatmaps, links, names, queries, text
from fp8scope_dashboard.charts import overview, ranking
from fp8scope_dashboard.component import panel
from fp8scope_dashboard.views import findings, shell

NAMES: dict[str, str] = {
    "scale_exp2": "scale",
    "amax": "amax",
    "headroom": "headroom",
    "overflow": "overflow",
    "underflow": "underflow",
    "subnormal": "subnormal",
    "sqnr_db": "SQNR",
    "nonfinite": "NaN, Inf",
    "spread": "spread of ranks",
}
ALL = "all"
RECENT_STEPS = 100
WORST = 12
REDRAW = 1.1  # a run that is longer by this factor gets new controls, so that the range's end is never far behind


def view() -> None:
    """The page of the run that the address names."""
    where = shell.here()
    run = shell.pick_run(where)
    if run is None:
        return
    st.fragment(shell.guarded(_top), run_every=shell.live(run))(where)
    if run.first_step is None:
        age = text.duration((time.time_ns() - run.last_seen_unix_ns) / 1e9)
        st.info(f"This run has no rows yet; last heard from {age} ago. They appear with its first `monitor.step()`.")
        st.fragment(_wait_for_rows, run_every=shell.TICK_S)(run.ref)
        return
    _controls(where, run)
    st.fragment(shell.guarded(_body), run_every=shell.live(run))(where, run.last_step or 0)


def _top(where: links.Where) -> None:
    if run := queries.run(where.run):
        shell.header(where, run)
        if run.first_step is not None:
            findings.strip(where, run.id)


def _wait_for_rows(ref: str) -> None:
    run = queries.run(ref)
    if run is not None and run.first_step is not None:
        st.rerun()


def _controls(where: links.Where, run: RunSummary) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        quantity_box(where)
        roles = [*(role.value for role in Role), ALL]
        role = where.role.value if where.role else ALL
        shell.choose("role", roles, role, {}, lambda r: replace(where, role=None if r == ALL else Role(r)))
        shell.range_slider(where, run)
        shell.filter_box(where, "filter: blocks.1*.mlp*  /regex/", width=185)
        modules = st.popover("modules", type="tertiary", on_change="rerun", key="modules")
        if modules.open:  # a large model's tree is larger than its picture
            with modules:
                _modules(where, queries.slots_of(run))


def quantity_box(where: links.Where) -> None:
    """A choice of what the heat map shows."""
    key = f"quantity {where.quantity}"
    options = [*QUANTITIES]

    def changed() -> None:
        shell.move(replace(where, quantity=st.session_state[key]))

    st.selectbox(
        "quantity",
        options,
        options.index(where.quantity),
        lambda option: NAMES.get(option, option),
        key,
        on_change=changed,
        label_visibility="collapsed",
        width=160,
    )


def _modules(where: links.Where, slots: Sequence[Slot]) -> None:
    """The model as a tree whose nodes are filters."""

    def node(module: names.Module) -> dict[str, Any]:
        inside = [node(child) for child in module.inside.values()]
        here = module.pattern == where.filter
        return {
            "text": module.name,
            "layers": module.layers,
            "to": where.to(filter=module.pattern),
            "here": here,
            "inside": inside,
            "open": any(child["here"] or child["open"] for child in inside),
        }

    modules = names.tree(list(dict.fromkeys(slot.layer for slot in slots)))
    every = {"text": "all layers", "layers": 0, "to": where.to(filter=""), "here": not where.filter, "inside": []}
    shell.follow(panel.tree("modules", [every, *(node(module) for module in modules)]))


def _body(where: links.Where, drawn_to: int) -> None:
    run = queries.run(where.run)
    if run is None or run.last_step is None or run.first_step is None:
        return
    try:
        slots = [s for s in names.matching(queries.slots_of(run), where.filter) if where.role in (None, s.role)]
    except ValueError as error:
        st.info(shell.escaped(f"{error}."))
        return
    if not slots:
        st.info(f"No layer matches {shell.escaped(where.filter)}. A glob must match the whole name: blocks.1\\*.mlp\\*")
        return
    first, last = shell.steps_of(where, run)
    live, maps = _maps(where, run, first)
    heatmap = maps.get(where.quantity)
    if heatmap is None or not heatmap.low.shape[1]:
        steps = f"{text.count(first)} and {text.count(last)}"
        st.info(
            f"No rows between steps {steps}; the run has {text.count(run.first_step)} to {text.count(run.last_step)}."
        )
        return
    scalars = queries.scalars(run, first, last)
    chart, beside = st.columns([3.5, 1], gap="small")
    with chart:
        usual = live.usual_range(heatmap) if where.quantity == "scale_exp2" else None
        shown = overview.made_ready(heatmap, slots, usual)
        figure, height = overview.overview(heatmap, slots, scalars, first, last, shown=shown)
        explicit = None if (where.first_step, where.last_step) == (None, None) else [first, last]
        note = [
            _note(heatmap, slots, first, last),
            "click: the tensor at that step · drag: zoom in · double click: zoom out",
        ]
        event = panel.chart(
            "overview", figure, height=height, view=explicit, clickable=True, note=note, files=where.params()
        )
    with beside:
        shell.follow(_worst(where, maps, slots, last - first + 1))
    if isinstance(event, panel.Click):
        if slot := overview.clicked(shown, slots, event.slot, event.step // heatmap.width - heatmap.first_column):
            shell.go(replace(where, layer=slot.layer, role=slot.role, step=event.step))
    elif isinstance(event, panel.Zoom):
        shell.go(shell.zoomed(where, event, run.last_step))
    if where.last_step is None and run.last_step > drawn_to * REDRAW:  # last: it would lose what was clicked
        shell.go(where)  # not where the browser was when it sent this tick: a zoom may have moved it since


def _maps(where: links.Where, run: RunSummary, first: int) -> tuple[heatmaps.LiveHeatMaps, dict[Quantity, HeatMap]]:
    """The map that is shown and those that the ranking needs; the first time they may take a while."""
    quantities = tuple(dict.fromkeys((where.quantity, *ranking.LOSSES)))
    live = heatmaps.live_heatmaps(queries.database_url(), run.id, quantities, first, where.last_step)
    if live.progress is None:
        with st.spinner(f"Reading {text.count(run.rows)} rows"):
            return live, live.read()
    return live, live.read()


def _note(heatmap: HeatMap, slots: Sequence[Slot], first: int, last: int) -> str:
    steps, each = text.count(last - first + 1), overview.layers_a_row(slots)
    rows = f"; {each} layers a row, the worse one shown" if each > 1 else ""
    if heatmap.width == 1:
        return f"every one of {steps} steps{rows}"
    shown = text.count(heatmap.low.shape[1])
    return f"showing {shown} columns of {text.count(heatmap.width)} steps for {steps} steps, extremes kept{rows}"


def _worst(where: links.Where, maps: Mapping[Quantity, HeatMap], slots: list[Slot], steps: int) -> panel.Event | None:
    """The ranking beside the map: what the newest steps shown lost, worst first."""
    ranked = ranking.worst([maps[quantity] for quantity in ranking.LOSSES], slots, RECENT_STEPS, WORST)
    entries = [
        {
            "to": replace(where, layer=entry.slot.layer, role=entry.slot.role).to(),
            "cells": [
                {"text": entry.slot.layer, "role": entry.slot.role.value, "sub": entry.slot.role.value},
                {
                    "text": text.share(entry.share),
                    "right": True,
                    "style": "fs-strong",
                    "sub": entry.what,
                    "title": entry.since,
                },
                {"spark": entry.spark, "color": entry.color},
            ],
        }
        for entry in ranked
    ]
    recent = f"last {text.count(min(RECENT_STEPS, steps))} steps"
    empty = f"Nothing overflowed or underflowed in the {recent}."
    return panel.table("worst", entries, title="worst tensors", subtitle=recent, empty=empty)
