"""Histograms of slots, and extra numbers of them: what is taken now and then, kept in the relational database.

Also where raw rows are elsewhere: these are few, and a transaction with the ledger makes them exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from fp8scope_collector.messages import Batch
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.history import Span, history, steps_of
from fp8scope_collector.storage.registry import Insert


@dataclass(frozen=True, eq=False)
class StoredHistogram:
    """One slot at one step: `counts`, uint64, for the bins from `first_bin` on; all others are 0."""

    source_id: int
    step: int
    first_bin: int
    counts: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class StoredExtra:
    """A number of one slot at one step that `stats` has no column for."""

    source_id: int
    step: int
    name: str
    value: float


def write(connection: sa.Connection, insert: Insert, batches: Sequence[Batch]) -> None:
    """Writes the batches' histograms and extra numbers; what a source has sent before is replaced, by its key."""
    _write_histograms(connection, insert, batches)
    _write_extras(connection, insert, batches)


def histograms(connection: sa.Connection, spans: Sequence[Span], slot: int) -> Iterator[StoredHistogram]:
    """The slot's histograms by seeks on the steps that have some."""
    table = schema.histogram
    for span in spans:
        walk = steps_of(table, history([span]))
        here = sa.and_(table.c.source_id == walk.c.source_id, table.c.step == walk.c.step, table.c.slot == slot)
        query = sa.select(table).join_from(walk, table, here).where(walk.c.step <= walk.c.last_step)
        for row in connection.execute(query.order_by(table.c.step)):
            yield StoredHistogram(row.source_id, row.step, row.first_bin, np.frombuffer(row.counts, "<u8"))


def extras(connection: sa.Connection, spans: Sequence[Span], slot: int) -> Iterator[StoredExtra]:
    """The slot's extra numbers by seeks on the steps that have some."""
    table = schema.extra
    for span in spans:
        walk = steps_of(table, history([span]))
        here = sa.and_(table.c.source_id == walk.c.source_id, table.c.step == walk.c.step, table.c.slot == slot)
        query = sa.select(table).join_from(walk, table, here).where(walk.c.step <= walk.c.last_step)
        for row in connection.execute(query.order_by(table.c.step, table.c.name)):
            yield StoredExtra(row.source_id, row.step, row.name, math.nan if row.value is None else row.value)


def _write_histograms(connection: sa.Connection, insert: Insert, batches: Sequence[Batch]) -> None:
    rows: dict[tuple[int, int, int], tuple[int, bytes]] = {}
    for batch in batches:
        if (found := batch.histograms) is None:
            continue
        slots = batch.source.run_slot[found.slot].tolist()
        ends = np.cumsum(found.bins).tolist()
        for i, (step, slot, first_bin, end) in enumerate(
            zip(found.step.tolist(), slots, found.first_bin.tolist(), ends, strict=True)
        ):
            counts = found.counts[end - int(found.bins[i]) : end].astype("<u8").tobytes()
            rows[batch.source.id, step, slot] = first_bin, counts
    _upsert(connection, insert, schema.histogram, [(*key, *value) for key, value in rows.items()])


def _write_extras(connection: sa.Connection, insert: Insert, batches: Sequence[Batch]) -> None:
    rows = {
        (batch.source.id, step, int(batch.source.run_slot[slot]), name): None if math.isnan(value) else value
        for batch in batches
        for step, slot, name, value in batch.extras
    }
    _upsert(connection, insert, schema.extra, [(*key, value) for key, value in rows.items()])


def _upsert(connection: sa.Connection, insert: Insert, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
    """Inserts rows, in the order of the columns; one that is there is replaced."""
    if rows:
        statement = insert(table)
        key = [column.name for column in table.primary_key]
        values = {c.name: statement.excluded[c.name] for c in table.c if c.name not in key}
        names = [column.name for column in table.c]
        connection.execute(
            statement.on_conflict_do_update(index_elements=key, set_=values),
            [dict(zip(names, row, strict=True)) for row in rows],
        )
