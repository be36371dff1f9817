"""Keeps the rollups of the database equal to its raw rows: for the one thread that writes.

What a commit brings is first merged in memory, and every few seconds written to the buckets of all levels, in a
transaction that also moves `coverage.rolled_step`: rollups hold exactly the rows of a source's steps below it. So a
crash costs nothing but work: rows above are rolled up from what is stored (`catch_up`), and readers read them raw
meanwhile.

A source is only merged in memory as long as it is simple: this writer committed all its newest batches, and each row
came after the one before. Where that is not so (it moved between collectors, or went back and replaced rows) what is
pending of its incarnation is forgotten, to be caught up with, and buckets already written are made from raw rows anew.
Each writer has its own `part` of a bucket; only such a remaking joins them. See docs/adr/0035.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import sqlalchemy as sa

from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.history import Span, lives_of
from fp8scope_collector.storage.registry import Insert
from fp8scope_collector.storage.rollups import LEVELS, Rollup, Segment
from fp8scope_collector.storage.stats_store import StatsStore

FLUSH_S = 4.0
FLUSH_BYTES = 64 << 20
CATCH_UP_ROWS = 131_072  # of one transaction
_LOCK = 0x66703872  # "fp8r": on PostgreSQL, one writer at a time changes the rollups of a run
_NAMES = [field.name for field in FIELDS]
_AFTER_ALL_SLOTS = 1 << 40

Key = tuple[int, int]  # run id, incarnation
Bucket = tuple[int, int, int, int]  # run id, incarnation, level, bucket


@dataclass(frozen=True)
class Locked:
    """A source's row as the transaction found it, locked."""

    up_to_seq: int
    last_step: int | None
    first_step: int | None
    rolled_step: int


@dataclass
class _Simple:
    """A source whose rows above `rolled_step` are all in `_Pending`, as far as this writer's commits go."""

    key: Key
    up_to_seq: int
    rolled_step: int
    newest: tuple[int, int]  # step and slot of its last row

    @property
    def next_step(self) -> int:
        return max(self.rolled_step, self.newest[0] + 1)


@dataclass
class _Pending:
    since: float
    buckets: dict[int, Rollup] = field(default_factory=dict)  # of level 16
    rows: int = 0


@dataclass
class Change:
    """What a transaction means for the memory, if it commits."""

    flushed: list[Key] = field(default_factory=list)
    forgotten: set[Key] = field(default_factory=set)
    simple: dict[int, _Simple] = field(default_factory=dict)
    segments: list[tuple[Key, list[Segment]]] = field(default_factory=list)
    behind: set[int] = field(default_factory=set)


