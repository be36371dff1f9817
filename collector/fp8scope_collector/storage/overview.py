"""What /metrics shows of stored runs: read from the tables, so it outlives a restart and is one for all collectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from fp8scope_collector.messages import run_label
from fp8scope_collector.storage import schema


@dataclass(frozen=True)
class RunState:
    """A run at a glance, over all its ranks."""

    run: str  # project/name
    last_step: int | None  # of the newest incarnation that sent rows
    last_seen_unix_ns: int
    active: bool  # no source of the newest incarnation failed, and not all of them finished
    dropped_rows: Mapping[str, int]  # by reason, over all incarnations


def recent_runs(connection: sa.Connection, *, limit: int) -> list[RunState]:
    """The `limit` runs that were seen last, newest first. Reads the tables of sources, never raw rows."""
    source, run, drop = schema.source, schema.run, schema.drop
    last_seen = sa.func.max(source.c.last_seen_unix_ns)
    recent = list(
        connection.scalars(sa.select(source.c.run_id).group_by(source.c.run_id).order_by(last_seen.desc()).limit(limit))
    )
    lives = connection.execute(
        sa.select(
            source.c.run_id,
            run.c.project,
            run.c.name,
            sa.func.max(source.c.last_step).label("last_step"),
            last_seen.label("last_seen_unix_ns"),
            sa.func.count().label("sources"),
            sa.func.count(source.c.outcome).label("ended"),
            sa.func.count(sa.case((source.c.outcome == "failed", 1))).label("failed"),
        )
        .join(run, run.c.id == source.c.run_id)
        .where(source.c.run_id.in_(recent))
        .group_by(source.c.run_id, run.c.project, run.c.name, source.c.incarnation)
        .order_by(source.c.run_id, source.c.incarnation.desc())
    ).all()
    drops = connection.execute(
        sa.select(source.c.run_id, drop.c.reason, sa.cast(sa.func.sum(drop.c.rows), sa.BigInteger).label("rows"))
        .join(source, source.c.id == drop.c.source_id)
        .where(source.c.run_id.in_(recent))
        .group_by(source.c.run_id, drop.c.reason)
    ).all()
    states = []
    for run_id in recent:
        own = [life for life in lives if life.run_id == run_id]
        states.append(
            RunState(
                run=run_label(own[0].project, own[0].name),
                last_step=next((life.last_step for life in own if life.last_step is not None), None),
                last_seen_unix_ns=max(life.last_seen_unix_ns for life in own),
                active=not own[0].failed and own[0].ended < own[0].sources,
                dropped_rows={row.reason: row.rows for row in drops if row.run_id == run_id},
            )
        )
    return states


def database_bytes(connection: sa.Connection) -> int:
    """The size of the database: SQLite's file as far as it is committed, or what PostgreSQL says."""
    if connection.dialect.name == "sqlite":
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        return int(pages * connection.exec_driver_sql("PRAGMA page_size").scalar_one())
    return int(connection.execute(sa.select(sa.func.pg_database_size(sa.func.current_database()))).scalar_one())
