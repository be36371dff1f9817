"""Commits groups of batches, each exactly once: rows, scalars, drop totals and the watermark in one transaction.

The watermark is the ledger: `source.up_to_seq` says which batches of a source are committed, and a batch at or below
it is a resend that changes nothing. The source's row is locked before the watermark is read, so two collectors that
hold the same batch agree on who writes it; groups lock their sources in the order of ids, so they cannot deadlock.

The rows themselves are the business of a `StatsStore`. A (step, slot) that a source sends again, in a later batch or
further down in the same, replaces what was there.
"""

from __future__ import annotations

import itertools
import math
import secrets
import sqlite3
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from fp8scope_collector.messages import Batch, Opening, Source
from fp8scope_collector.storage import samples, schema, tokens
from fp8scope_collector.storage.findings import FindingsNow, findings_now
from fp8scope_collector.storage.history import LAST_STEP
from fp8scope_collector.storage.overview import RunState, database_bytes, recent_runs
from fp8scope_collector.storage.registry import Insert, Numbers, register
from fp8scope_collector.storage.rolling import Locked, Rolling
from fp8scope_collector.storage.sql_stats import SqlStats
from fp8scope_collector.storage.stats_store import StatsStore, StorageError

SILENT_NS = 15 * 10**9  # a source that was not heard of for so long is in no collector's memory


@dataclass(frozen=True)
class Committed:
    """What a transaction did, batch by batch in the order given."""

    fresh: tuple[bool, ...]  # False: a resend, nothing was written
    up_to_seq: Mapping[int, int]  # of each source id in the group; a source that is missing here was deleted


@dataclass(frozen=True)
class Seen:
    """A sign of life outside the durable messages."""

    unix_ns: int
    drops: Mapping[str, int]  # reason -> rows


def is_transient(error: Exception) -> bool:
    """Whether the database failed (locked, full, gone, restarting) and not what was written to it."""
    if isinstance(error, StorageError):  # of a store of statistics beside the database
        return True
    of_the_values = (sa.exc.IntegrityError, sa.exc.DataError, sqlite3.IntegrityError, sqlite3.DataError)
    return isinstance(error, (sa.exc.DBAPIError, sa.exc.TimeoutError, sqlite3.Error)) and not isinstance(
        error, of_the_values
    )


