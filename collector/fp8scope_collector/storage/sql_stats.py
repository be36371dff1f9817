"""Statistics in the relational database itself, on SQLite and PostgreSQL: the default `StatsStore`.

Rows go in by the fastest way that each database has: SQLite by statements of many rows, PostgreSQL by binary COPY
(`postgresql_copy`). They are read in the order of their key, (source, step, slot); one slot by seeks on the steps that
it has. On PostgreSQL the newest rows of a run, a short span of each of hundreds of ranks, are read together by COPY.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPICursor

from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.history import Span, history, steps_of
from fp8scope_collector.storage.stats_store import Pace, row_schema

_COLUMNS = tuple(schema.stats.columns.keys())


class SqlStats:
    """The table `stats` of one database; see `StatsStore`. It has no state of its own."""

    pace = Pace()
    in_pieces = True  # SQLite cannot begin its log anew while a reader looks at it
    backup_hint: str | None = None

    def __init__(self, dialect: str) -> None:
        self._insert_rows: Callable[[sa.Connection, Sequence[Batch]], None] = _insert_sqlite
        self._read_together: Callable[..., pa.RecordBatch] | None = None
        if dialect != "sqlite":
            from fp8scope_collector.storage import postgresql_copy  # its driver takes 6 MiB that others save

            self._insert_rows, self._read_together = postgresql_copy.insert, postgresql_copy.read

    def migrate(self) -> None:
        """Nothing: the tables are among those that `engine.migrate` knows."""

    def offer(self) -> None:
        """Nothing: every process reads the database."""

    def size_bytes(self) -> int:
        """0: the size of the database has it."""
        return 0

    def write(
        self, connection: sa.Connection, batches: Sequence[Batch], meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Writes the batches' rows in the caller's transaction, and in its thread: `meanwhile` has to wait."""
        self._insert_rows(connection, [batch for batch in batches if batch.rows])

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Nothing."""

    def delete(self, connection: sa.Connection, source_ids: Sequence[int]) -> None:
        """Removes everything of these sources."""
        stats = schema.stats
        connection.execute(sa.delete(stats).where(stats.c.source_id.in_(list(source_ids))))

    def prune(self, connection: sa.Connection, source_id: int, below_step: int) -> int:
        """Removes the source's rows of the steps below `below_step`; returns how many those were."""
        stats = schema.stats
        old = sa.delete(stats).where(stats.c.source_id == source_id, stats.c.step < below_step)
        return connection.execute(old).rowcount

    def last_steps(self, connection: sa.Connection, source_id: int, count: int) -> list[int]:
        """The newest `count` recorded steps of a source, descending: a seek for each."""
        stats = schema.stats.c
        below = sa.bindparam("below", type_=sa.BigInteger)
        query = sa.select(sa.func.max(stats.step)).where(stats.source_id == source_id, stats.step < below)
        steps: list[int] = []
        while len(steps) < count:
            step = connection.execute(query, {"below": steps[-1] if steps else 2**62}).scalar()
            if step is None:
                break
            steps.append(step)
        return steps

    def steps(self, connection: sa.Connection, spans: Sequence[Span]) -> list[tuple[int, int]]:
        """The recorded steps of the spans as (source id, step): a seek for each."""
        walk = steps_of(schema.stats, history(spans))
        rows = connection.execute(sa.select(walk.c.source_id, walk.c.step).where(walk.c.step <= walk.c.last_step))
        return [(source_id, step) for source_id, step in rows]

    def rows(
        self,
        connection: sa.Connection,
        spans: Sequence[Span],
        fields: Sequence[str],
        *,
        slots: Sequence[int] | None = None,
        every: int = 1,
        batch_rows: int = 50_000,
    ) -> Iterator[pa.RecordBatch]:
        """The spans' rows by a range of the key; a few slots by seeks on (source, step, slot)."""
        layout = row_schema(fields)
        read = self._read_together if every == 1 else None
        for some in _together(spans, slots) if read else [[span] for span in spans]:
            if read and _steps(some) <= _short(slots):
                table = read(connection, some, slots, layout)
                yield from (table.slice(start, batch_rows) for start in range(0, table.num_rows, batch_rows))
            else:
                yield from self._rows_of(connection, some[0], layout, slots, every, batch_rows)

    def _rows_of(
        self,
        connection: sa.Connection,
        span: Span,
        layout: pa.Schema,
        slots: Sequence[int] | None,
        every: int,
        batch_rows: int,
    ) -> Iterator[pa.RecordBatch]:
        stats = schema.stats.c
        columns = [stats[name] for name in layout.names]
        if slots is None:
            query = sa.select(*columns).where(
                stats.source_id == span.source_id, stats.step.between(span.first_step, span.last_step)
            )
        else:
            walk = steps_of(schema.stats, history([span]), every=every)
            here = sa.and_(stats.source_id == walk.c.source_id, stats.step == walk.c.step, stats.slot.in_(list(slots)))
            query = sa.select(*columns).join_from(walk, schema.stats, here).where(walk.c.step <= walk.c.last_step)
        query = query.order_by(stats.step, stats.slot)
        by_portal = connection.dialect.name != "sqlite"  # whose cursor gives rows one by one anyway
        with connection.execute(query, execution_options={"stream_results": by_portal}) as result:
            assert result.cursor
            yield from _batches(result if by_portal else result.cursor, layout, batch_rows)

    def close(self) -> None:
        """Nothing: the engine is the caller's."""


