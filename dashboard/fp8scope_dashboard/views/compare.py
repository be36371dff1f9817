"""Two to eight runs: where each begins to differ from the first, curves over one another, and what they were told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from fp8core.records import Role
from fp8scope_collector.storage.reader import RunSummary, Slot
from fp8scope_dashboard import heatmaps, links, names, queries, text
from fp8scope_dashboard.charts import compare, overview, panels
from fp8scope_dashboard.component import panel
from fp8scope_dashboard.views import run as run_view
from fp8scope_dashboard.views import shell

MOST_SCALARS = 2


def view() -> None:
    """The page of the runs that the address names, the first of them compared with the others."""
    where = shell.here()
    known = [run for ref in where.runs if (run := queries.run(ref))]
    shell.header(where)
    missing = [ref for ref in where.runs if queries.run(ref) is None]
    if missing:
        st.warning(shell.escaped(f"Not in this database: {', '.join(missing)}."))
    if len(known) < 2:
        _choose_more(where, known)
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        run_view.quantity_box(where)
        roles = [*(role.value for role in Role), run_view.ALL]
        role = where.role.value if where.role else run_view.ALL
        shell.choose("role", roles, role, {}, lambda r: replace(where, role=None if r == run_view.ALL else Role(r)))
        shell.range_slider(where, max(known, key=lambda run: run.last_step or 0))
        shell.filter_box(where, "filter: blocks.1*.mlp*  /regex/", width=185)
    rate = next((rate for run in known if (rate := shell.live(run))), None)
    st.fragment(shell.guarded(_body), run_every=rate)(where)


def _choose_more(where: links.Where, known: Sequence[RunSummary]) -> None:
    """One run is none to compare: the others, to take along."""
    mine = {run.ref for run in known}
    rows = [
        {
            "to": where.to(runs=(*(run.ref for run in known), other.ref)),
            "cells": [
                {"text": other.ref, "style": "fs-main"},
                {"text": other.state, "dot": shell.STATE_COLOR[other.state]},
                {"text": "–" if other.last_step is None else text.count(other.last_step), "right": True},
                {"text": "", "when": other.created_unix_ns // 10**6, "right": True},
            ],
        }
        for other in queries.runs()
        if other.ref not in mine
    ]
    title = f"compare {known[0].ref} with" if known else "compare"
    columns = [
        {"text": "run"},
        {"text": "state"},
        {"text": "last step", "right": True},
        {"text": "started", "right": True},
    ]
    subtitle = "two to eight runs; in the list of runs they can be ticked"
    empty = "There is no other run in this database yet."
    shell.follow(panel.table("choose", rows, columns=columns, title=title, subtitle=subtitle, empty=empty))


def _body(where: links.Where) -> None:
    runs = [run for ref in where.runs if (run := queries.run(ref)) and run.first_step is not None]
    if len(runs) < 2:
        st.info("Fewer than two of these runs have rows yet.")
        return
    spans = [shell.steps_of(where, run) for run in runs]
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    try:
        slots = [
            [slot for slot in names.matching(queries.slots_of(run), where.filter) if where.role in (None, slot.role)]
            for run in runs
        ]
    except ValueError as error:
        st.info(shell.escaped(f"{error}."))
        return
    pairs = _pairs(where, runs, slots, [span[0] for span in spans])
    shown = next((i for i, run in enumerate(runs[1:]) if run.ref == where.show), 0)
    begins = [None if pair is None else _begin(pair, runs[0], runs[i + 1]) for i, pair in enumerate(pairs)]
    _runs(where, runs, pairs, begins, shown)
    explicit = None if (where.first_step, where.last_step) == (None, None) else [first, last]
    _scalars(where, runs, spans, first, last, explicit)
    pair = pairs[shown]
    if pair is not None and pair.slots:
        _difference(where, runs[0], runs[shown + 1], pair, first, last, explicit)
        begun = begins[shown]
        _tensor(where, runs, spans, pair.slots, begun.slot if begun else None, first, last, explicit)
    else:
        st.info("These two runs share no layer with rows: there is nothing to subtract.")
    _configurations(runs)


def _pairs(
    where: links.Where, runs: Sequence[RunSummary], slots: Sequence[list[Slot]], starts: Sequence[int]
) -> list[compare.Aligned | None]:
    """The first run with each of the others; None where one of the two has no rows in the range."""
    maps = []
    for run, start in zip(runs, starts, strict=True):
        live = heatmaps.live_heatmaps(queries.database_url(), run.id, (where.quantity,), start, where.last_step)
        maps.append(live.read().get(where.quantity))
    pairs: list[compare.Aligned | None] = []
    for i in range(1, len(runs)):
        one, other = maps[0], maps[i]
        there = one is not None and other is not None and one.low.shape[1] and other.low.shape[1]
        pairs.append(compare.aligned(one, slots[0], other, slots[i]) if there and one and other else None)
    return pairs


def _begin(pair: compare.Aligned, one: RunSummary, other: RunSummary) -> compare.Divergence | None:
    """Where the two begin to differ, to the step."""
    found = compare.divergence(pair)
    if found is None or pair.width == 1:
        return found
    return queries.divergence_within(one.id, other.id, pair.quantity, found.first_step, found.last_step) or found


def _runs(
    where: links.Where,
    runs: Sequence[RunSummary],
    pairs: Sequence[compare.Aligned | None],
    begins: Sequence[compare.Divergence | None],
    shown: int,
) -> None:
    rows = []
    for i, run in enumerate(runs):
        begun = begins[i - 1] if i else None
        rest = tuple(other.ref for other in runs if other.ref != run.ref)
        first: dict[str, Any] = {"text": "the first: the others are compared with it", "style": "fs-quiet"}
        if i and pairs[i - 1] is None:
            first = {"text": "no rows in this range", "style": "fs-quiet"}
        elif i and begun is None:
            what = run_view.NAMES.get(where.quantity, where.quantity)
            first = {
                "text": f"nowhere: {what} is within {compare.threshold(where.quantity):g} of the first",
                "style": "fs-quiet",
            }
        elif begun:
            steps = f"step {text.count(begun.first_step)}"
            if begun.last_step > begun.first_step:
                steps += f" – {text.count(begun.last_step)}"
            values = f"{compare.said(where.quantity, begun.other)} against {compare.said(where.quantity, begun.one)}"
            to = where.to(layer=begun.slot.layer, role=begun.slot.role, step=begun.first_step, show=run.ref)
            first = {"text": f"{steps}: {begun.slot.layer}", "to": to, "role": begun.slot.role.value}
            first |= {"sub": f"{begun.slot.role.value}, {values}"}
        loss = "–" if run.last_step is None else text.count(run.last_step)
        cells: list[dict[str, Any]] = [
            {"text": run.ref, "swatch": f"run{i}", "style": "fs-main", "to": links.Where(run=run.ref).params()},
            {"text": run.state, "dot": shell.STATE_COLOR[run.state]},
            {"text": loss, "right": True},
            first,
            {"text": "difference below" if i == shown + 1 else "show difference", "to": where.to(show=run.ref)}
            if i
            else {"text": ""},
            {"text": "put first", "to": where.to(runs=(run.ref, *rest), show="")} if i else {"text": ""},
            {"text": "leave out", "to": where.to(runs=rest, show="")},
        ]
        for cell in cells[4:]:
            cell["style"] = "fs-quiet"
        rows.append({"cells": cells, "here": i == shown + 1})
    columns = [{"text": "run"}, {"text": "state"}, {"text": "last step", "right": True}, {"text": "differs first"}]
    columns += [{"text": ""}, {"text": ""}, {"text": ""}]
    shell.follow(panel.table("runs", rows, columns=columns, empty=""))


def _scalars(
    where: links.Where,
    runs: Sequence[RunSummary],
    spans: Sequence[tuple[int, int]],
    first: int,
    last: int,
    explicit: list[int] | None,
) -> None:
    curves = [(run.ref, queries.scalars(run, *span)) for run, span in zip(runs, spans, strict=True)]
    shared = overview.by_importance([scalar for _, scalars in curves for scalar in scalars])
    chosen = list(dict.fromkeys(scalar.name for scalar in shared))[:MOST_SCALARS]
    if chosen:
        figure, height = compare.scalar_curves(curves, chosen, first, last)
        _follow(where, runs, panel.chart("scalars", figure, height=height, view=explicit))


def _difference(
    where: links.Where,
    one: RunSummary,
    other: RunSummary,
    pair: compare.Aligned,
    first: int,
    last: int,
    explicit: list[int] | None,
) -> None:
    live = heatmaps.live_heatmaps(
        queries.database_url(), one.id, (where.quantity,), shell.steps_of(where, one)[0], where.last_step
    )
    panel.title("difference title", f"{other.ref} less {one.ref}", "click: the tensor below, in all runs")
    shown = compare.difference(pair)
    figure, height = compare.difference_map(pair, shown, live.read()[where.quantity], first, last)
    event = panel.chart("difference", figure, height=height, view=explicit, clickable=True, files={})
    if isinstance(event, panel.Click):
        column = event.step // pair.width - pair.first_column
        if slot := overview.clicked(shown, pair.slots, event.slot, column):
            shell.go(replace(where, layer=slot.layer, role=slot.role, step=event.step))
    else:
        _follow(where, [one, other], event)


def _tensor(
    where: links.Where,
    runs: Sequence[RunSummary],
    spans: Sequence[tuple[int, int]],
    slots: Sequence[Slot],
    begun: Slot | None,
    first: int,
    last: int,
    explicit: list[int] | None,
) -> None:
    """One tensor in all runs: the one that was clicked, or the one that differs first."""
    mine = [slot for slot in slots if slot.layer == where.layer]
    chosen = next((slot for slot in mine if slot.role == where.role), mine[0] if mine else begun or slots[0])
    curves = []
    for run, span in zip(runs, spans, strict=True):
        number = next((s.slot for s in queries.slots_of(run) if (s.layer, s.role) == (chosen.layer, chosen.role)), None)
        if number is not None:
            share = (span[1] - span[0] + 1) / (last - first + 1)  # as fine as the others: extremes grow with a column
            points = max(2, math.ceil(share * panels.MAX_POINTS))
            curves.append((run.ref, queries.series(run, number, *span, points)))
        else:
            curves.append((run.ref, queries.NOTHING))
    panel.title("tensor title", f"{chosen.role.value} of {chosen.layer}", "in all runs")
    figure, height = compare.tensor_curves(curves, chosen.role, first, last, where.step)
    _follow(where, runs, panel.chart("tensor", figure, height=height, view=explicit, files={}))


def _configurations(runs: Sequence[RunSummary]) -> None:
    """What the runs were told, where that differs."""
    told = [queries.configuration(queries.database_url(), run.id) for run in runs]
    for i, run in enumerate(runs):
        casts: dict[str, str] = {}
        for role in Role:
            kinds = {(s.format, s.recipe, s.margin) for s in queries.slots_of(run) if s.role == role}
            kind = [f"{form or '?'}, {recipe or '?'}, margin {margin}" for form, recipe, margin in sorted(kinds)]
            casts[f"{role.value} is cast to"] = "; ".join(kind[:3]) + ("; ..." if len(kind) > 3 else "")
        told[i] = casts | told[i]
    every = list(dict.fromkeys(name for configuration in told for name in configuration))
    differing = [name for name in every if len({configuration.get(name) for configuration in told}) > 1]
    rows = [
        {
            "cells": [
                {"text": name, "style": "fs-sub"},
                *({"text": text.shorten(c.get(name, "–"), 160), "style": "fs-mono"} for c in told),
            ]
        }
        for name in differing
    ]
    columns = [{"text": "setting"}, *({"text": run.ref} for run in runs)]
    subtitle = f"{text.count(len(differing))} of {text.count(len(every))} settings differ"
    empty = "These runs were started with the same configuration."
    panel.table(
        "settings",
        rows,
        columns=columns,
        title="settings that differ",
        subtitle=subtitle,
        empty=empty,
        style="fs-tight",
    )


def _follow(where: links.Where, runs: Sequence[RunSummary], event: panel.Event | None) -> None:
    if isinstance(event, panel.Zoom):
        shell.go(shell.zoomed(where, event, max(run.last_step or 0 for run in runs)))
    else:
        shell.follow(event)