class StatsWriter:
    """The writing side of one database, for one thread. A method that fails has changed nothing and may be repeated.

    Raises (every method): SQLAlchemy's or sqlite3's errors; `is_transient` tells which are worth a repetition.
    """

    def __init__(self, engine: sa.Engine, store: StatsStore | None = None) -> None:
        self._engine = engine
        self._store = store or SqlStats(engine.dialect.name)
        self._is_sqlite = engine.dialect.name == "sqlite"
        self._insert: Insert = sqlite.insert if self._is_sqlite else postgresql.insert
        self._numbers: Numbers = weakref.WeakValueDictionary()  # as long as their sources are in memory
        self._rolling = Rolling(self._store, self._insert, part=0 if self._is_sqlite else secrets.randbits(62))

    def register(self, opening: Opening, *, now_unix_ns: int) -> Source:
        """The source that `opening` describes, new or known; see `registry.register`."""
        with self._engine.begin() as connection:
            source, key = register(connection, self._insert, opening, self._numbers, now_unix_ns=now_unix_ns)
        self._numbers[key] = source.run_slot
        return source

    def commit(
        self, group: Sequence[Batch], *, now_unix_ns: int, meanwhile: Callable[[], None] | None = None
    ) -> Committed:
        """Writes in one transaction what of the group is not in the database yet; it is durable on return.

        `meanwhile` is called, at most once, where this thread would wait for a store of statistics.
        """

        def wait() -> None:
            self._rolling.merge()
            if meanwhile:
                meanwhile()

        due = self._rolling.due()
        with self._engine.begin() as connection:
            sources = {batch.source.id for batch in group}
            locked = self._lock(connection, sources | self._rolling.sources_of(due))
            up_to_seq = {source_id: locked[source_id].up_to_seq for source_id in sources if source_id in locked}
            order = sorted(range(len(group)), key=lambda index: (group[index].source.id, group[index].seq))
            fresh = [False] * len(group)
            for index in order:
                batch = group[index]
                if batch.seq > up_to_seq.get(batch.source.id, batch.seq):
                    up_to_seq[batch.source.id] = batch.seq
                    fresh[index] = True
            written = [group[index] for index in order if fresh[index]]
            self._store.write(connection, written, wait)
            self._cover(connection, written, locked)
            samples.write(connection, self._insert, written)
            self._write_scalars(connection, written)
            self._write_configurations(connection, written)
            self._write_drops(connection, ((batch.source.id, batch.drops) for batch in written))
            self._advance(connection, written, now_unix_ns)
            change = self._rolling.change(connection, due, written, locked)
        self._rolling.apply(change)
        return Committed(tuple(fresh), up_to_seq)

    def prepare(self, group: Sequence[Batch]) -> None:
        """Does in advance what needs no database, of the group that will be committed next as far as one can know."""
        self._store.prepare(sorted(group, key=lambda batch: (batch.source.id, batch.seq)))

    def roll_up(self, *, everything: bool = True) -> None:
        """Writes what of the rollups is still in memory: everything, or what no commit came to write in time."""
        if due := self._rolling.due(everything=everything):
            with self._engine.begin() as connection:
                locked = self._lock(connection, self._rolling.sources_of(due))
                change = self._rolling.change(connection, due, [], locked)
            self._rolling.apply(change)

    def catch_up(self, *, now_unix_ns: int) -> bool:
        """Rolls up some of the rows that no collector has in memory any more; False when there are none."""
        with self._engine.begin() as connection:  # SQLite has one collector: it knows what itself has in memory
            silent_since = LAST_STEP if self._is_sqlite else now_unix_ns - SILENT_NS
            self._rolling.look_behind(connection, silent_since_unix_ns=silent_since)
            return self._rolling.catch_up(connection, lambda sources: self._lock(connection, sources))

    def touch(self, seen: Mapping[int, Seen]) -> None:
        """Records signs of life, by source id."""
        source = schema.source
        with self._engine.begin() as connection:
            known = list(self._lock(connection, seen))
            now = sa.bindparam("now", type_=sa.BigInteger)
            connection.execute(
                sa.update(source)
                .where(source.c.id == sa.bindparam("source_id"), source.c.last_seen_unix_ns < now)
                .values(last_seen_unix_ns=now),
                [{"source_id": source_id, "now": seen[source_id].unix_ns} for source_id in known],
            )
            self._write_drops(connection, ((source_id, seen[source_id].drops) for source_id in known))

    def touch_tokens(self, used: Mapping[int, int]) -> None:
        """Records when tokens were used last, Unix nanoseconds by token id."""
        tokens.note_used(self._engine, used)

    def overview(self, limit: int) -> tuple[list[RunState], int, int]:
        """The runs seen last, and in bytes the size of the database and of statistics that are beside it."""
        with self._engine.begin() as connection:
            runs, size = recent_runs(connection, limit=limit), database_bytes(connection)
        return runs, size, self._store.size_bytes()

    def findings(self, per_run: int) -> FindingsNow:
        """What diagnosis has found and is open, at most `per_run` of a run by name."""
        with self._engine.begin() as connection:
            return findings_now(connection, per_run=per_run)

    def _lock(self, connection: sa.Connection, source_ids: Iterable[int]) -> dict[int, Locked]:
        """The sources' watermarks, their rows locked (SQLite has locked everything at BEGIN IMMEDIATE)."""
        source, coverage = schema.source, schema.coverage
        query = (
            sa.select(
                source.c.id, source.c.up_to_seq, source.c.last_step, coverage.c.first_step, coverage.c.rolled_step
            )
            .outerjoin_from(source, coverage, coverage.c.source_id == source.c.id)
            .where(source.c.id.in_(list(source_ids)))
            .order_by(source.c.id)
            .with_for_update(of=source)
        )
        return {
            row.id: Locked(row.up_to_seq, row.last_step, row.first_step, row.rolled_step or 0)
            for row in connection.execute(query)
        }

    def _cover(self, connection: sa.Connection, written: Sequence[Batch], locked: Mapping[int, Locked]) -> None:
        """Records the first step of sources that have one now, or an earlier one than before."""
        first: dict[int, int] = {}
        for batch in written:
            if batch.rows:
                first[batch.source.id] = min(int(batch.step.min()), first.get(batch.source.id, 2**62))
        news = [
            {"source_id": source_id, "first_step": step, "rolled_step": 0, "pruned_step": 0}
            for source_id, step in first.items()
            if (before := locked[source_id].first_step) is None or step < before
        ]
        if news:
            insert = self._insert(schema.coverage)
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["source_id"], set_={"first_step": insert.excluded.first_step}
                ),
                news,
            )

    def _write_scalars(self, connection: sa.Connection, batches: Iterable[Batch]) -> None:
        values = {
            (batch.source.id, name, step): None if math.isnan(value) else value
            for batch in batches
            for step, name, value in batch.scalars
        }
        if values:
            insert = self._insert(schema.scalar)
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["source_id", "name", "step"], set_={"value": insert.excluded.value}
                ),
                [
                    {"source_id": source_id, "name": name, "step": step, "value": value}
                    for (source_id, name, step), value in values.items()
                ],
            )

    def _write_configurations(self, connection: sa.Connection, batches: Iterable[Batch]) -> None:
        newest = {batch.source.run_id: batch.config_json for batch in batches if batch.config_json}
        for run_id, config_json in newest.items():
            connection.execute(sa.update(schema.run).where(schema.run.c.id == run_id).values(config_json=config_json))

    def _write_drops(self, connection: sa.Connection, totals: Iterable[tuple[int, Mapping[str, int]]]) -> None:
        """Keeps the larger total: they only grow, and a heartbeat may overtake a batch."""
        largest: dict[tuple[int, str], int] = {}
        for source_id, drops in totals:
            for reason, rows in drops.items():
                largest[source_id, reason] = max(rows, largest.get((source_id, reason), 0))
        if largest:
            insert = self._insert(schema.drop)
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["source_id", "reason"],
                    set_={"rows": insert.excluded.rows},
                    where=schema.drop.c.rows < insert.excluded.rows,
                ),
                [
                    {"source_id": source_id, "reason": reason, "rows": rows}
                    for (source_id, reason), rows in largest.items()
                ],
            )

    def _advance(self, connection: sa.Connection, written: Sequence[Batch], now_unix_ns: int) -> None:
        """Moves the watermarks over `written`, which is sorted by (source, seq), and records ends."""
        source = schema.source
        values: list[dict[str, int]] = []
        for source_id, batches in itertools.groupby(written, key=lambda batch: batch.source.id):
            own = list(batches)
            values.append(
                {
                    "source_id": source_id,
                    "seq": own[-1].seq,
                    "new_rows": sum(batch.rows for batch in own),
                    "step": max((int(batch.step.max()) for batch in own if batch.rows), default=-1),
                    "now": now_unix_ns,
                }
            )
            for ending in (batch.ending for batch in own if batch.ending):
                connection.execute(
                    sa.update(source)
                    .where(source.c.id == source_id)
                    .values(
                        finished_unix_ns=ending.finished_unix_ns,
                        outcome=ending.outcome,
                        outcome_message=ending.message or None,
                    )
                )
        if values:
            step = sa.bindparam("step", type_=sa.BigInteger)
            connection.execute(
                sa.update(source)
                .where(source.c.id == sa.bindparam("source_id"))
                .values(
                    up_to_seq=sa.bindparam("seq"),
                    rows=source.c.rows + sa.bindparam("new_rows"),
                    last_step=sa.case(
                        (step > sa.func.coalesce(source.c.last_step, -1), step), else_=source.c.last_step
                    ),
                    last_seen_unix_ns=sa.bindparam("now"),
                ),
                values,
            )
