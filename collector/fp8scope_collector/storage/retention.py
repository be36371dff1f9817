"""Taking things out of the database: raw rows that are older than a retention, whole runs, and the room they took.

Statistics carry no time. How old a step is, `milestone` says: every ten minutes a collector notes for each run the step
that all its ranks have committed, so whatever lies at or below a milestone is at least as old as it.

Everything here goes in small transactions, so that a collector that writes at the same time waits milliseconds, and a
command that is interrupted has done a part of its work and can be given again.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from fp8scope_collector.messages import run_label
from fp8scope_collector.storage import audit, schema
from fp8scope_collector.storage.overview import database_bytes

CHUNK_ROWS = 20_000  # of one transaction
CHUNK_PAGES = 2_000
MILESTONE_NS = 600 * 10**9
ALIGNMENT = 4096  # steps of the coarsest rollup: what a collector may still have to build it from is kept

Report = Callable[[int, int], None]  # called with how much is done, and of how much (0: not known)


@dataclass(frozen=True)
class Pruned:
    """What was taken from one run."""

    run: str
    rows: int


@dataclass(frozen=True)
class _Life:
    run_id: int
    run: str
    incarnation: int
    source_ids: tuple[int, ...]
    below_step: int | None  # None: all


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
    *,
    older_than_ns: int,
    now_unix_ns: int,
    actor: str,
    run_id: int | None = None,
    dry_run: bool = False,
    report: Report | None = None,
) -> list[Pruned]:
    """Deletes raw rows that were committed longer than `older_than_ns` ago; what is made from them stays.

    A life of a run that still sends keeps its last 4096 steps at least, whatever their age. With `dry_run` nothing is
    deleted and the rows are counted.
    """
    pruned: list[Pruned] = []
    done = 0
    for life in _old_lives(engine, now_unix_ns - older_than_ns, run_id):
        rows = 0
        for deleted in _count(engine, life) if dry_run else _delete_raw(engine, life):
            rows += deleted
            if report:
                report(done + rows, 0)
        done += rows
        if rows:
            pruned.append(Pruned(life.run, rows))
        if rows and not dry_run:
            with engine.begin() as connection:
                said = {"rows": rows, "incarnation": life.incarnation, "below_step": life.below_step}
                audit.record(connection, at_unix_ns=now_unix_ns, actor=actor, action="prune", subject=life.run, **said)
    return pruned


def delete_run(engine: sa.Engine, run_id: int, *, now_unix_ns: int, actor: str, report: Report | None = None) -> int:
    """Deletes a run with everything that is stored of it; returns how many raw rows that were.

    An agent that still sends is told to connect again, and then begins the run anew with what it has not sent yet.
    """
    source, run = schema.source, schema.run
    with engine.connect() as connection:
        label = run_label(*connection.execute(sa.select(run.c.project, run.c.name).where(run.c.id == run_id)).one())
        sources = connection.execute(sa.select(source.c.id, source.c.rows).where(source.c.run_id == run_id)).all()
    total = sum(row.rows for row in sources)
    life = _Life(run_id, label, 0, tuple(row.id for row in sources), None)
    rows = 0
    for deleted in _delete_raw(engine, life):
        rows += deleted
        if report:
            report(rows, max(total, rows))
    with engine.begin() as connection:
        connection.execute(sa.select(run.c.id).where(run.c.id == run_id).with_for_update())
        own = sa.select(source.c.id).where(source.c.run_id == run_id)
        for table in schema.metadata.sorted_tables:  # what no foreign key takes along
            if "source_id" in table.c and not table.c.source_id.foreign_keys:
                connection.execute(sa.delete(table).where(table.c.source_id.in_(own)))
            elif "run_id" in table.c and not table.c.run_id.foreign_keys:
                connection.execute(sa.delete(table).where(table.c.run_id == run_id))
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
            for table in raw_tables():
                connection.exec_driver_sql(f"VACUUM (ANALYZE) {table.name}")
    with engine.connect() as connection:
        return before, database_bytes(connection)


def needs_rewriting(engine: sa.Engine) -> bool:
    """Whether `release` has to write the whole file anew."""
    with engine.connect() as connection:
        return connection.dialect.name == "sqlite" and _pragma(connection, "auto_vacuum") != 2


def raw_tables() -> list[sa.Table]:
    """The tables that have one row for a slot and a step: these have a retention."""
    return [table for table in schema.metadata.sorted_tables if {"source_id", "step", "slot"} <= set(table.c.keys())]


def _old_lives(engine: sa.Engine, before_unix_ns: int, run_id: int | None) -> list[_Life]:
    """The lives of runs that have something older, with the step below which it is."""
    source, run, milestone = schema.source, schema.run, schema.milestone
    found: dict[tuple[int, int], list[Any]] = {}
    with engine.connect() as connection:
        sources = sa.select(
            source.c.id, source.c.run_id, source.c.incarnation, source.c.last_seen_unix_ns, run.c.project, run.c.name
        ).join(run, run.c.id == source.c.run_id)
        if run_id is not None:
            sources = sources.where(run.c.id == run_id)
        for row in connection.execute(sources.order_by(source.c.run_id, source.c.incarnation, source.c.id)):
            found.setdefault((row.run_id, row.incarnation), []).append(row)
        reached = {
            (row.run_id, row.incarnation): row.step
            for row in connection.execute(
                sa.select(milestone.c.run_id, milestone.c.incarnation, sa.func.max(milestone.c.step).label("step"))
                .where(milestone.c.reached_unix_ns <= before_unix_ns)
                .group_by(milestone.c.run_id, milestone.c.incarnation)
            )
        }
    lives = []
    for (run_of, incarnation), own in found.items():
        below: int | None = None
        if max(row.last_seen_unix_ns for row in own) > before_unix_ns:
            below = (reached.get((run_of, incarnation), -1) + 1) // ALIGNMENT * ALIGNMENT
        if below != 0:
            label = run_label(own[0].project, own[0].name)
            lives.append(_Life(run_of, label, incarnation, tuple(row.id for row in own), below))
    return lives


def _delete_raw(engine: sa.Engine, life: _Life) -> Iterator[int]:
    """Deletes the life's raw rows below its step in transactions of about CHUNK_ROWS; yields how many each took."""
    for table, source_id in _places(life):
        while True:
            ahead = sa.select(table.c.step).where(*_old(table, source_id, life)).order_by(table.c.step)
            with engine.begin() as connection:
                end = connection.execute(ahead.offset(CHUNK_ROWS).limit(1)).scalar_one_or_none()
                chunk = sa.delete(table).where(*_old(table, source_id, life))
                if end is not None:
                    last = connection.execute(ahead.limit(1)).scalar_one()
                    chunk = chunk.where(table.c.step < max(end, last + 1))  # a step may have more rows than a chunk
                deleted = connection.execute(chunk).rowcount
            yield deleted
            if end is None:
                break


def _count(engine: sa.Engine, life: _Life) -> Iterator[int]:
    for table, source_id in _places(life):
        with engine.connect() as connection:
            counting = sa.select(sa.func.count()).select_from(table).where(*_old(table, source_id, life))
            yield connection.execute(counting).scalar_one()


def _places(life: _Life) -> Iterator[tuple[sa.Table, int]]:
    return ((table, source_id) for table in raw_tables() for source_id in life.source_ids)


def _old(table: sa.Table, source_id: int, life: _Life) -> Sequence[sa.ColumnElement[bool]]:
    own = [table.c.source_id == source_id]
    return own if life.below_step is None else [*own, table.c.step < life.below_step]


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