_FETCHED = 2000  # rows that are Python objects at one time: more cost the garbage collector more than SQLite itself


def _batches(result: sa.CursorResult[Any] | DBAPICursor, layout: pa.Schema, most: int) -> Iterator[pa.RecordBatch]:
    """The rows of a result, `most` together; of the driver's own cursor they take a third of the time."""
    while True:
        parts: list[pa.RecordBatch] = []
        left = most
        while left and (chunk := result.fetchmany(min(left, _FETCHED))):
            values = zip(*chunk, strict=True)
            arrays = [pa.array(column, type=field.type) for column, field in zip(values, layout, strict=True)]
            parts.append(pa.RecordBatch.from_arrays(arrays, schema=layout))
            left -= len(chunk)
        if not parts:
            return
        yield pa.concat_batches(parts)


# SQLite


_TOGETHER = 420  # rows of one statement: 5,880 of SQLite's 32,766 variables


def _insert_sqlite(connection: sa.Connection, batches: Sequence[Batch]) -> None:
    """Many rows by one statement, which SQLite works off without the interpreter's lock: the event loop goes on.

    One list for all rows takes each column as a slice. SQLite itself stores NaN as null.
    """
    count = sum(batch.rows for batch in batches)
    width = len(_COLUMNS)
    values: list[float | None] = [None] * (count * width)
    start = 0
    for batch in batches:
        end = start + batch.rows * width
        values[start:end:width] = [batch.source.id] * batch.rows
        values[start + 1 : end : width] = batch.step.tolist()
        values[start + 2 : end : width] = batch.source.run_slot[batch.slot].tolist()
        for offset, field in enumerate(FIELDS, start=3):
            if (column := batch.columns.get(field.name)) is not None:
                values[start + offset : end : width] = column.tolist()
        start = end
    driver: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]  # any driver's
    for at in range(0, count, _TOGETHER):
        rows = min(_TOGETHER, count - at)
        driver.execute(_insert_statement(rows), values[at * width : (at + rows) * width])


@functools.cache
def _insert_statement(rows: int) -> str:
    row = f"({', '.join('?' * len(_COLUMNS))})"
    return f"INSERT OR REPLACE INTO stats ({', '.join(_COLUMNS)}) VALUES {', '.join([row] * rows)}"


_SHORT_STEPS = 16  # of spans whose rows of all slots are read at once
_SHORT_ROWS = 4096  # the same where only some slots are


def _short(slots: Sequence[int] | None) -> int:
    return _SHORT_STEPS if slots is None else _SHORT_ROWS // max(1, len(slots))


def _steps(spans: Sequence[Span]) -> int:
    return sum(span.last_step - span.first_step + 1 for span in spans)


def _together(spans: Sequence[Span], slots: Sequence[int] | None) -> Iterator[list[Span]]:
    """The spans in their order, short ones in groups; a long one comes alone."""
    group: list[Span] = []
    for span in spans:
        if group and _steps([*group, span]) > _short(slots):
            yield group
            group = []
        group.append(span)
    if group:
        yield group
