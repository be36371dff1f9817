"""Statistics in the relational database itself, on SQLite and PostgreSQL: the default `StatsStore`.

Rows go in by the fastest way that each database has: SQLite by statements of many rows, PostgreSQL by binary COPY of
numpy records. They are read in the order of their key, (source, step, slot); one slot by seeks on the steps it has.
On PostgreSQL the newest rows of a run, a short span of each of hundreds of ranks, are read together, by COPY too.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPICursor

from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.history import Span, history, steps_of
from fp8scope_collector.storage.stats_store import Pace, row_schema

_COLUMNS = ("source_id", "step", "slot", *(field.name for field in FIELDS))


class SqlStats:
    """The table `stats` of one database; see `StatsStore`. It has no state of its own."""

    pace = Pace()
    in_pieces = True  # SQLite cannot begin its log anew while a reader looks at it
    backup_hint: str | None = None

    def __init__(self, dialect: str) -> None:
        self._insert_rows = _insert_sqlite if dialect == "sqlite" else _copy_postgresql
        self._by_portal = dialect != "sqlite"  # SQLite's cursor gives rows one by one anyway

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
        for some in _together(spans, slots) if self._by_portal and every == 1 else [[span] for span in spans]:
            if self._by_portal and every == 1 and _steps(some) <= _short(slots):
                table = _copied(connection, some, slots, layout)
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
        with connection.execute(query, execution_options={"stream_results": self._by_portal}) as result:
            assert result.cursor
            yield from _batches(result if self._by_portal else result.cursor, layout, batch_rows)

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


# PostgreSQL

_NATIVE = {"source_id": "i8", "step": "i8", "slot": "i4"} | {
    field.name: {"float32": "f4", "float64": "f8", "uint64": "i8"}[field.dtype] for field in FIELDS
}
_OPTIONAL = {field.name for field in FIELDS}
_TABLE = np.dtype([*_NATIVE.items(), ("arrival", "i8"), ("null", "u2")])  # null: a bit for each of FIELDS
_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_TRAILER = b"\xff\xff"


def _copy_postgresql(connection: sa.Connection, batches: Sequence[Batch]) -> None:
    """One binary COPY for all batches. COPY cannot replace rows: where some are there already, it goes another way."""
    if not batches:
        return
    table = np.concatenate([_table(batch) for batch in batches])
    try:
        with connection.begin_nested():
            _copy(connection, "stats", table, _COLUMNS)
    except psycopg.errors.UniqueViolation:
        _replace(connection, table)


def _replace(connection: sa.Connection, table: npt.NDArray[np.void]) -> None:
    """Writes rows of which some are there already, or come twice: the last one wins."""
    table["arrival"] = np.arange(len(table))
    columns = ", ".join(_COLUMNS)
    updates = ", ".join(f"{field.name} = excluded.{field.name}" for field in FIELDS)
    connection.exec_driver_sql("CREATE TEMPORARY TABLE incoming (LIKE stats, arrival bigint) ON COMMIT DROP")
    _copy(connection, "incoming", table, (*_COLUMNS, "arrival"))
    connection.exec_driver_sql(
        f"INSERT INTO stats ({columns})"
        f" SELECT DISTINCT ON (source_id, step, slot) {columns} FROM incoming"
        " ORDER BY source_id, step, slot, arrival DESC"
        f" ON CONFLICT (source_id, step, slot) DO UPDATE SET {updates}"
    )


def _table(batch: Batch) -> npt.NDArray[np.void]:
    """The batch's rows as native records. Absent columns and NaN are null, as SQLite would have it."""
    table = np.zeros(batch.rows, _TABLE)
    table["source_id"] = batch.source.id
    table["step"] = batch.step
    table["slot"] = batch.source.run_slot[batch.slot]
    for bit, field in enumerate(FIELDS):
        if (column := batch.columns.get(field.name)) is None:
            table["null"] |= 1 << bit
        else:
            table[field.name] = column
            if field.dtype != "uint64":
                table["null"] |= np.isnan(column).astype(np.uint16) << bit
    return table


