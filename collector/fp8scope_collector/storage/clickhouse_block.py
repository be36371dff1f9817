"""The rows of batches as ClickHouse has them, a step's values of a field in an array, and back.

A block is inserted in Native format, which is how ClickHouse itself lays it out, column by column: the server copies
instead of converting (docs/adr/0083). Making one is copying, too (docs/adr/0086).
"""

from __future__ import annotations

import io
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch, ascending
from fp8scope_collector.storage.clickhouse_ddl import SLOTS_A_BLOCK, TYPES
from fp8scope_collector.storage.stats_store import row_schema

Ints: TypeAlias = npt.NDArray[np.int64]
Column: TypeAlias = npt.NDArray[Any]
Bytes: TypeAlias = npt.NDArray[np.uint8]

_KEY = ("run_id", "source_id", "slot_block", "step", "seq")
_SLOT = np.dtype(np.int32)
_NAMES_BYTES = 64  # of a column, with its type
_VALUES_BYTES = _SLOT.itemsize + sum(np.dtype(field.dtype).itemsize for field in FIELDS)
_ROW_BYTES = 8 * (len(_KEY) + 1 + len(FIELDS))  # the key, and where the arrays end


class Block(NamedTuple):
    """A block of ClickHouse: the names of its columns, its bytes, and a file that has them, or None."""

    columns: list[str]
    data: memoryview
    path: str | None


class Blocks:
    """Lays out one block after the other in the same memory: fresh pages for each cost more than the copying."""

    def __init__(self, *, in_file: bool = False) -> None:
        """`in_file`: this process can read it as a file, too, where the system has files in memory."""
        self._memory = np.empty(0, np.uint8)
        self._file: io.FileIO | None = None
        if in_file and sys.platform == "linux":
            self._file = io.FileIO(os.memfd_create("fp8scope-block"), "r+")  # open as long as this object is there

    def rows(self, batches: Sequence[Batch]) -> Block:
        """The block of `stats_by_step`, valid until the next, in the table's order.

        A batch is a row for each of its steps and blocks of slots. Of its equal (step, slot) the last one is taken.
        """
        parts = [_Part(batch) for batch in batches]
        key = np.concatenate([part.key for part in parts], axis=1)
        order = np.lexsort(key[::-1])
        sizes = np.concatenate([part.sizes for part in parts])[order]
        which = np.repeat(np.arange(len(parts)), [len(part.sizes) for part in parts])[order]
        ends = np.concatenate([part.sizes.cumsum() for part in parts])[order]
        cuts = _cuts(which, ends - sizes, ends)
        layout = _Layout(self._room(int(sizes.sum()), len(sizes)), len(_KEY) + 1 + len(FIELDS), len(sizes))
        for name, values in zip(_KEY, key[:, order], strict=True):
            layout.add(name, "Int64", [_bytes(values)])
        columns = [("slot", _SLOT), *((field.name, np.dtype(field.dtype)) for field in FIELDS)]
        for name, dtype in columns:
            data = [part.column(name) for part in parts]
            there = np.array([len(each) > 0 for each in data])[which]
            pieces = [data[part][start * dtype.itemsize : end * dtype.itemsize] for part, start, end in cuts]
            layout.add(name, f"Array({TYPES[dtype.name]})", [_bytes((sizes * there).cumsum()), *pieces])
        whole, path = layout.done(), None
        if self._file:
            self._file.truncate(len(whole))
            path = f"/proc/self/fd/{self._file.fileno()}"
        return Block([*_KEY, *(name for name, _ in columns)], whole, path)

    def _room(self, values: int, rows: int) -> Bytes:
        size = (len(_KEY) + 2 + len(FIELDS)) * _NAMES_BYTES + rows * _ROW_BYTES + values * _VALUES_BYTES
        size = max(size, len(self._memory))
        if self._file:
            self._file.truncate(size)
        if len(self._memory) < size:
            shared = mmap.mmap(self._file.fileno(), size) if self._file else None
            self._memory = np.frombuffer(shared, np.uint8) if shared else np.empty(size, np.uint8)
        return self._memory


def _cuts(which: Ints, starts: Ints, ends: Ints) -> list[tuple[int, int, int]]:
    """These pieces of parts, (part, start, end) each; those that go on where the one before them ends are one."""
    first = np.flatnonzero(np.append(True, (which[1:] != which[:-1]) | (starts[1:] != ends[:-1])))
    last = np.append(first[1:], len(which)) - 1
    return [*zip(which[first].tolist(), starts[first].tolist(), ends[last].tolist(), strict=True)]


