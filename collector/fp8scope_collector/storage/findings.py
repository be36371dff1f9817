"""Findings as the database has them, read. `storage.acknowledge` says that somebody has seen one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import get_args

import sqlalchemy as sa

from fp8core.records import Role
from fp8scope_collector.messages import run_label
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.readmodels import Severity, StoredFinding

WHOLE_RUN = -1  # finding.slot of what is about no tensor
SEVERITIES: Sequence[Severity] = get_args(Severity)


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
    badness = sa.case({name: number for number, name in enumerate(SEVERITIES)}, value=finding.severity)
    query = (
        sa.select(schema.finding, slot.c.layer, slot.c.role, run.c.project, run.c.name)
        .join_from(schema.finding, run, run.c.id == finding.run_id)
        .outerjoin(slot, sa.and_(slot.c.run_id == finding.run_id, slot.c.slot == finding.slot))
        .where(finding.severity.in_(SEVERITIES[SEVERITIES.index(severity) :]))
        .order_by(badness.desc(), finding.opened_unix_ns.desc(), finding.first_step, finding.id)
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
