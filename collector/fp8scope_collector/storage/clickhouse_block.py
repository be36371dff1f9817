"""The rows of batches as ClickHouse has them, an array for each field of a step, and back.

A block is inserted in Native format, which is how ClickHouse itself lays it out, column by column: the server copies
instead of converting (docs/adr/0083). Making one is copying, too: a batch that has one step is a row as it came
(docs/adr/0086).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch
from fp8scope_collector.storage.clickhouse_ddl import TYPES
from fp8scope_collector.storage.stats_store import row_schema

Ints: TypeAlias = npt.NDArray[np.int64]
Column: TypeAlias = npt.NDArray[Any]
Block: TypeAlias = tuple[list[str], memoryview]  # names of the columns, and the block

_KEY = ("run_id", "source_id", "step", "seq")
_SLOT = np.int32
_NAMES_BYTES = 64  # of a column, with its type
_ROW_BYTES = np.dtype(_SLOT).itemsize + sum(np.dtype(field.dtype).itemsize for field in FIELDS)
_STEP_BYTES = 8 * (len(_KEY) + 1 + len(FIELDS))  # the key, and where the arrays end


class Blocks:
    """Lays out one block after the other in the same memory: fresh pages for each cost more than the copying."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def rows(self, batches: Sequence[Batch]) -> Block:
        """The block of `stats_by_step`, valid until the next: a row for each step of each batch, in the table's order.

        `batches` are sorted by (source, seq). Of equal (step, slot) of a batch the last one is taken.
        """
        parts = [_Part(batch) for batch in sorted(batches, key=lambda batch: (batch.source.run_id, batch.source.id))]
        sizes = np.concatenate([part.sizes for part in parts])
        layout = _Layout(self._room(int(sizes.sum()), len(sizes)), len(_KEY) + 1 + len(FIELDS), len(sizes))
        keys = zip(*(part.key for part in parts), strict=True)
        for name, values in zip(_KEY, keys, strict=True):
            layout.add(name, "Int64", values)
        layout.add("slot", "Array(Int32)", [sizes.cumsum(), *(part.slot for part in parts)])
        for field in FIELDS:
            columns = [part.column(field.name) for part in parts]
            there = [part.sizes if len(column) else 0 * part.sizes for part, column in zip(parts, columns, strict=True)]
            layout.add(field.name, f"Array({TYPES[field.dtype]})", [np.concatenate(there).cumsum(), *columns])
        return [*_KEY, "slot", *(field.name for field in FIELDS)], layout.done()

    def _room(self, rows: int, steps: int) -> npt.NDArray[np.uint8]:
        size = (len(_KEY) + 2 + len(FIELDS)) * _NAMES_BYTES + steps * _STEP_BYTES + rows * _ROW_BYTES
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory


class _Part:
    """One batch, in the order of steps and slots: `sizes` says how many rows each of its steps has."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._order: Ints | None = None  # None: it came so
        step, slot = batch.step, batch.source.run_slot[batch.slot]
        if not _ascend(step, slot).all():
            order = np.lexsort((slot, step))
            self._order = order[np.append(_ascend(step[order], slot[order]), True)]
            step, slot = step[self._order], slot[self._order]
        starts = np.flatnonzero(np.diff(step, prepend=-1))
        self.sizes = np.diff(starts, append=len(step))
        source = batch.source
        self.key = np.full((len(_KEY), len(starts)), [[source.run_id], [source.id], [0], [batch.seq]])
        self.key[2] = step[starts]
        self.slot = slot.astype(_SLOT)

    def column(self, name: str) -> Column:
        """A field's values; none where the batch does not have it."""
        column = self._batch.columns.get(name, np.empty(0))
        return column if self._order is None or not len(column) else column[self._order]


class _Layout:
    """One block in Native format, column by column into `memory`."""

    def __init__(self, memory: npt.NDArray[np.uint8], columns: int, rows: int) -> None:
        self._memory = memory
        self._end = 0
        self._say([_number(columns) + _number(rows)])

    def add(self, name: str, kind: str, arrays: Sequence[Column]) -> None:
        """Adds a column, whose data are these arrays one after the other."""
        self._say([_text(name) + _text(kind), *arrays])

    def done(self) -> memoryview:
        """The block's bytes."""
        return self._memory[: self._end].data

    def _say(self, pieces: Sequence[bytes | Column]) -> None:
        data = [np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else _bytes(piece) for piece in pieces]
        start, self._end = self._end, self._end + sum(map(len, data))
        np.concatenate(data, out=self._memory[start : self._end])


