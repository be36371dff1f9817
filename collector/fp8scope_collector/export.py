"""Writes all rows of a run as CSV or Parquet, in bounded memory, under the file's name only when it is complete.

A CSV cell that a spreadsheet would take for a formula gets an apostrophe in front: layer names come from training jobs.
Floats are in the shortest form that reads back, as a float64, as exactly the stored number; a null is an empty cell.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

Format = Literal["csv", "parquet"]


class _Writer(Protocol):
    def write_batch(self, batch: pa.RecordBatch) -> None: ...


def write_rows(batches: Iterator[pa.RecordBatch], file_format: Format, out: str) -> int:
    """Writes `batches`, of one schema, to the file `out`, or to standard output for "-"; returns the number of rows.

    Where there are none, no file is made.

    Raises:
        OSError: the file cannot be written; what was there before is unchanged.
    """
    batches = map(_for_csv, batches) if file_format == "csv" else batches
    first = next(batches, None)
    rows = 0
    if first is None:
        return rows
    with _target(out) as file, _writer(file_format, file, first.schema) as writer:
        for batch in itertools.chain([first], batches):
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def table_bytes(table: pa.Table, file_format: Format) -> bytes:
    """A small table as the content of a file."""
    sink = io.BytesIO()
    batches = map(_for_csv, table.to_batches()) if file_format == "csv" else iter(table.to_batches())
    first = next(batches, None)
    with _writer(file_format, sink, table.schema if first is None else first.schema) as writer:
        for batch in itertools.chain([] if first is None else [first], batches):
            writer.write_batch(batch)
    return sink.getvalue()


@contextmanager
def _target(out: str) -> Iterator[BinaryIO]:
    if out == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(out)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _writer(file_format: Format, file: BinaryIO, schema: pa.Schema) -> AbstractContextManager[_Writer]:
    if file_format == "csv":
        options = pyarrow.csv.WriteOptions(quoting_header="none")
        writer: AbstractContextManager[_Writer] = pyarrow.csv.CSVWriter(file, schema, write_options=options)
    else:
        writer = pyarrow.parquet.ParquetWriter(file, schema, compression="zstd")
    return writer


def _for_csv(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = []
    for column in batch.columns:
        if pa.types.is_string(column.type):
            formula = pc.match_substring_regex(column, r"^[=+\-@\t\r]")
            column = pc.if_else(formula, pc.binary_join_element_wise("'", column, ""), column)
        elif pa.types.is_float32(column.type):
            column = column.cast(pa.float64())
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
