"""One tensor: where it lies in what its format can hold, what that costs, and the other two roles of its layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import streamlit as st

from fp8core.records import Role
from fp8scope_collector.storage.reader import RunSummary, Series, Slot
from fp8scope_dashboard import links, queries, text
from fp8scope_dashboard.charts import ranks, tensor
from fp8scope_dashboard.component import panel
from fp8scope_dashboard.views import findings, shell


def view() -> None:
    """The page of the tensor that the address names."""
    where = shell.here()
    run = shell.pick_run(where)
    if run is None:
        return
    slots = queries.slots_of(run)
    layers = list(dict.fromkeys(slot.layer for slot in slots))
    if where.layer not in layers:
        shell.header(replace(where, layer=""), run)
        name = f"Layer {where.layer!r}" if where.layer else "No layer is given; one"
        st.warning(shell.escaped(f"{name} is not in run {run.ref!r}. Choose a tensor on the run's page."))
        return
    mine = [slot for slot in slots if slot.layer == where.layer]
    chosen = next((slot for slot in mine if slot.role == where.role), mine[0])
    where = replace(where, role=chosen.role)
    st.fragment(shell.guarded(_top), run_every=shell.live(run))(where, layers, chosen.slot)
    if run.first_step is None:
        st.info("This run has no rows yet. They appear here with the first `monitor.step()`.")
        return
    roles = [slot.role.value for slot in mine]
    shell.choose("role", roles, chosen.role.value, {}, lambda role: replace(where, role=Role(role)))
    st.fragment(shell.guarded(_body), run_every=shell.live(run))(where, chosen, mine)


def _top(where: links.Where, layers: list[str], slot: int) -> None:
    run = queries.run(where.run)
    if run is None:
        return
    at = layers.index(where.layer)
    nav = []
    if at > 0:
        nav.append({"text": f"‹ {layers[at - 1]}", "to": where.to(layer=layers[at - 1])})
    if at + 1 < len(layers):
        nav.append({"text": f"{layers[at + 1]} ›", "to": where.to(layer=layers[at + 1])})
    shell.header(where, run, nav=nav)
    findings.of_tensor(run.id, slot)


def _body(where: links.Where, chosen: Slot, mine: list[Slot]) -> None:
    run = queries.run(where.run)
    if run is None or run.first_step is None or run.last_step is None:
        return
    first = max(run.first_step, where.first_step or 0)
    last = run.last_step if where.last_step is None else min(run.last_step, where.last_step)
    series = _series(run, chosen, first, last)
    if not series.step.size:
        steps = f"{text.count(first)} and {text.count(last)}"
        st.info(f"No rows of this tensor between steps {steps}. Double click a chart to see all steps.")
    main, beside = st.columns([3.4, 1.15], gap="small")
    explicit = None if (where.first_step, where.last_step) == (None, None) else [first, last]
    events: list[panel.Event | None] = []
    with main:
        figure, height = tensor.tensor_figure(
            series, chosen, first, last, where.step, queries.histograms(run, chosen.slot, first, last)
        )
        parts = {"view": explicit, "clickable": True, "note": _note(series), "files": where.params()}
        events.append(panel.chart("tensor", figure, height=height, **parts))
        if run.world_size > 1:
            events.append(_ranks(run, chosen, first, last, where.step, explicit))
    with beside:
        if series.step.size:
            _facts(series, chosen, where.step)
        for slot in mine:
            if slot.role != chosen.role:
                small, height = tensor.small_figure(_series(run, slot, first, last), slot, first, last)
                events.append(
                    panel.chart(f"small {slot.role.value}", small, height=height, view=explicit, clickable=True)
                )
    for event in events:
        if isinstance(event, panel.Zoom):
            shell.go(shell.zoomed(where, event, run.last_step))
        elif isinstance(event, panel.Click):
            role = next((slot.role for slot in mine if slot.slot == event.slot), chosen.role)
            shell.go(replace(where, role=role, step=event.step))
        else:
            shell.follow(event)


def _ranks(
    run: RunSummary, slot: Slot, first: int, last: int, step: int | None, explicit: list[int] | None
) -> panel.Event | None:
    """The same tensor rank by rank."""
    found = queries.ranks(run, slot.slot, first, last)
    panel.title("ranks title", f"{text.count(found.each.ranks.size)} ranks", ranks.verdict(found))
    figure, height = ranks.ranks_figure(found, first, last, step)
    return panel.chart("ranks", figure, height=height, view=explicit, files={})


def _series(run: RunSummary, slot: Slot, first: int, last: int) -> Series:
    return queries.series(run, slot.slot, first, last)


def _note(series: Series) -> list[str]:
    steps = int(series.count.sum())
    points = f"{text.count(len(series.step))} points for {text.count(steps)} recorded steps, extremes kept"
    shown = f"every one of {text.count(steps)} recorded steps" if steps == len(series.step) else points
    return [shown, "click: values at that step · drag: zoom · double click: everything"]


def _facts(series: Series, slot: Slot, step: int | None) -> None:
    """What is recorded at the marked step, or at the newest one, in words and numbers."""
    at = len(series.step) - 1
    if step is not None:
        at = int(np.argmin(np.abs(series.step - step)))
    low = {name: float(values[at]) for name, values in series.low.items()}
    high = {name: float(values[at]) for name, values in series.high.items()}
    first, last = int(series.step[at]), int(series.last[at])
    shown = f"step {text.count(first)}" if first == last else f"steps {text.count(first)} – {text.count(last)}"

    def span(name: str, words: Any) -> str:
        return (
            str(words(low[name]))
            if low[name] == high[name] or np.isnan(low[name])
            else f"{words(low[name])} … {words(high[name])}"
        )

    facts = [
        ("format", f"{slot.format or 'unknown'}, margin {slot.margin}"),
        ("amax", span("amax", text.number)),
        ("scale", span("scale_exp2", text.exp2)),
        ("headroom", span("headroom", text.bits)),
        ("overflow", _count(high, "overflow")),
        ("underflow", _count(high, "underflow")),
        ("subnormal", _count(high, "subnormal")),
        ("NaN, Inf", "–" if np.isnan(high["nonfinite"]) else text.count(int(high["nonfinite"]))),
        ("SQNR", f"{text.number(low['sqnr_db'])} dB"),
        ("elements", "–" if np.isnan(high["numel"]) else text.count(int(high["numel"]))),
        ("shape", f"{slot.module_class} {slot.in_features} → {slot.out_features}"),
        ("recipe", slot.recipe or "unknown"),
    ]
    rows = [
        {"cells": [{"text": name, "style": "fs-sub"}, {"text": value, "style": "fs-mono"}]} for name, value in facts
    ]
    panel.table("facts", rows, title=slot.role.value, subtitle=shown, empty="", style="fs-facts")


def _count(values: dict[str, float], name: str) -> str:
    if np.isnan(values[name]):
        return "–"
    share = values[f"{name}_ratio"]
    return f"{text.count(int(values[name]))}" + (f" = {text.share(share)}" if values[name] else "")
