"""What is inserted into ClickHouse: the rows of some batches in the order of the table, as one block in Native format.

Native is how ClickHouse itself lays out a block, column by column, so the server copies instead of converting, and
rows that come in the table's order are not sorted again (docs/adr/0083).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch
from fp8scope_collector.storage.clickhouse_ddl import STEPS_A_BLOCK, TYPES

Ints: TypeAlias = npt.NDArray[np.int64]
Column: TypeAlias = npt.NDArray[np.generic]
Block: TypeAlias = tuple[list[str], memoryview]  # names of the columns, and the block

_WIDEST = 8  # bytes of a value


class Blocks:
    """Lays out one block after the other in the same memory: fresh pages for each cost more than the copying."""

    def __init__(self) -> None:
        self._block = np.empty(0, np.uint8)
        self._gathered = self._sorted = np.empty(0, np.uint8)

    def rows(self, batches: Sequence[Batch]) -> Block:
        """The block of `stats`, valid until the next; NaN and absent values are null.

        `batches` are sorted by (source, seq). Rows of equal keys stay as they came, so that the later one counts.
        """
        sizes = [batch.rows for batch in batches]
        run, source, seq = (
            np.repeat(np.array(values, np.int64), sizes)
            for values in zip(*((batch.source.run_id, batch.source.id, batch.seq) for batch in batches), strict=True)
        )
        step = np.concatenate([batch.step for batch in batches])
        slot = np.concatenate([batch.source.run_slot[batch.slot] for batch in batches])
        order = _order(run, source, step, slot)
        key = {"run_id": run, "source_id": source, "step": step, "slot": slot.astype(np.int32), "seq": seq}
        layout = _Layout(self._room(len(step)), len(key) + len(FIELDS), len(step))
        for name, column in key.items():
            layout.add(name, column if order is None else column[order])
        for field in FIELDS:
            parts = [batch.columns.get(field.name) for batch in batches]
            dtype = np.dtype(np.int64 if field.dtype == "uint64" else field.dtype)
            gathered, ordered = (memory.view(dtype)[: len(step)] for memory in (self._gathered, self._sorted))
            nothing = 0 if dtype.kind == "i" else np.nan
            np.concatenate(
                [
                    np.full(rows, nothing, dtype) if part is None else part
                    for part, rows in zip(parts, sizes, strict=True)
                ],
                out=gathered,
            )
            absent = None
            if dtype.kind == "i" and any(part is None for part in parts):
                absent = np.repeat([part is None for part in parts], sizes)
            if order is not None:
                np.take(gathered, order, out=ordered, mode="clip")
                gathered = ordered
                absent = absent[order] if absent is not None else None
            layout.add_nullable(field.name, gathered, absent)
        return [*key, *(field.name for field in FIELDS)], layout.done()

    def steps(self, batches: Sequence[Batch]) -> Block:
        """The block of `stats_step`, valid until the next: which steps the batches have, each once."""
        steps = {
            (batch.source.id, step, batch.source.run_id)
            for batch in batches
            for step in batch.step[np.flatnonzero(np.diff(batch.step, prepend=-1))].tolist()
        }
        source, step, run = np.array(sorted(steps), np.int64).T
        columns = {"run_id": run, "source_id": source, "step": step}
        layout = _Layout(self._room(len(step)), len(columns), len(step))
        for name, column in columns.items():
            layout.add(name, column)
        return [*columns], layout.done()

    def _room(self, rows: int) -> npt.NDArray[np.uint8]:
        if len(self._block) < (block_bytes := _block_bytes(rows)):
            self._block = np.empty(block_bytes, np.uint8)
            self._gathered, self._sorted = (np.empty(rows * _WIDEST, np.uint8) for _ in range(2))
        return self._block


class _Layout:
    """One block in Native format, column by column into `memory`."""

    def __init__(self, memory: npt.NDArray[np.uint8], columns: int, rows: int) -> None:
        self._memory = memory
        self._rows = rows
        self._end = 0
        self._say(_number(columns) + _number(rows))

    def add(self, name: str, column: Column) -> None:
        """Adds a column that has no nulls."""
        self._say(_text(name) + _text(TYPES[column.dtype.name]))
        self._say(column)

    def add_nullable(self, name: str, column: Column, absent: npt.NDArray[np.bool_] | None) -> None:
        """Adds a column whose value is null where it is NaN or `absent`."""
        self._say(_text(name) + _text(f"Nullable({TYPES[column.dtype.name]})"))
        null = self._memory[self._end : self._end + self._rows].view(np.bool_)
        self._end += self._rows
        if column.dtype.kind == "f":
            np.isnan(column, out=null)
        else:
            null[:] = False if absent is None else absent
        self._say(column)

    def done(self) -> memoryview:
        """The block's bytes."""
        return self._memory[: self._end].data

    def _say(self, data: bytes | Column) -> None:
        if isinstance(data, bytes):
            values = np.frombuffer(data, np.uint8)
        else:
            values = np.ascontiguousarray(data, data.dtype.newbyteorder("<")).view(np.uint8)
        self._memory[self._end : self._end + len(values)] = values
        self._end += len(values)


def _block_bytes(rows: int) -> int:
    """At least the bytes of a block of so many rows."""
    columns = 5 + len(FIELDS)
    return columns * (100 + rows * (_WIDEST + 1))


def _order(run: Ints, source: Ints, step: Ints, slot: Ints) -> Ints | None:
    """The permutation into (run, block of steps, slot, source, step); None: they are in that order.

    The least of the keys first, by sorts that keep the order of equals. What comes is sorted by source and, unless a
    source went back, by step.
    """
    keys: list[Column] = [slot, step // STEPS_A_BLOCK, run]
    if not ((source[1:] > source[:-1]) | ((source[1:] == source[:-1]) & (step[1:] >= step[:-1]))).all():
        keys = [step, source, *keys]
    order: Ints | None = None
    for key in keys:
        low, high = int(key.min()), int(key.max())
        if low == high:
            continue
        if high - low < 1 << 16:  # numpy sorts so short numbers by counting, several times as fast
            key = (key - low).astype(np.uint16)
        order = np.argsort(key, kind="stable") if order is None else order[np.argsort(key[order], kind="stable")]
    return order


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