class Rolling:
    """What one writer has not written yet, and how it writes it. `part` tells the writers of one database apart."""

    def __init__(
        self, store: StatsStore, insert: Insert, part: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._insert = insert
        self._part = part
        self._clock = clock
        self._pending: dict[Key, _Pending] = {}
        self._unmerged: list[tuple[Key, list[Segment]]] = []  # counted in `_pending` already
        self._simple: dict[int, _Simple] = {}
        self._behind: set[int] = set()  # sources that `catch_up` has to look at

    def due(self, *, everything: bool = False) -> list[Key]:
        """What should be written with the next transaction."""
        rows = sum(pending.rows for pending in self._pending.values())
        size = sum(bucket.nbytes for pending in self._pending.values() for bucket in pending.buckets.values())
        if everything or rows >= self._store.pace.rollup_rows or size >= FLUSH_BYTES:
            return sorted(self._pending)
        before = self._clock() - FLUSH_S
        return sorted(key for key, pending in self._pending.items() if pending.since <= before)

    def sources_of(self, keys: Iterable[Key]) -> set[int]:
        """The sources that have to be locked for a flush of `keys`."""
        wanted = set(keys)
        return {source_id for source_id, simple in self._simple.items() if simple.key in wanted}

    def change(
        self,
        connection: sa.Connection,
        due: Sequence[Key],
        written: Sequence[Batch],
        locked: Mapping[int, Locked],
    ) -> Change:
        """Writes what is due, and what `written` (sorted by source and seq, its rows stored) changes in old buckets.

        Changes nothing here: `apply` does, once the transaction is committed.
        """
        self.merge()
        change = Change()
        rolled = {source_id: row.rolled_step for source_id, row in locked.items()}
        self._flush(connection, due, locked, rolled, change)
        remake: dict[Key, set[int]] = {}
        for source_id, group in groupby(written, key=lambda batch: batch.source.id):
            batches = list(group)
            self._take(batches, locked[source_id], rolled[source_id], change, remake)
        for key, buckets in sorted(remake.items()):
            self._remake(connection, key, buckets)
        return change

    def apply(self, change: Change) -> None:
        """The transaction is committed."""
        for key in {*change.flushed, *change.forgotten}:
            self._pending.pop(key, None)
            for source_id in self.sources_of([key]):
                if key in change.forgotten:
                    del self._simple[source_id]
                    self._behind.add(source_id)
                else:
                    self._simple[source_id].rolled_step = self._simple[source_id].next_step
        for source_id, simple in change.simple.items():
            if simple.key in change.forgotten:
                self._behind.add(source_id)
            else:
                self._simple[source_id] = simple
        for key, segments in change.segments:
            if key not in change.forgotten and segments:
                pending = self._pending.setdefault(key, _Pending(self._clock()))
                pending.rows += sum(len(segment.slot) for segment in segments)
                self._unmerged.append((key, segments))
        self._behind |= change.behind

    def merge(self) -> None:
        """Merges into memory what was applied: most of the work, which may wait until the next change."""
        unmerged, self._unmerged = self._unmerged, []
        for key, group in groupby(unmerged, key=lambda each: each[0]):
            _merge(self._pending[key].buckets, [segment for _, segments in group for segment in segments])

    def catch_up(self, connection: sa.Connection, lock: Callable[[Iterable[int]], Mapping[int, Locked]]) -> bool:
        """Rolls up raw rows of one source that is behind, at most some; False when none was."""
        while self._behind:
            source_id = min(self._behind)
            simple = self._simple.get(source_id)
            row = lock([source_id]).get(source_id)
            if simple or row is None or row.last_step is None or row.rolled_step > row.last_step:
                self._behind.discard(source_id)
                continue
            source = schema.source.c
            run_id, incarnation, rank = connection.execute(
                sa.select(source.run_id, source.incarnation, source.rank).where(source.id == source_id)
            ).one()
            span = Span(source_id, incarnation, row.rolled_step, row.last_step)
            segments: list[Segment] = []
            rows, next_step = 0, row.last_step + 1
            for segment in _segments_of(rank, self._store.rows(connection, [span], _NAMES)):
                if rows >= CATCH_UP_ROWS:
                    next_step = segment.step
                    break
                segments.append(segment)
                rows += len(segment.slot)
            deltas: dict[int, Rollup] = {}
            _merge(deltas, segments)
            self._write(connection, (run_id, incarnation), deltas)
            self._set_rolled(connection, {source_id: next_step})
            return True
        return False

    def look_behind(self, connection: sa.Connection, *, silent_since_unix_ns: int) -> None:
        """Finds sources that nobody rolls up: of a writer that is gone."""
        source, coverage = schema.source.c, schema.coverage.c
        query = sa.select(source.id).join_from(schema.source, schema.coverage, coverage.source_id == source.id)
        lagging = query.where(coverage.rolled_step <= source.last_step, source.last_seen_unix_ns < silent_since_unix_ns)
        self._behind |= set(connection.scalars(lagging)) - set(self._simple)

    # what a group of batches means

    def _take(
        self, batches: Sequence[Batch], row: Locked, rolled_step: int, change: Change, remake: dict[Key, set[int]]
    ) -> None:
        """Sorts out one source's batches: merged as they are, or left to `catch_up`, or a reason to remake buckets."""
        source = batches[0].source
        key = (source.run_id, source.incarnation)
        simple = self._simple.get(source.id)
        newest = (-1, -1) if row.last_step is None else (row.last_step, _AFTER_ALL_SLOTS)
        if simple and simple.up_to_seq == row.up_to_seq and simple.rolled_step == row.rolled_step:
            newest = simple.newest
        elif simple:
            change.forgotten.add(key)
            simple = None
        if not simple and rolled_step > (-1 if row.last_step is None else row.last_step):
            simple = _Simple(key, row.up_to_seq, rolled_step, newest)
        segments: list[Segment] = []
        for batch in batches:
            for segment in _sorted_segments(batch) if batch.rows else ():
                first, last = (segment.step, int(segment.slot[0])), (segment.step, int(segment.slot[-1]))
                if (
                    first <= newest
                    or segment.step < rolled_step
                    or not (batch.ascends or (np.diff(segment.slot) > 0).all())
                ):
                    change.forgotten.add(key)
                    if segment.step < rolled_step:
                        remake.setdefault(key, set()).add(segment.step // LEVELS[0])
                newest = max(newest, last)
                segments.append(segment)
        if simple:
            change.simple[source.id] = _Simple(key, batches[-1].seq, rolled_step, newest)
            change.segments.append((key, segments))
        elif segments:
            change.behind.add(source.id)

    # the tables

    def _flush(
        self,
        connection: sa.Connection,
        due: Sequence[Key],
        locked: Mapping[int, Locked],
        rolled: dict[int, int],
        change: Change,
    ) -> None:
        for key in due:
            sources = {source_id: self._simple[source_id] for source_id in self.sources_of([key])}
            if all(
                (row := locked.get(source_id))
                and (row.up_to_seq, row.rolled_step) == (simple.up_to_seq, simple.rolled_step)
                for source_id, simple in sources.items()
            ):
                self._write(connection, key, self._pending[key].buckets)
                moved = {source_id: simple.next_step for source_id, simple in sources.items()}
                self._set_rolled(connection, moved)
                rolled |= moved
                change.flushed.append(key)
            else:
                change.forgotten.add(key)

    def _write(self, connection: sa.Connection, key: Key, deltas: Mapping[int, Rollup]) -> None:
        """Merges `deltas`, by bucket of level 16, into this writer's part of all levels."""
        self._lock_run(connection, key)
        full: dict[Bucket, Rollup] = {}

        def bucket_of(level: int, bucket: int) -> Rollup:
            name = (*key, level, bucket)
            if name not in full:
                parts = self._load(connection, key, level, [bucket], part=self._part)
                full[name] = parts[0][1] if parts else Rollup(level)
            return full[name]

        for bucket, delta in sorted(deltas.items()):
            new_steps = np.bitwise_count(delta.steps & ~self._known_steps(connection, key, bucket, delta.slots))
            bucket_of(LEVELS[0], bucket).merge(delta)
            step = bucket * LEVELS[0]
            for level in LEVELS[1:]:
                bucket_of(level, step // level).merge(delta, step % level, new_steps)
        self._store_rollups(connection, full)

    def _known_steps(self, connection: sa.Connection, key: Key, bucket: int, slots: int) -> npt.NDArray[np.uint16]:
        """The steps that some part of a bucket of level 16 has, by slot, a bit for each."""
        rollup = schema.rollup.c
        query = sa.select(rollup.data).where(
            rollup.run_id == key[0],
            rollup.level == LEVELS[0],
            rollup.name == "steps",
            rollup.incarnation == key[1],
            rollup.bucket == bucket,
        )
        known = np.zeros(slots, np.uint16)
        for data in connection.scalars(query):
            part = np.frombuffer(data, "<u2")[:slots]
            known[: len(part)] |= part
        return known

    def _remake(self, connection: sa.Connection, key: Key, buckets: Iterable[int]) -> None:
        """Makes buckets of level 16, and those above them, from raw rows anew, as this writer's only part."""
        self._lock_run(connection, key)
        run_id, incarnation = key
        coverage = schema.coverage.c
        lives = [life for life in lives_of(connection, run_id) if life.incarnation == incarnation]
        rows = connection.execute(
            sa.select(coverage.source_id, coverage.rolled_step, coverage.pruned_step).where(
                coverage.source_id.in_([life.source_id for life in lives])
            )
        ).all()
        rolled = {row.source_id: row.rolled_step for row in rows}
        pruned = max(row.pruned_step for row in rows)
        full: dict[Bucket, Rollup] = {}
        lowest = LEVELS[0]
        for bucket in sorted(buckets):
            if bucket * lowest < pruned:  # its rows are not all there any more
                continue
            deltas = {bucket: Rollup(lowest)}
            for life in lives:
                last = min((bucket + 1) * lowest, rolled[life.source_id]) - 1
                span = Span(life.source_id, incarnation, bucket * lowest, last)
                _merge(deltas, _segments_of(life.rank, self._store.rows(connection, [span], _NAMES)))
            full[(*key, lowest, bucket)] = deltas[bucket]
        self._replace(connection, full)
        for below, level in pairwise(LEVELS):
            times = level // below
            above: dict[Bucket, Rollup] = {}
            for bucket in sorted({bucket * lowest // level for _, _, _, bucket in _of_level(full, lowest)}):
                made = Rollup(level)
                children = range(bucket * times, (bucket + 1) * times)
                for number, parts in groupby(self._load(connection, key, below, children), key=lambda part: part[0]):
                    child = Rollup(below)
                    for _, part in parts:
                        child.merge(part)
                    steps = np.bitwise_count(child.steps) if below == lowest else child.steps
                    made.merge(child, number * below % level, steps)
                above[(*key, level, bucket)] = made
            self._replace(connection, above)

    def _load(
        self, connection: sa.Connection, key: Key, level: int, buckets: Sequence[int], *, part: int | None = None
    ) -> list[tuple[int, Rollup]]:
        """The stored parts of the buckets, one writer's or all, as (bucket, part), ascending."""
        rollup = schema.rollup.c
        query = sa.select(rollup.bucket, rollup.part, rollup.name, rollup.data).where(
            rollup.run_id == key[0],
            rollup.level == level,
            rollup.name.in_(Rollup.NAMES),
            rollup.incarnation == key[1],
            rollup.bucket.between(buckets[0], buckets[-1]),
        )
        if part is not None:
            query = query.where(rollup.part == part)
        found: dict[tuple[int, int], dict[str, bytes]] = {}
        for bucket, number, name, data in connection.execute(query):
            found.setdefault((bucket, number), {})[name] = data
        return [(bucket, Rollup.load(level, arrays)) for (bucket, _), arrays in sorted(found.items())]

    def _replace(self, connection: sa.Connection, full: Mapping[Bucket, Rollup]) -> None:
        """Stores buckets in the place of all their parts."""
        rollup = schema.rollup.c
        for run_id, incarnation, level, bucket in full:
            connection.execute(
                sa.delete(schema.rollup).where(
                    rollup.run_id == run_id,
                    rollup.level == level,
                    rollup.name.in_(Rollup.NAMES),
                    rollup.incarnation == incarnation,
                    rollup.bucket == bucket,
                )
            )
        self._store_rollups(connection, full)

    def _store_rollups(self, connection: sa.Connection, full: Mapping[Bucket, Rollup]) -> None:
        rows = [
            {
                "run_id": run_id,
                "level": level,
                "name": name,
                "incarnation": incarnation,
                "bucket": bucket,
                "part": self._part,
                "data": data,
            }
            for (run_id, incarnation, level, bucket), rollup in full.items()
            if rollup.slots
            for name, data in rollup.dump().items()
        ]
        if rows:
            insert = self._insert(schema.rollup)
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["run_id", "level", "name", "incarnation", "bucket", "part"],
                    set_={"data": insert.excluded.data},
                ),
                rows,
            )

    def _set_rolled(self, connection: sa.Connection, rolled: Mapping[int, int]) -> None:
        if rolled:
            coverage = schema.coverage
            connection.execute(
                sa.update(coverage)
                .where(coverage.c.source_id == sa.bindparam("source"))
                .values(rolled_step=sa.bindparam("step", type_=sa.BigInteger)),
                [{"source": source_id, "step": step} for source_id, step in sorted(rolled.items())],
            )

    def _lock_run(self, connection: sa.Connection, key: Key) -> None:
        """One writer at a time changes a run's rollups; SQLite has one writer anyway."""
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK, key[0] % 2**31)))


