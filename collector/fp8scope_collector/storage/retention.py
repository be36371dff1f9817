"""Taking things out of the database: raw rows that are older than a retention, whole runs, and the room they took.

Statistics carry no time. How old a step is, `milestone` says: every ten minutes a collector notes for each run the step
that all its ranks have committed, so whatever lies at or below a milestone is at least as old as it.

Everything here goes in small transactions, so that a collector that writes at the same time waits milliseconds, and a
command that is interrupted has done a part of its work and can be given again.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from fp8scope_collector.messages import run_label
from fp8scope_collector.storage import audit, schema
from fp8scope_collector.storage.history import LAST_STEP, Span
from fp8scope_collector.storage.overview import database_bytes
from fp8scope_collector.storage.stats_store import StatsStore

CHUNK_ROWS = 20_000  # of one transaction, about
CHUNK_PAGES = 2_000
MILESTONE_NS = 600 * 10**9

Report = Callable[[int, int], None]  # called with how much is done, and of how much (0: not known)


@dataclass(frozen=True)
class Pruned:
    """What was taken from one life of a run."""

    run: str
    rows: int


@dataclass(frozen=True)
class _Old:
    """The steps of one source that may go: those below `below_step`."""

    source_id: int
    run: str
    incarnation: int
    first_step: int
    below_step: int
    slots: int


def note_milestones(engine: sa.Engine, *, now_unix_ns: int) -> None:
    """Notes how far each run is that got further since the last time; for every ten minutes, not more often."""
    source, milestone = schema.source, schema.milestone
    noted = (
        sa.select(
            milestone.c.run_id,
            milestone.c.incarnation,
            sa.func.max(milestone.c.step).label("step"),
            sa.func.max(milestone.c.reached_unix_ns).label("reached"),
        )
        .group_by(milestone.c.run_id, milestone.c.incarnation)
        .subquery()
    )
    common = sa.func.min(sa.func.coalesce(source.c.last_step, -1))
    lives = (
        sa.select(source.c.run_id, source.c.incarnation, sa.literal(now_unix_ns, sa.BigInteger), common)
        .outerjoin(noted, (noted.c.run_id == source.c.run_id) & (noted.c.incarnation == source.c.incarnation))
        .where(source.c.last_seen_unix_ns > now_unix_ns - 2 * MILESTONE_NS)
        .group_by(source.c.run_id, source.c.incarnation, noted.c.step, noted.c.reached)
        .having(
            common > sa.func.coalesce(noted.c.step, -1),
            sa.func.coalesce(noted.c.reached, 0) <= now_unix_ns - MILESTONE_NS,
        )
    )
    with engine.begin() as connection:
        connection.execute(
            sa.insert(milestone).from_select(["run_id", "incarnation", "reached_unix_ns", "step"], lives)
        )


def prune(
    engine: sa.Engine,
    store: StatsStore,
    *,
    older_than_ns: int,
    now_unix_ns: int,
    actor: str,
    run_id: int | None = None,
    report: Report | None = None,
) -> list[Pruned]:
    """Deletes raw rows, histograms and extras that were committed longer than `older_than_ns` ago.

    Scalars, findings and rollups stay, and so does whatever the rollups do not hold yet.
    """
    pruned: list[Pruned] = []
    done = 0
    for old in _old_sources(engine, now_unix_ns - older_than_ns, run_id):
        rows = 0
        for deleted in _delete_steps(engine, store, old):
            rows += deleted
            if report:
                report(done + rows, 0)
        done += rows
        if rows:
            pruned.append(Pruned(old.run, rows))
            said = {"rows": rows, "source_id": old.source_id, "below_step": old.below_step}
            with engine.begin() as connection:
                audit.record(connection, at_unix_ns=now_unix_ns, actor=actor, action="prune", subject=old.run, **said)
    return pruned


def delete_run(
    engine: sa.Engine,
    store: StatsStore,
    run_id: int,
    *,
    now_unix_ns: int,
    actor: str,
    report: Report | None = None,
) -> int:
    """Deletes a run with everything that is stored of it; returns how many raw rows that were.

    An agent that still sends is told to connect again, and then begins the run anew with what it has not sent yet.
    """
    source, run = schema.source, schema.run
    with engine.connect() as connection:
        label = run_label(*connection.execute(sa.select(run.c.project, run.c.name).where(run.c.id == run_id)).one())
        total = connection.scalar(sa.select(sa.func.sum(source.c.rows)).where(source.c.run_id == run_id)) or 0
        sources = [_old(row, LAST_STEP) for row in connection.execute(_sources(run_id)) if row.first_step is not None]
    rows = 0
    for old in sources:
        for deleted in _delete_steps(engine, store, old):
            rows += deleted
            if report:
                report(rows, max(int(total), rows))
    with engine.begin() as connection:
        locked = sa.select(source.c.id).where(source.c.run_id == run_id).order_by(source.c.id).with_for_update()
        store.delete(connection, connection.scalars(locked).all())  # what came meanwhile
        connection.execute(sa.delete(run).where(run.c.id == run_id))
        audit.record(connection, at_unix_ns=now_unix_ns, actor=actor, action="delete", subject=label, rows=rows)
    return rows


def release(engine: sa.Engine, report: Report | None = None) -> tuple[int, int]:
    """Gives the room of what was deleted back; the database's size in bytes before and after.

    SQLite's file shrinks step by step. One that was made without `auto_vacuum` is written anew, which takes as much
    room again and keeps writers waiting. PostgreSQL frees whole pages for new rows, and returns those at a table's end.
    """
    with engine.connect() as connection:
        before = database_bytes(connection)
    if engine.dialect.name == "sqlite":
        _shrink_sqlite(engine, report)
    else:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in (schema.stats, schema.histogram, schema.extra):
                connection.exec_driver_sql(f"VACUUM (ANALYZE) {table.name}")
    with engine.connect() as connection:
        return before, database_bytes(connection)


def needs_rewriting(engine: sa.Engine) -> bool:
    """Whether `release` has to write the whole file anew."""
    with engine.connect() as connection:
        return connection.dialect.name == "sqlite" and _pragma(connection, "auto_vacuum") != 2


def _sources(run_id: int | None) -> sa.Select[Any]:
    source, run, coverage = schema.source, schema.run, schema.coverage
    found = (
        sa.select(
            source.c.id,
            source.c.run_id,
            source.c.incarnation,
            source.c.last_seen_unix_ns,
            sa.func.coalesce(source.c.catalogue_slots, 1).label("slots"),
            coverage.c.first_step,
            coverage.c.rolled_step,
            run.c.project,
            run.c.name,
        )
        .join(run, run.c.id == source.c.run_id)
        .outerjoin(coverage, coverage.c.source_id == source.c.id)
        .order_by(source.c.run_id, source.c.incarnation, source.c.id)
    )
    return found if run_id is None else found.where(source.c.run_id == run_id)


def _old(row: Any, below_step: int) -> _Old:
    label = run_label(row.project, row.name)
    return _Old(row.id, label, row.incarnation, row.first_step, below_step, max(1, row.slots))


def _old_sources(engine: sa.Engine, before_unix_ns: int, run_id: int | None) -> list[_Old]:
    """What is older, and held by the rollups."""
    milestone = schema.milestone
    reached = (
        sa.select(milestone.c.run_id, milestone.c.incarnation, sa.func.max(milestone.c.step).label("step"))
        .where(milestone.c.reached_unix_ns <= before_unix_ns)
        .group_by(milestone.c.run_id, milestone.c.incarnation)
    )
    with engine.connect() as connection:
        old_step = {(row.run_id, row.incarnation): row.step for row in connection.execute(reached)}
        sources = connection.execute(_sources(run_id)).all()
    found = []
    for row in sources:
        below = (
            LAST_STEP
            if row.last_seen_unix_ns <= before_unix_ns
            else old_step.get((row.run_id, row.incarnation), -1) + 1
        )
        if row.first_step is not None and (below := min(below, row.rolled_step)) > row.first_step:
            found.append(_old(row, below))
    return found


def _delete_steps(engine: sa.Engine, store: StatsStore, old: _Old) -> Iterator[int]:
    """Deletes the source's old steps in transactions of about CHUNK_ROWS; yields how many rows each took."""
    stride = max(1, CHUNK_ROWS // old.slots)
    everything = [Span(old.source_id, old.incarnation, old.first_step, old.below_step - 1)]
    while True:
        with engine.connect() as connection:
            batch = next(store.rows(connection, everything, [], batch_rows=1), None)
            first = None if batch is None else batch["step"][0].as_py()
        below = old.below_step if first is None else min(first + stride, old.below_step)
        with engine.begin() as connection:
            coverage = schema.coverage
            here = sa.and_(coverage.c.source_id == old.source_id, coverage.c.pruned_step < below)
            connection.execute(sa.update(coverage).where(here).values(pruned_step=below))
            deleted = store.prune(connection, old.source_id, below)
            for table in (schema.histogram, schema.extra):
                connection.execute(sa.delete(table).where(table.c.source_id == old.source_id, table.c.step < below))
        yield deleted
        if below == old.below_step:
            return


def _shrink_sqlite(engine: sa.Engine, report: Report | None) -> None:
    rewrite = needs_rewriting(engine)
    with contextlib.closing(engine.raw_connection()) as pooled:
        connection: sqlite3.Connection = pooled.driver_connection  # type: ignore[assignment]  # any driver's
        if rewrite:
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            connection.execute("VACUUM")
        else:
            total = free = int(connection.execute("PRAGMA freelist_count").fetchone()[0])
            while free:
                connection.executescript(f"PRAGMA incremental_vacuum({CHUNK_PAGES})")  # execute() would free one page
                still = int(connection.execute("PRAGMA freelist_count").fetchone()[0])
                if report:
                    report(total - still, total)
                if still >= free:  # a collector takes pages as fast
                    break
                free = still
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _pragma(connection: sa.Connection, name: str) -> int:
    return int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
