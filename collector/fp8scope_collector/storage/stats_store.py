"""Where statistics are kept, behind one protocol: in the database of everything else, or in one of their own.

Runs, sources, slots, scalars, findings, tokens and rollups are always in the relational database. What grows with every
tensor at every step can be elsewhere: a `StatsStore` writes and reads it by sources, steps and slots as values, so that
no query has to join two databases. tests/collector/conformance is what each one passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import sqlalchemy as sa

from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch
from fp8scope_collector.storage.history import Span

_ARROW = {"float32": pa.float32(), "float64": pa.float64(), "uint64": pa.uint64()}


class StorageError(Exception):
    """The database cannot be used; the text says why and what to do."""


@dataclass(frozen=True)
class Pace:
    """How a store likes to be written to."""

    group_rows: int = 65_536  # rows of one write, at most
    rows_under_way: int = 98_304  # of agents that have more to send: one group is written while the next gathers
    under_way_s: float = 0.35  # and no more of them than it takes in so many seconds
    window: int = 8  # batches that one agent may have unacknowledged
    pause_s: float = 0.0  # after a small write, while the next one gathers
    rollup_rows: int = 262_144  # in memory, after which rollups are written: until then readers read these rows raw


class StatsStore(Protocol):
    """Raw statistics of all runs. A row is one slot at one step of one source.

    `connection` is the relational database's, in the transaction of the caller. A store in that database uses it; one
    of its own writes at once and durably, before the transaction commits, and therefore may already hold what a
    transaction that failed brings again: it writes each batch once, told by (source, seq).
    """

    pace: Pace
    in_pieces: bool  # whether who reads much should take a little at a time, so that writers do not wait

    @property
    def backup_hint(self) -> str | None:
        """How to copy it, in words; None where a copy of the relational database has it."""
        ...

    def migrate(self) -> None:
        """Creates or upgrades tables that the relational database's migrations do not know; others do nothing."""
        ...

    def offer(self) -> None:
        """Lets other processes read until `close`, where what `migrate` has opened is this one's alone."""
        ...

    def size_bytes(self) -> int:
        """What it takes on disk beside the relational database; 0 where it is in that."""
        ...

    def write(
        self, connection: sa.Connection, batches: Sequence[Batch], meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Writes the batches' rows. A (step, slot) that its source has sent before is replaced.

        They are sorted by (source, seq) and above what the ledger says is committed; the sources' rows are locked.
        A store that waits for others to write calls `meanwhile`, once and in the caller's thread, in that time.
        """
        ...

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Does in advance what of writing these batches, sorted so, needs no database; others may come instead."""
        ...

    def delete(self, connection: sa.Connection, source_ids: Sequence[int]) -> None:
        """Removes everything of these sources."""
        ...

    def prune(self, connection: sa.Connection, source_id: int, below_step: int) -> int:
        """Removes the source's rows of the steps below `below_step`; returns how many those were."""
        ...

    def last_steps(self, connection: sa.Connection, source_id: int, count: int) -> list[int]:
        """The newest `count` recorded steps of a source, descending; a few seeks."""
        ...

    def steps(self, connection: sa.Connection, spans: Sequence[Span]) -> list[tuple[int, int]]:
        """The recorded steps of the spans as (source id, step), without reading every row."""
        ...

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
        """The spans' rows, one span after another, each ordered by step and slot, as `row_schema(fields)` says.

        No batch has more than `batch_rows`, and memory does not grow with their number. With `slots` only theirs, a
        few, which costs by them and not by all the slots of those steps; then also with `every` above 1: of each
        stretch of so many steps (0 to every - 1, and so on) only the first that the source has in the span.
        """
        ...

    def close(self) -> None:
        """Closes what it has opened; it opens it again if it is used again."""
        ...


def row_schema(fields: Sequence[str]) -> pa.Schema:
    """The layout of `StatsStore.rows`: source_id, step, slot, then the fields; null is NaN or absent."""
    types = {field.name: _ARROW[field.dtype] for field in FIELDS}
    key = [(name, pa.int64()) for name in ("source_id", "step", "slot")]
    return pa.schema([*key, *((name, types[name]) for name in fields)])
