"""Rows of statistics into and out of PostgreSQL by binary COPY of numpy records.

Loaded where the database is PostgreSQL: its driver takes 6 MiB of a process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
import sqlalchemy as sa

from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.history import Span

_COLUMNS = tuple(schema.stats.columns.keys())
_NATIVE = {"source_id": "i8", "step": "i8", "slot": "i4"} | {
    field.name: {"float32": "f4", "float64": "f8", "uint64": "i8"}[field.dtype] for field in FIELDS
}
_OPTIONAL = {field.name for field in FIELDS}
_TABLE = np.dtype([*_NATIVE.items(), ("arrival", "i8"), ("null", "u2")])  # null: a bit for each of FIELDS
_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_TRAILER = b"\xff\xff"


def insert(connection: sa.Connection, batches: Sequence[Batch]) -> None:
    """One binary COPY for all batches. COPY cannot replace rows: where some are there already, it goes another way."""
    if not batches:
        return
    table = np.concatenate([_table(batch) for batch in batches])
    try:
        with connection.begin_nested():
            _copy(connection, "stats", table, _COLUMNS)
    except sa.exc.IntegrityError:
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
    with _copying(connection, f"COPY {name} ({', '.join(columns)}) FROM STDIN (FORMAT BINARY)") as copy:
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


def read(
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
    with _copying(connection, query) as copy:
        data = b"".join(copy)
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


@contextlib.contextmanager
def _copying(connection: sa.Connection, statement: str) -> Iterator[psycopg.Copy]:
    """A COPY of the driver's own; what fails is SQLAlchemy's error, as that of any other statement."""
    driver: psycopg.Connection = connection.connection.driver_connection  # type: ignore[assignment]  # any driver's
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            yield copy
    except psycopg.Error as error:
        raise sa.exc.DBAPIError.instance(statement, None, error, psycopg.Error) from error
