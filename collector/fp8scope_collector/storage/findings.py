"""Findings as the database has them, read. `storage.acknowledge` says that somebody has seen one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import sqlalchemy as sa

from fp8core.records import Role
from fp8scope_collector.messages import run_label
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.readmodels import Severity, StoredFinding

WHOLE_RUN = -1  # finding.slot of what is about no tensor
SEVERITIES: Sequence[Severity] = get_args(Severity)
LEASE_S = 30.0  # of who diagnoses; renewed at each look
DIAGNOSIS = "diagnosis"  # lease.task


@dataclass(frozen=True)
class OpenFinding:
    """A finding that is open, as far as /metrics tells of it; layer and role are empty where it is of the run."""

    run: str
    rule: str
    severity: Severity
    layer: str
    role: str


@dataclass(frozen=True)
class FindingsNow:
    """Open findings of warning or worse, of each run the worst and of these the oldest; and all of them counted.

    `counts` are by (run, severity). `looked_unix_ns` is when runs were looked at last, 0: never.
    """

    worst: tuple[OpenFinding, ...]
    counts: tuple[tuple[str, Severity, int], ...]
    looked_unix_ns: int


def findings_now(connection: sa.Connection, *, per_run: int) -> FindingsNow:
    """What is open now, at most `per_run` of a run by name."""
    finding, slot, run = schema.finding.c, schema.slot, schema.run
    place = (
        sa.func.row_number()
        .over(partition_by=finding.run_id, order_by=(_badness().desc(), finding.opened_unix_ns, finding.id))
        .label("place")
    )
    ranked = (
        sa.select(schema.finding, place)
        .where(finding.closed_unix_ns.is_(None), finding.severity != SEVERITIES[0])
        .subquery()
    )
    worst = (
        sa.select(run.c.project, run.c.name, ranked.c.rule, ranked.c.severity, slot.c.layer, slot.c.role)
        .join_from(ranked, run, run.c.id == ranked.c.run_id)
        .outerjoin(slot, sa.and_(slot.c.run_id == ranked.c.run_id, slot.c.slot == ranked.c.slot))
        .where(ranked.c.place <= per_run)
        .order_by(ranked.c.run_id, ranked.c.place)
    )
    counts = (
        sa.select(run.c.project, run.c.name, finding.severity, sa.func.count())
        .join_from(schema.finding, run, run.c.id == finding.run_id)
        .where(finding.closed_unix_ns.is_(None))
        .group_by(run.c.project, run.c.name, finding.severity)
    )
    until = sa.select(schema.lease.c.until_unix_ns).where(schema.lease.c.task == DIAGNOSIS)
    looked = connection.execute(until).scalar()
    return FindingsNow(
        tuple(
            OpenFinding(run_label(row.project, row.name), row.rule, row.severity, row.layer or "", row.role or "")
            for row in connection.execute(worst)
        ),
        tuple((run_label(project, name), severity, n) for project, name, severity, n in connection.execute(counts)),
        looked - int(LEASE_S * 1e9) if looked else 0,
    )


def read_findings(
    connection: sa.Connection,
    run_id: int | None = None,
    *,
    open_only: bool = False,
    severity: Severity = "info",
    limit: int = 1000,
    ids: Sequence[int] | None = None,
) -> list[StoredFinding]:
    """Findings from `severity` on, worst first, then the newest; see `Reader.findings`."""
    finding, slot, run = schema.finding.c, schema.slot, schema.run
    query = (
        sa.select(schema.finding, slot.c.layer, slot.c.role, run.c.project, run.c.name)
        .join_from(schema.finding, run, run.c.id == finding.run_id)
        .outerjoin(slot, sa.and_(slot.c.run_id == finding.run_id, slot.c.slot == finding.slot))
        .where(finding.severity.in_(SEVERITIES[SEVERITIES.index(severity) :]))
        .order_by(_badness().desc(), finding.opened_unix_ns.desc(), finding.first_step, finding.id)
        .limit(limit)
    )
    if run_id is not None:
        query = query.where(finding.run_id == run_id)
    if open_only:
        query = query.where(finding.closed_unix_ns.is_(None))
    if ids is not None:
        query = query.where(finding.id.in_(ids))
    return [
        StoredFinding(
            id=row.id,
            run_id=row.run_id,
            run=run_label(row.project, row.name),
            rule=row.rule,
            severity=row.severity,
            slot=None if row.slot == WHOLE_RUN else row.slot,
            layer=row.layer or "",
            role=Role(row.role) if row.role else None,
            ranks=tuple(json.loads(row.ranks_json)),
            first_step=row.first_step,
            last_step=row.last_step,
            rows=row.rows,
            worst_step=row.worst_step,
            numbers=json.loads(row.numbers_json),
            says=row.says,
            evidence=row.evidence,
            cause=row.cause,
            remedy=row.remedy,
            change=row.change,
            opened_unix_ns=row.opened_unix_ns,
            updated_unix_ns=row.updated_unix_ns,
            closed_unix_ns=row.closed_unix_ns,
            ending=row.ending,
            acknowledged_unix_ns=row.acknowledged_unix_ns,
            acknowledged_by=row.acknowledged_by or "",
            acknowledged_reason=row.acknowledged_reason or "",
        )
        for row in connection.execute(query)
    ]


def _badness() -> sa.ColumnElement[int]:
    return sa.case({name: number for number, name in enumerate(SEVERITIES)}, value=schema.finding.c.severity)
