"""Reads a run as windows, in pieces whose size bounds the memory, one process life after another.

A replay reads from the start, the live engine goes on from a cursor. Steps that a resumed life rewrote are its
(docs/adr/0040), and each life is judged by its own recipes. Of a run that is still going on, only steps that all its
ranks have passed are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import sqlalchemy as sa

from fp8scope_collector.diagnosis.window import FIELDS_READ, LOOKBACK, Floats, Ints, ScalarSeries, Window
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import open_engine, open_stats
from fp8scope_collector.storage.history import Life, Span, lives_of, owned_spans
from fp8scope_collector.storage.reader import Reader, RunSummary
from fp8scope_collector.storage.readmodels import Slot
from fp8scope_collector.storage.stats_store import StatsStore

PIECE_ROWS = 512
PIECE_CELLS = PIECE_ROWS * 1680  # of all ranks: 70 MB of float64 fields
SNAPSHOT_ROWS = 20_000  # of one transaction, where it matters
GIVEN_UP_S = 86_400.0  # a run that is silent for so long is taken for dead


@dataclass(frozen=True)
class Cursor:
    """How far a reading has come: steps up to `step` are read, `rows` of them are recorded ones.

    `incarnation` is that of the newest of them, and `life_row` the rows before it began, or before what was read of it.
    """

    step: int = -1
    rows: int = 0
    incarnation: int = 0
    life_row: int = 0


@dataclass(frozen=True)
class RunRows:
    """The rows of a run in a database, to be read as windows. `ranks` None: of all ranks."""

    reader: Reader
    engine: sa.Engine
    store: StatsStore
    run_id: int
    slots: tuple[Slot, ...]
    ranks: tuple[int, ...] | None = None

    def pieces(self, *, to_step: int, after: Cursor = Cursor(), piece_rows: int | None = None) -> Iterator[Window]:
        """The rows of the steps above the cursor, up to `to_step`, as consecutive windows without context."""
        with self.engine.connect() as connection:
            lives = self._lives(connection)
            spans = owned_spans(lives, first_step=after.step + 1, last_step=to_step)
            if not spans or not self.slots:
                return
            walked = self._steps(connection, spans)
        rank_of = {life.source_id: life.rank for life in lives}
        ranks = self.ranks or tuple(sorted(set(rank_of.values())))
        fit = PIECE_CELLS // (len(ranks) * len(self.slots))
        rows = piece_rows or max(LOOKBACK // 4, min(PIECE_ROWS, fit))
        first_row, seen = after.rows, after.step
        for incarnation, group in groupby(walked, key=lambda step: step[1]):
            steps = np.array([step for step, _ in group], dtype=np.int64)
            slots = self._slots_of(incarnation)
            life_row = after.life_row if incarnation == after.incarnation else first_row
            for start in range(0, steps.size, rows):
                part = steps[start : start + rows]
                yield Window(
                    steps=part,
                    ranks=ranks,
                    slots=slots,
                    fields=self._fields(spans, rank_of, ranks, part),
                    scalars=self._scalars(seen, int(part[-1])),
                    first_row=first_row,
                    life_row=life_row,
                    incarnation=incarnation,
                )
                first_row, seen = first_row + part.size, int(part[-1])

    def steps(self, first_step: int, last_step: int) -> list[tuple[int, int]]:
        """The recorded steps in between, ascending, each with the newest incarnation that a rank recorded it in."""
        with self.engine.connect() as connection:
            spans = owned_spans(self._lives(connection), first_step=first_step, last_step=last_step)
            return self._steps(connection, spans) if spans else []

    def _lives(self, connection: sa.Connection) -> list[Life]:
        lives = lives_of(connection, self.run_id)
        return [life for life in lives if self.ranks is None or life.rank in self.ranks]

    def _steps(self, connection: sa.Connection, spans: list[Span]) -> list[tuple[int, int]]:
        """The recorded steps, ascending, each with the newest incarnation that a rank recorded it in."""
        incarnation_of = {span.source_id: span.incarnation for span in spans}
        newest: dict[int, int] = {}
        for source_id, step in self.store.steps(connection, spans):
            newest[step] = max(incarnation_of[source_id], newest.get(step, 0))
        return sorted(newest.items())

    def _slots_of(self, incarnation: int) -> tuple[Slot, ...]:
        """The slots as this incarnation quantised them."""
        recipe = schema.slot_recipe.c
        query = sa.select(recipe.slot, recipe.format, recipe.recipe, recipe.margin)
        query = query.where(recipe.run_id == self.run_id, recipe.incarnation == incarnation)
        with self.engine.connect() as connection:
            known = {row.slot: row for row in connection.execute(query)}
        return tuple(
            replace(slot, format=row.format, recipe=row.recipe, margin=row.margin) if row else slot
            for slot in self.slots
            for row in [known.get(slot.slot)]
        )

    def _fields(
        self,
        spans: list[Span],
        rank_of: Mapping[int, int],
        ranks: tuple[int, ...],
        steps: Ints,
    ) -> dict[str, Floats]:
        shape = (len(ranks), steps.size, len(self.slots))
        fields: dict[str, Floats] = {name: np.full(shape, np.nan) for name in FIELDS_READ}
        numbers = np.array([slot.slot for slot in self.slots])
        rank_at = {span.source_id: ranks.index(rank_of[span.source_id]) for span in spans}
        for some in self._readings(spans, steps):
            with self.engine.connect() as connection:
                for batch in self.store.rows(connection, some, FIELDS_READ):
                    sources, which = np.unique(batch["source_id"], return_inverse=True)
                    rank = np.array([rank_at[source_id] for source_id in sources.tolist()])[which]
                    at = (rank, np.searchsorted(steps, batch["step"]), np.searchsorted(numbers, batch["slot"]))
                    for name in FIELDS_READ:
                        fields[name][at] = batch[name].to_numpy(zero_copy_only=False)
        return fields

    def _readings(self, spans: list[Span], steps: Ints) -> Iterator[list[Span]]:
        """What is read in one transaction each: a few steps of a span, or everything."""
        at_once = max(1, SNAPSHOT_ROWS // len(self.slots)) if self.store.in_pieces else max(1, steps.size)
        parts: list[Span] = []
        for span in spans:
            own = steps[(steps >= span.first_step) & (steps <= span.last_step)]
            for start in range(0, own.size, at_once):
                some = own[start : start + at_once]
                parts.append(replace(span, first_step=int(some[0]), last_step=int(some[-1])))
        yield from ([part] for part in parts) if self.store.in_pieces else [parts]

    def _scalars(self, after: int, last: int) -> dict[str, ScalarSeries]:
        """The scalars of the steps in (after, last], one entry for each."""
        found = self.reader.scalars(self.run_id, first_step=after + 1, last_step=last, max_points=last - after)
        return {scalar.name: ScalarSeries(scalar.step, scalar.low) for scalar in found}


@dataclass(frozen=True)
class StoredRun:
    """A run in a database, as a command reads it: once, up to the step that all its ranks have passed."""

    summary: RunSummary
    rows: RunRows
    last_step: int
    silent_s: float = 0.0

    def pieces(self, *, piece_rows: int | None = None) -> Iterator[Window]:
        """The run's rows as consecutive windows without context; the last one knows of a silence that lasts."""
        pieces = self.rows.pieces(to_step=self.last_step, piece_rows=piece_rows)
        last = next(pieces, None)
        for piece in pieces:
            assert last is not None
            yield last
            last = piece
        if last is not None:
            yield replace(last, silent_s=self.silent_s)


def open_run(url: str, ref: str, *, clock: Callable[[], int] = time.time_ns) -> StoredRun:
    """The run called `ref` in the database `url`.

    Raises:
        StorageError: the database is missing, empty, unreachable or of another version.
        RunNotFound: no run, or more than one, is called so.
    """
    reader = Reader(url, clock=clock)
    summary = reader.run(ref)
    progress = reader.progress(summary.id)
    last_step = progress.settled_step if progress else -1
    silent_s = (clock() - summary.last_seen_unix_ns) / 1e9 if summary.state == "stale" else 0.0
    engine = open_engine(url, read_only=True)
    rows = RunRows(reader, engine, open_stats(engine), summary.id, tuple(reader.slots(summary.id)))
    return StoredRun(summary, rows, last_step, silent_s if silent_s <= GIVEN_UP_S else 0.0)
