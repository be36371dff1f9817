"""How the scales of a run are distributed: over depth, over steps, and how many layers have which scale."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from fp8core.records import Role
from fp8scope_collector.storage.reader import HeatMap, RunSummary, Slot
from fp8scope_dashboard import heatmaps, links, names, queries, text
from fp8scope_dashboard.charts import scales
from fp8scope_dashboard.component import panel
from fp8scope_dashboard.views import advice, shell


def view() -> None:
    """The page of the run that the address names."""
    where = shell.here()
    run = shell.pick_run(where)
    if run is None:
        return
    st.fragment(shell.guarded(_header), run_every=shell.live(run))(where)
    if run.first_step is None:
        st.info("This run has no rows yet. They appear here with the first `monitor.step()`.")
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        shell.range_slider(where, run)
        shell.filter_box(where, "filter: blocks.1*.mlp*  /regex/", width=185)
    st.fragment(shell.guarded(_body), run_every=shell.live(run))(where)
    advice.section(run)


def _header(where: links.Where) -> None:
    if run := queries.run(where.run):
        shell.header(where, run)


def _body(where: links.Where) -> None:
    run = queries.run(where.run)
    if run is None or run.first_step is None or run.last_step is None:
        return
    try:
        slots = names.matching(queries.slots_of(run), where.filter)
    except ValueError as error:
        st.info(shell.escaped(f"{error}."))
        return
    first, last = shell.steps_of(where, run)
    live = heatmaps.live_heatmaps(queries.database_url(), run.id, ("scale_exp2",), first, where.last_step)
    heatmap = live.read().get("scale_exp2")
    if heatmap is None or not heatmap.low.shape[1]:
        st.info("No rows between these steps.")
        return
    found = scales.places(heatmap, slots)
    if not found:
        st.info(shell.escaped(f"No layer matches {where.filter}."))
        return
    _draw(where, run, heatmap, found, first, last)


def _draw(
    where: links.Where, run: RunSummary, heatmap: HeatMap, found: list[scales.Place], first: int, last: int
) -> None:
    kinds = scales.kinds_of(found)
    omitted = len({place.kind for place in found}) - len(kinds)
    more = [f"{omitted} further types of layers are left out: narrow the filter"] if omitted else []
    view_range = None if (where.first_step, where.last_step) == (None, None) else [first, last]
    slots = {place.slot.slot: place.slot for place in found}
    steps = f"mode of {text.count(heatmap.low.shape[1])} columns, steps {text.count(first)} – {text.count(last)}"

    panel.title("depth", "over depth", f"most frequent scale of each layer, {steps}")
    figure, height = scales.over_depth(heatmap, found)
    legend = ["\u2003".join(scales.legend(found)), *more]
    event = panel.chart("depth chart", figure, height=height, clickable=True, note=legend, files={})
    _follow(where, run, slots, event)

    most = max(sum((p.kind, p.slot.role) == (kind, role) for p in found) for kind in kinds for role in Role)
    between = "those between: one grey line each"
    if most > scales.MOST_LINES:
        between = f"all {most}: grey from lowest to highest, darker the middle half, line the median"
    panel.title("steps", "over steps", f"first block solid, last block dashed; {between}; click: the tensor")
    figure, height = scales.over_steps(heatmap, found, first, last)
    event = panel.chart("steps chart", figure, height=height, view=view_range, clickable=True, files={})
    _follow(where, run, slots, event)

    panel.title(
        "layers",
        "layers at each scale",
        "the stronger the colour, the more layers have this scale; line: the mode of all layers",
    )
    figure, height = scales.per_step(heatmap, found, first, last)
    _follow(where, run, slots, panel.chart("layers chart", figure, height=height, view=view_range, files={}))

    panel.title("all", "histogram over the range", "share of layers and columns of steps")
    figure, height = scales.histogram(heatmap, found)
    panel.chart("all chart", figure, height=height, files={})
    _table(scales.summaries(heatmap, found))


def _table(rows: list[scales.Summary]) -> None:
    columns = [
        {"text": "type"},
        {"text": "role"},
        {"text": "mode", "right": True},
        {"text": "first block", "right": True},
        {"text": "last block", "right": True},
        {"text": "lowest", "right": True},
        {"text": "highest", "right": True},
        {"text": "moves a column", "right": True},
    ]
    shown = [
        {
            "cells": [
                {"text": row.kind if row.role == Role.INPUT else ""},
                {"text": row.role.value, "mark": row.role.value},
                *(
                    {"text": text.exp2(value), "right": True}
                    for value in (row.overall, row.first, row.last, row.lowest, row.highest)
                ),
                {
                    "text": text.share(row.changes),
                    "right": True,
                    "title": "how often the scale moved by a power of two",
                },
            ]
        }
        for row in rows
    ]
    panel.table("numbers", shown, columns=columns, empty="", title="in numbers", style="fs-tight")


def _follow(where: links.Where, run: RunSummary, slots: dict[int, Slot], event: panel.Event | None) -> None:
    if isinstance(event, panel.Zoom) and run.last_step is not None:
        shell.go(shell.zoomed(where, event, run.last_step))
    elif isinstance(event, panel.Click) and (slot := slots.get(event.slot)):
        step = event.step if event.step >= 0 else None
        shell.go(replace(where, view="", layer=slot.layer, role=slot.role, step=step))
