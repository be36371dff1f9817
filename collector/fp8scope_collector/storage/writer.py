"""Commits groups of batches, each exactly once: rows, scalars, drop totals and the watermark in one transaction.

The watermark is the ledger: `source.up_to_seq` says which batches of a source are committed, and a batch at or below
it is a resend that changes nothing. The source's row is locked before the watermark is read, so two collectors that
hold the same batch agree on who writes it; groups lock their sources in the order of ids, so they cannot deadlock.

Rows go in by the fastest way that each database has: SQLite by `executemany` of tuples, PostgreSQL by binary COPY of
numpy records. A (step, slot) that a source sends again, in a later batch or further down in the same, replaces what
was there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch, Opening, Source
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.registry import register

_COLUMNS = ("source_id", "step", "slot", *(field.name for field in FIELDS))


@dataclass(frozen=True)
class Committed:
    """What a transaction did, batch by batch in the order given."""

    fresh: tuple[bool, ...]  # False: a resend, nothing was written
    up_to_seq: Mapping[int, int]  # of each source id in the group; a source that is missing here was deleted


@dataclass(frozen=True)
class Seen:
    """A sign of life outside the durable messages."""

    unix_ns: int
    drops: Mapping[str, int]


class StatsWriter:
    """The writing side of one database; used by one thread. Errors are SQLAlchemy's: see `is_transient`."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._insert_rows: _InsertRows = _insert_sqlite if engine.dialect.name == "sqlite" else _copy_postgresql
        self._upsert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert

    def register(self, opening: Opening, *, now_unix_ns: int) -> Source:
        """The source that `opening` describes, new or known."""
        with self.engine.begin() as connection:
            return register(connection, self._upsert, opening, now_unix_ns=now_unix_ns)

    def commit(self, group: Sequence[Batch], *, now_unix_ns: int) -> Committed:
        """Writes in one transaction what of the group is not in the database yet; all of it is durable on return."""
        with self.engine.begin() as connection:
            marks = self._lock({batch.source.id for batch in group})
            known = dict(connection.execute(marks).tuples())
            up_to_seq = dict(known)
            fresh = [False] * len(group)
            for index in sorted(range(len(group)), key=lambda index: (group[index].source.id, group[index].seq)):
                batch = group[index]
                if batch.seq > up_to_seq.get(batch.source.id, batch.seq):
                    up_to_seq[batch.source.id] = batch.seq
                    fresh[index] = True
            written = sorted(
                itertools.compress(group, fresh), key=lambda batch: (batch.source.id, batch.seq)
            )
            self._insert_rows(connection, [batch for batch in written if batch.rows])
            self._write_scalars(connection, written)
            self._write_drops(connection, ((batch.source.id, batch.drops) for batch in written))
            self._advance(connection, known, written, now_unix_ns)
        return Committed(tuple(fresh), up_to_seq)

    def touch(self, seen: Mapping[int, Seen]) -> None:
        """Records signs of life, by source id."""
        with self.engine.begin() as connection:
            connection.execute(self._lock(seen))
            connection.execute(
                sa.update(schema.source)
                .where(schema.source.c.id == sa.bindparam("source_id"), schema.source.c.last_seen_unix_ns < sa.bindparam("now"))
                .values(last_seen_unix_ns=sa.bindparam("now")),
                [{"source_id": source_id, "now": sign.unix_ns} for source_id, sign in sorted(seen.items())],
            )
            self._write_drops(connection, ((source_id, sign.drops) for source_id, sign in seen.items()))

    def _lock(self, source_ids: Iterable[int]) -> sa.Select[int, int]:
        """Selects the sources' watermarks and locks their rows (SQLite has locked everything at BEGIN IMMEDIATE)."""
        return (
            sa.select(schema.source.c.id, schema.source.c.up_to_seq)
            .where(schema.source.c.id.in_(list(source_ids)))
            .order_by(schema.source.c.id)
            .with_for_update()
        )

    def _write_scalars(self, connection: sa.Connection, batches: Iterable[Batch]) -> None:
        values = {
            (batch.source.id, name, step): None if np.isnan(value) else value
            for batch in batches
            for step, name, value in batch.scalars
        }
        if values:
            insert = self._upsert(schema.scalar)
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["source_id", "name", "step"], set_={"value": insert.excluded.value}
                ),
                [
                    {"source_id": source_id, "name": name, "step": step, "value": value}
                    for (source_id, name, step), value in values.items()
                ],
            )

    def _write_drops(self, connection: sa.Connection, totals: Iterable[tuple[int, Mapping[str, int]]]) -> None:
        """Keeps the larger total: they only grow, and a heartbeat may overtake a batch."""
        values = [
            {"source_id": source_id, "reason": reason, "rows": rows}
            for source_id, drops in totals
            for reason, rows in drops.items()
        ]
        if values:
            insert = self._upsert(schema.drop)
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["source_id", "reason"],
                    set_={"rows": insert.excluded.rows},
                    where=schema.drop.c.rows < insert.excluded.rows,
                ),
                values,
            )
