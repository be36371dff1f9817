"""Reads a stored run as windows: all ranks, in pieces whose size bounds the memory, one process life after another.

Steps that a resumed life rewrote are its (docs/adr/0040), and each life is judged by its own recipes. Of a run that is
still going on, only steps that all its ranks have passed are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import sqlalchemy as sa

from fp8scope_collector.diagnosis.window import FIELDS_READ, LOOKBACK, Floats, Ints, ScalarSeries, Window
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import open_engine, open_stats
from fp8scope_collector.storage.history import Span, lives_of, owned_spans
from fp8scope_collector.storage.reader import Reader, RunSummary
from fp8scope_collector.storage.readmodels import Slot
from fp8scope_collector.storage.stats_store import StatsStore

PIECE_ROWS = 512
PIECE_CELLS = PIECE_ROWS * 1680  # of all ranks: 70 MB of float64 fields


@dataclass(frozen=True)
class StoredRun:
    """A run in a database, to be read as `pieces`."""

    reader: Reader
    summary: RunSummary
    engine: sa.Engine
    store: StatsStore
    slots: tuple[Slot, ...]
    last_step: int

    def pieces(self, *, piece_rows: int | None = None) -> Iterator[Window]:
        """The run's rows as consecutive windows without context."""
        with self.engine.connect() as connection:
            lives = lives_of(connection, self.summary.id)
            spans = owned_spans(lives, last_step=self.last_step)
            if not spans or not self.slots:
                return
            rank_of = {life.source_id: life.rank for life in lives}
            ranks = tuple(sorted({rank_of[span.source_id] for span in spans}))
            fit = PIECE_CELLS // (len(ranks) * len(self.slots))
            rows = piece_rows or max(LOOKBACK // 4, min(PIECE_ROWS, fit))
            first_row, after = 0, -1
            walked = self._steps(connection, spans)
            for incarnation, group in groupby(walked, key=lambda step: step[1]):
                steps = np.array([step for step, _ in group], dtype=np.int64)
                slots = self._slots_of(connection, incarnation)
                life_row = first_row
                for start in range(0, steps.size, rows):
                    part = steps[start : start + rows]
                    yield Window(
                        steps=part,
                        ranks=ranks,
                        slots=slots,
                        fields=self._fields(connection, spans, rank_of, ranks, part),
                        scalars=self._scalars(after, int(part[-1])),
                        first_row=first_row,
                        life_row=life_row,
                    )
                    first_row, after = first_row + part.size, int(part[-1])

    def _steps(self, connection: sa.Connection, spans: list[Span]) -> list[tuple[int, int]]:
        """The recorded steps, ascending, each with the newest incarnation that a rank recorded it in."""
        incarnation_of = {span.source_id: span.incarnation for span in spans}
        newest: dict[int, int] = {}
        for source_id, step in self.store.steps(connection, spans):
            newest[step] = max(incarnation_of[source_id], newest.get(step, 0))
        return sorted(newest.items())

    def _slots_of(self, connection: sa.Connection, incarnation: int) -> tuple[Slot, ...]:
        """The slots as this incarnation quantised them."""
        recipe = schema.slot_recipe.c
        query = sa.select(recipe.slot, recipe.format, recipe.recipe, recipe.margin)
        query = query.where(recipe.run_id == self.summary.id, recipe.incarnation == incarnation)
        known = {row.slot: row for row in connection.execute(query)}
        return tuple(
            replace(slot, format=row.format, recipe=row.recipe, margin=row.margin) if row else slot
            for slot in self.slots
            for row in [known.get(slot.slot)]
        )

    def _fields(
        self,
        connection: sa.Connection,
        spans: list[Span],
        rank_of: Mapping[int, int],
        ranks: tuple[int, ...],
        steps: Ints,
    ) -> dict[str, Floats]:
        shape = (len(ranks), steps.size, len(self.slots))
        fields: dict[str, Floats] = {name: np.full(shape, np.nan) for name in FIELDS_READ}
        numbers = np.array([slot.slot for slot in self.slots])
        for span in spans:
            first, last = max(span.first_step, int(steps[0])), min(span.last_step, int(steps[-1]))
            if first > last:
                continue
            rank = ranks.index(rank_of[span.source_id])
            part = replace(span, first_step=first, last_step=last)
            for batch in self.store.rows(connection, [part], FIELDS_READ):
                at = (rank, np.searchsorted(steps, batch["step"]), np.searchsorted(numbers, batch["slot"]))
                for name in FIELDS_READ:
                    fields[name][at] = batch[name].to_numpy(zero_copy_only=False)
        return fields

    def _scalars(self, after: int, last: int) -> dict[str, ScalarSeries]:
        """The scalars of the steps in (after, last], one entry for each."""
        found = self.reader.scalars(self.summary.id, first_step=after + 1, last_step=last, max_points=last - after)
        return {scalar.name: ScalarSeries(scalar.step, scalar.low) for scalar in found}


def open_run(url: str, ref: str) -> StoredRun:
    """The run called `ref` in the database `url`.

    Raises:
        StorageError: the database is missing, empty, unreachable or of another version.
        RunNotFound: no run, or more than one, is called so.
    """
    reader = Reader(url)
    summary = reader.run(ref)
    progress = reader.progress(summary.id)
    last_step = progress.settled_step if progress else -1
    engine = open_engine(url, read_only=True)
    return StoredRun(reader, summary, engine, open_stats(None, engine), tuple(reader.slots(summary.id)), last_step)
