"""What diagnosis found, in one run or in all: worst first, with why, what to do, and who has seen it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from fp8scope_collector.storage.reader import StoredFinding
from fp8scope_dashboard import links, queries, text
from fp8scope_dashboard.component import panel
from fp8scope_dashboard.views import shell

SHOWN = 200
IN_STRIP = 3
GROUPED_FROM = 4
STATES = ("open", "acknowledged", "closed", "all")
SEVERITIES = ("all", "critical", "warning", "info")


def view() -> None:
    """The list of the run that the address names, or of all runs."""
    where = shell.here()
    run = shell.pick_run(where) if where.run else None
    if where.run and run is None:
        return
    st.fragment(shell.guarded(_header), run_every=shell.TICK_S)(where)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        state = where.show if where.show in STATES else STATES[0]
        shell.choose("state", STATES, state, {}, lambda s: replace(where, show="" if s == STATES[0] else s))
        severity = where.sort if where.sort in SEVERITIES else SEVERITIES[0]
        shell.choose("severity", SEVERITIES, severity, {}, lambda s: replace(where, sort="" if s == "all" else s))
        shell.filter_box(where, "filter: overflow, blocks.3, rule ...", width=260)
    st.fragment(shell.guarded(_list), run_every=shell.TICK_S)(where, state, severity)


def _header(where: links.Where) -> None:
    shell.header(where, queries.run(where.run) if where.run else None)


def _list(where: links.Where, state: str, severity: str) -> None:
    run = queries.run(where.run) if where.run else None
    found = queries.findings(run.id if run else None)
    shown = [
        finding
        for finding in found
        if state in ("all", _state(finding))
        and severity in ("all", finding.severity)
        and where.filter.casefold() in f"{finding.rule} {finding.tensor} {finding.run} {finding.evidence}".casefold()
    ]
    counts = [f"{text.count(sum(_state(f) == s for f in found))} {s}" for s in STATES[:3]]
    subtitle = ", ".join(counts)
    if len(shown) > SHOWN:
        subtitle += f"; the first {SHOWN} of {text.count(len(shown))} are shown"
    if len(found) >= queries.MOST_FINDINGS:
        subtitle += f"; only the worst {queries.MOST_FINDINGS} are read"
    empty = "Nothing found that is wrong." if not found else "No finding matches: choose another state or severity."
    title = "findings" if run is None else f"findings of {run.ref}"
    entries = _grouped(shown[:SHOWN], with_run=run is None)
    shell.follow(panel.findings("findings", entries, empty=empty, title=title, subtitle=subtitle))


def strip(where: links.Where, run_id: int) -> None:
    """The few worst findings of a run that nobody has acknowledged, above its charts: open, or so until its end."""
    waiting = [
        finding
        for finding in queries.findings(run_id)
        if finding.acknowledged_unix_ns is None and (finding.is_open or finding.ending == "ended")
    ]
    entries, rest = _grouped(waiting), {}
    if len(entries) > IN_STRIP:
        shown = "" if any(finding.is_open for finding in waiting) else "closed"
        to = where.leave(view="findings", show=shown)
        rest = {"more": {"text": f"all {text.count(len(waiting))} findings", "to": to}}
        entries = entries[:IN_STRIP]
    empty = "" if entries else _nothing(where, run_id)
    shell.follow(panel.findings("strip", entries, empty=empty, compact=True, **rest))


def _nothing(where: links.Where, run_id: int) -> str:
    """Nothing was found, as far as anybody has looked."""
    judged = queries.judged_step(run_id)
    if judged is None and not queries.findings(run_id):
        return (
            "Not diagnosed: the collector looks at runs while they go on, unless it was started with --diagnosis off. "
            f"By hand: fp8scope diagnose {where.run} --db {queries.shown_database()}"
        )
    return "No open findings." if judged is None else f"No open findings up to step {text.count(judged)}."


def of_tensor(run_id: int, slot: int) -> None:
    """The findings about one tensor, open ones first."""
    mine = sorted(
        (finding for finding in queries.findings(run_id) if finding.slot == slot), key=lambda f: not f.is_open
    )
    if mine:
        entries = [_entry(finding, with_tensor=False) for finding in mine[:8]]
        shell.follow(panel.findings("of tensor", entries, empty="", compact=True))


def _grouped(found: Sequence[StoredFinding], *, with_run: bool = False) -> list[dict[str, Any]]:
    """Entries in the given order; what a rule says of many tensors alike is one entry, the worst one's, with all."""
    alike: dict[tuple[Any, ...], list[StoredFinding]] = {}
    for finding in found:
        role = finding.role.value if finding.role else ""
        alike.setdefault((finding.run, finding.rule, finding.severity, role, _state(finding)), []).append(finding)
    entries = []
    for group in alike.values():
        if len(group) < GROUPED_FROM:
            entries += [_entry(finding, with_run=with_run) for finding in group]
            continue
        entry = _entry(group[0], with_run=with_run)
        entry["members"] = [
            {"text": finding.layer, "to": _to(finding).params(), "title": f"{finding.evidence}, {_since(finding)}"}
            for finding in sorted(group, key=lambda finding: finding.slot or 0)
        ]
        entry["tensor"]["count"] = f"{text.count(len(group))} layers"
        entry["evidence"] = f"{group[0].layer}: {group[0].evidence}"
        entry["ids"] = [finding.id for finding in group]
        entries.append(entry)
    return entries


def _to(finding: StoredFinding) -> links.Where:
    """The place that shows a finding's evidence."""
    if not finding.layer:
        return links.Where(run=finding.run, step=finding.worst_step)
    return links.Where(run=finding.run, layer=finding.layer, role=finding.role, step=finding.worst_step)


def _state(finding: StoredFinding) -> str:
    if not finding.is_open:
        return "closed"
    return "open" if finding.acknowledged_unix_ns is None else "acknowledged"


def _entry(finding: StoredFinding, *, with_run: bool = False, with_tensor: bool = True) -> dict[str, Any]:
    to = _to(finding).params()
    entry: dict[str, Any] = {
        "ids": [finding.id],
        "severity": finding.severity,
        "rule": finding.rule,
        "says": finding.says,
        "evidence": finding.evidence,
        "since": _since(finding),
        "ranks": _ranks(finding.ranks),
        "cause": finding.cause,
        "remedy": finding.remedy,
        "change": finding.change,
        "state": _state(finding),
        "ending": finding.ending,
        "opened": finding.opened_unix_ns // 10**6,
        "evidence_to": to,
        "worst": f"step {text.count(finding.worst_step)}",
    }
    if finding.acknowledged_unix_ns is not None:
        entry["seen"] = {
            "by": finding.acknowledged_by,
            "reason": finding.acknowledged_reason,
            "when": finding.acknowledged_unix_ns // 10**6,
        }
    if with_tensor and finding.role is not None:
        entry["tensor"] = {"role": finding.role.value, "layer": finding.layer, "to": to}
    elif with_tensor:
        entry["tensor"] = {"layer": "the whole run"}
    if with_run:
        entry["run"] = {"text": finding.run, "to": links.Where(run=finding.run).params()}
    return entry


def _since(finding: StoredFinding) -> str:
    if finding.is_open:
        return f"since step {text.count(finding.first_step)}"
    if finding.first_step == finding.last_step:
        return f"step {text.count(finding.first_step)}"
    return f"steps {text.count(finding.first_step)} – {text.count(finding.last_step)}"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) < 2 and tuple(ranks) in ((), (0,)):
        return ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}" + (" ..." if len(ranks) > 8 else "")