def rows_of(blocks: Iterable[pa.RecordBatch], fields: Sequence[str], most: int) -> Iterator[pa.RecordBatch]:
    """The rows that blocks of `stats_by_step` hold, as `row_schema(fields)` says, at most so many at a time.

    A block has source_id, step, slot, and the fields, rows of a (source, step) side by side in the order of seq. Of
    equal (source, step, slot) the last one is given.
    """
    held: list[pa.RecordBatch] = []  # of one step, that may go on in the next block
    for block in blocks:
        changes = np.flatnonzero(np.diff(block["source_id"]) | np.diff(block["step"])) + 1
        first, last = (int(changes[0]), int(changes[-1])) if len(changes) else (block.num_rows, 0)
        if held and any(held[0][name][0] != block[name][0] for name in ("source_id", "step")):
            yield from _rows_of(held, fields, most)
            held = []
        if held:
            held.append(block.slice(0, first))
            if not len(changes):
                continue
            yield from _rows_of(held, fields, most)
            block, last = block.slice(first), last - first
        yield from _rows_of([block.slice(0, last)], fields, most)
        held = [block.slice(last)]
    yield from _rows_of(held, fields, most)


def _rows_of(blocks: Sequence[pa.RecordBatch], fields: Sequence[str], most: int) -> Iterator[pa.RecordBatch]:
    if not sum(block.num_rows for block in blocks):
        return
    table = pa.Table.from_batches(blocks).combine_chunks().to_batches()[0]
    sizes = _sizes(table["slot"])
    source, step = (np.asarray(table[name]) for name in ("source_id", "step"))
    slot = _values(table["slot"])
    key = [np.repeat(source, sizes), np.repeat(step, sizes), slot.astype(np.int64)]
    order = None
    if (~np.diff(source).astype(bool) & ~np.diff(step).astype(bool)).any():  # a step of several batches
        which = np.repeat(np.cumsum(np.append(True, np.diff(source) | np.diff(step)) != 0), sizes)
        order = np.lexsort((slot, which))
        order = order[np.append(_ascend(which[order], slot[order]), True)]
    layout = row_schema(fields)
    columns = [pa.array(each if order is None else each[order]) for each in key]
    for name in fields:
        values, there = _values(table[name]), _sizes(table[name]) == sizes
        null = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
        if not there.all():
            whole = np.repeat(there, sizes)
            values, null = _spread(values, whole), _spread(null, whole) | ~whole
        if order is not None:
            values, null = values[order], null[order]
        columns.append(pa.array(values.astype(layout.field(name).type.to_pandas_dtype(), copy=False), mask=null))
    rows = pa.RecordBatch.from_arrays(columns, schema=layout)
    for start in range(0, rows.num_rows, most):
        yield rows.slice(start, most)


def _spread(values: Column, where: npt.NDArray[np.bool_]) -> Column:
    whole = np.zeros(len(where), values.dtype)
    whole[where] = values
    return whole


def _values(lists: pa.ListArray) -> Column:
    values: Column = lists.flatten().to_numpy(zero_copy_only=False)
    return values


def _sizes(lists: pa.ListArray) -> Ints:
    sizes: Ints = lists.value_lengths().to_numpy(zero_copy_only=False)
    return sizes


def _ascend(step: Column, slot: Column) -> npt.NDArray[np.bool_]:
    """Whether each (step, slot) is below the one that follows."""
    below: npt.NDArray[np.bool_] = (step[1:] > step[:-1]) | ((step[1:] == step[:-1]) & (slot[1:] > slot[:-1]))
    return below


def _bytes(column: Column) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(column, column.dtype.newbyteorder("<")).view(np.uint8)


def _text(text: str) -> bytes:
    data = text.encode()
    return _number(len(data)) + data


def _number(number: int) -> bytes:
    """As ClickHouse writes lengths: seven bits a byte, the lowest first."""
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])