def _copy(connection: sa.Connection, name: str, table: npt.NDArray[np.void], columns: Sequence[str]) -> None:
    """Streams `columns` of `table` into the database's table `name`, rows with the same nulls together."""
    driver: psycopg.Connection = connection.connection.driver_connection  # type: ignore[assignment]  # any driver's
    with driver.cursor() as cursor:
        with cursor.copy(f"COPY {name} ({', '.join(columns)}) FROM STDIN (FORMAT BINARY)") as copy:
            copy.write(_COPY_HEADER)
            for null in np.unique(table["null"]):
                copy.write(_copy_records(table[table["null"] == null], columns, int(null)))
            copy.write(_COPY_TRAILER)


def _copy_records(rows: npt.NDArray[np.void], columns: Sequence[str], null: int) -> bytes:
    """The rows in COPY's binary format: a count of fields, then each field's size (-1: null) and big-endian bytes."""
    absent = {field.name for bit, field in enumerate(FIELDS) if null >> bit & 1}
    present = [column for column in columns if column not in absent]
    layout: list[tuple[str, str]] = [("fields", ">i2")]
    for column in columns:
        layout.append((f"{column} size", ">i4"))
        if column not in absent:
            layout.append((column, f">{_TABLE[column].str[1:]}"))
    records = np.empty(len(rows), layout)
    records["fields"] = len(columns)
    for column in columns:
        records[f"{column} size"] = -1 if column in absent else _TABLE[column].itemsize
    for column in present:
        records[column] = rows[column]
    return records.tobytes()


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


def _copied(
    connection: sa.Connection, spans: Sequence[Span], slots: Sequence[int] | None, layout: pa.Schema
) -> pa.RecordBatch:
    """All rows of short spans by one COPY, whose records are of one size: what is null comes as NaN or -1."""
    dtype = np.dtype([("fields", ">i2")] + [
        column for name in layout.names for column in ((f"{name} size", ">i4"), (name, f">{_TABLE[name].str[1:]}"))
    ])  # fmt: skip
    null = {name: "'NaN'" if dtype[name].kind == "f" else "-1" for name in layout.names}
    columns = [f"coalesce({name}, {null[name]})" if name in _OPTIONAL else name for name in layout.names]
    parts = [[span.source_id for span in spans], [s.first_step for s in spans], [s.last_step for s in spans]]
    arrays = ", ".join(f"ARRAY[{', '.join(map(str, map(int, part)))}]::bigint[]" for part in parts)
    chosen = "" if slots is None else f" AND slot = ANY(ARRAY[{', '.join(map(str, map(int, slots)))}]::int[])"
    query = (
        f"COPY (SELECT {', '.join(columns)}"
        f" FROM unnest({arrays}) WITH ORDINALITY AS span (source, first_step, last_step, number)"
        " CROSS JOIN LATERAL generate_series(span.first_step, span.last_step) AS walk (at)"
        " CROSS JOIN LATERAL"  # OFFSET: never a scan of the table that is joined
        f" (SELECT * FROM stats WHERE source_id = span.source AND step = walk.at{chosen} OFFSET 0) AS found"
        " ORDER BY span.number, step, slot) TO STDOUT (FORMAT BINARY)"
    )
    driver: psycopg.Connection = connection.connection.driver_connection  # type: ignore[assignment]  # any driver's
    try:
        with driver.cursor() as cursor, cursor.copy(query) as copy:
            data = b"".join(copy)
    except psycopg.Error as error:
        raise sa.exc.DBAPIError(query, None, error) from error
    table = np.frombuffer(data[len(_COPY_HEADER) : -len(_COPY_TRAILER)], dtype)
    arrow: list[pa.Array] = []
    for field in layout:
        values = table[field.name].astype(dtype[field.name].newbyteorder("="))
        if field.name not in _OPTIONAL:
            arrow.append(pa.array(values.astype(np.int64)))
        elif values.dtype.kind == "f":
            arrow.append(pa.array(values, from_pandas=True))
        else:
            arrow.append(pa.array(values.view(np.uint64), mask=values < 0))
    return pa.RecordBatch.from_arrays(arrow, schema=layout)