def _merge(buckets: dict[int, Rollup], segments: Iterable[Segment]) -> None:
    """Adds segments to their buckets of level 16."""
    by_bucket: dict[int, list[Segment]] = {}
    for segment in segments:
        by_bucket.setdefault(segment.step // LEVELS[0], []).append(segment)
    for bucket, own in by_bucket.items():
        buckets.setdefault(bucket, Rollup(LEVELS[0])).add(own)


def _sorted_segments(batch: Batch) -> Iterator[Segment]:
    """The batch's rows, sorted by step and slot of the run, in pieces of one step; equal keys stay side by side."""
    step, slot, columns = batch.step, batch.run_slot, batch.columns
    if not batch.ascends:
        order = np.lexsort((slot, step))
        step, slot, columns = step[order], slot[order], {name: column[order] for name, column in columns.items()}
    yield from _split(batch.source.rank, step, slot, columns)


def _split(
    rank: int, step: npt.NDArray[np.int64], slot: npt.NDArray[np.int64], columns: Mapping[str, npt.NDArray[np.generic]]
) -> Iterator[Segment]:
    if step[0] == step[-1]:
        yield Segment(rank, int(step[0]), slot, columns)
        return
    ends = [*(np.flatnonzero(np.diff(step)) + 1).tolist(), len(step)]
    for start, end in zip([0, *ends], ends, strict=False):
        part = {name: column[start:end] for name, column in columns.items()}
        yield Segment(rank, int(step[start]), slot[start:end], part)


def _segments_of(rank: int, batches: Iterable[pa.RecordBatch]) -> Iterator[Segment]:
    """Stored rows, ordered by step and slot, in pieces of one step; a step may come in several."""
    for batch in batches:
        step, slot = (batch.column(name).to_numpy() for name in ("step", "slot"))
        yield from _split(rank, step, slot, {name: _numbers(batch.column(name)) for name in _NAMES})


def _numbers(column: pa.Array) -> npt.NDArray[Any]:
    """The values of a column; with nulls as NaN, counts that have some as float64."""
    values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _of_level(full: Mapping[Bucket, Rollup], level: int) -> list[Bucket]:
    return [bucket for bucket in full if bucket[2] == level]