class _Part:
    """One batch, in the order of steps and slots: `key` is that of its rows, `sizes` how many values each has."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._order: Ints | None = None  # None: it came so
        step, slot = batch.step, batch.run_slot
        if not batch.ascends:
            order = np.lexsort((slot, step))
            self._order = order[np.append(ascending(step[order], slot[order]), True)]
            step, slot = step[self._order], slot[self._order]
        block = slot // SLOTS_A_BLOCK
        starts = np.flatnonzero(np.append(True, (step[1:] != step[:-1]) | (block[1:] != block[:-1])))
        self.sizes = np.diff(starts, append=len(step))
        self.key = np.empty((len(_KEY), len(starts)), np.int64)
        self.key[0], self.key[1], self.key[4] = batch.source.run_id, batch.source.id, batch.seq
        self.key[2], self.key[3] = block[starts], step[starts]
        self._slot = slot.astype(_SLOT)

    def column(self, name: str) -> Bytes:
        """The bytes of the slots' numbers or of a field's values; none where the batch does not have it."""
        column = self._slot if name == "slot" else self._batch.columns.get(name)
        if column is None:
            return np.empty(0, np.uint8)
        return _bytes(column if self._order is None or name == "slot" else column[self._order])


class _Layout:
    """One block in Native format, column by column into `memory`."""

    def __init__(self, memory: Bytes, columns: int, rows: int) -> None:
        self._memory = memory
        self._end = 0
        self._say([_number(columns), _number(rows)])

    def add(self, name: str, kind: str, data: Sequence[Bytes]) -> None:
        """Adds a column."""
        self._say([_text(name), _text(kind), *data])

    def done(self) -> memoryview:
        """The block's bytes."""
        return self._memory[: self._end].data

    def _say(self, data: Sequence[Bytes]) -> None:
        start, self._end = self._end, self._end + sum(map(len, data))
        np.concatenate(data, out=self._memory[start : self._end])


def rows_of(blocks: Iterable[pa.RecordBatch], fields: Sequence[str], most: int) -> Iterator[pa.RecordBatch]:
    """The rows that blocks of `stats_by_step` hold, as `row_schema(fields)` says, at most so many at a time.

    A block has source_id, step, slot, and the fields; its rows come by source, step, block of slots and seq. Of equal
    (source, step, slot) the last one is given.
    """
    held: list[pa.RecordBatch] = []  # until there are so many, and the last step cannot go on in the next block
    values = 0
    for block in blocks:
        held.append(block)
        values += len(block["slot"].flatten())
        if values >= most:
            together = _together(held)
            changes = np.flatnonzero(np.diff(together["source_id"]) | np.diff(together["step"]))
            last = int(changes[-1]) + 1 if len(changes) else 0
            yield from _rows_of(together.slice(0, last), fields, most)
            held = [together.slice(last)]
            values = len(held[0]["slot"].flatten()) if last else 0
    if held:
        yield from _rows_of(_together(held), fields, most)


def _together(blocks: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return blocks[0] if len(blocks) == 1 else pa.concat_batches(blocks)


def _rows_of(block: pa.RecordBatch, fields: Sequence[str], most: int) -> Iterator[pa.RecordBatch]:
    if not block.num_rows:
        return
    source, step = (np.asarray(block[name]) for name in ("source_id", "step"))
    sizes, slot = _sizes(block["slot"]), _values(block["slot"])
    which = np.repeat(np.cumsum(np.append(0, (np.diff(source) != 0) | (np.diff(step) != 0))), sizes)
    order = None
    if not ascending(which, slot).all():  # a row was sent again
        order = np.lexsort((slot, which))
        order = order[np.append(ascending(which[order], slot[order]), True)]
    layout = row_schema(fields)
    key = [np.repeat(source, sizes), np.repeat(step, sizes), slot.astype(np.int64)]
    columns = [pa.array(each if order is None else each[order]) for each in key]
    for name in fields:
        values, there = _values(block[name]), _sizes(block[name]) == sizes
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


def _bytes(column: Column) -> Bytes:
    return np.ascontiguousarray(column, column.dtype.newbyteorder("<")).view(np.uint8)


def _text(text: str) -> Bytes:
    data = np.frombuffer(text.encode(), np.uint8)
    return np.concatenate([_number(len(data)), data])


def _number(number: int) -> Bytes:
    """As ClickHouse writes lengths: seven bits a byte, the lowest first."""
    data = []
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return np.array([*data, number], np.uint8)
