"""One run as an answer needs it: a connection, where its rows are, its lives, and the ranges of its slots' formats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import sqlalchemy as sa

from fp8core.formats import FORMATS
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.history import Life, Span, lives_of
from fp8scope_collector.storage.quantities import Floats, Ints, of_rows
from fp8scope_collector.storage.stats_store import StatsStore


@dataclass(frozen=True)
class RunView:
    """A run, read on one connection."""

    connection: sa.Connection
    store: StatsStore
    run_id: int

    @cached_property
    def lives(self) -> list[Life]:
        """The sources that have, or had, rows, by incarnation and rank."""
        return lives_of(self.connection, self.run_id)

    @cached_property
    def slots(self) -> int:
        """How many slots there are."""
        slot = schema.slot.c
        newest = self.connection.scalar(sa.select(sa.func.max(slot.slot)).where(slot.run_id == self.run_id))
        return 0 if newest is None else int(newest) + 1

    @cached_property
    def stride(self) -> int:
        """The usual distance between recorded steps: the median of the newest life's last sixteen."""
        steps = self.store.last_steps(self.connection, self.lives[-1].source_id, 17)
        return int(np.median(-np.diff(steps))) if len(steps) > 1 else 1

    @cached_property
    def incarnation_of(self) -> dict[int, int]:
        """By source id."""
        return {life.source_id: life.incarnation for life in self.lives}

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """By source id."""
        return {life.source_id: life.rank for life in self.lives}

    def log2_max(self, incarnation: int, slot: int | None = None) -> Floats:
        """log2 of the largest value of each slot's format in an incarnation; NaN where it is not known.

        With `slot` of this one only.
        """
        if (incarnation, slot) not in self._limits:
            recipe = schema.slot_recipe.c
            query = sa.select(recipe.slot, recipe.format).where(
                recipe.run_id == self.run_id, recipe.incarnation == incarnation
            )
            if slot is not None:
                query = query.where(recipe.slot == slot)
            limits = np.full(self.slots, np.nan)
            for number, name in self.connection.execute(query).all():
                limits[number] = _LIMITS.get(name, math.nan)
            self._limits[incarnation, slot] = limits
        return self._limits[incarnation, slot]

    @cached_property
    def _limits(self) -> dict[tuple[int, int | None], Floats]:
        return {}

    def rows(
        self, spans: Sequence[Span], fields: Sequence[str], *, slots: Sequence[int] | None = None, every: int = 1
    ) -> Iterator[Rows]:
        """The raw rows of the spans, piece by piece; `every` as in `StatsStore.rows`."""
        for batch in self.store.rows(self.connection, spans, fields, slots=slots, every=every):
            columns = {name: _floats(batch.column(name)) for name in fields}
            source_id, step, slot = (batch.column(name).to_numpy() for name in ("source_id", "step", "slot"))
            yield Rows(
                self, source_id, step, slot, columns, slots[0] if slots is not None and len(slots) == 1 else None
            )


@dataclass(frozen=True)
class Rows:
    """Some raw rows as columns; a field is float64, null NaN."""

    view: RunView
    source_id: Ints
    step: Ints
    slot: Ints
    columns: dict[str, Floats]
    only_slot: int | None = None

    def values(self, field: str) -> tuple[Floats, Floats]:
        """Low and high of each row, as `of_rows` says."""
        return of_rows(field, self.columns, self._log2_max() if field == "headroom" else None)

    @property
    def rank(self) -> Ints:
        """Of each row."""
        return self._of_source(self.view.rank_of)

    def _log2_max(self) -> Floats:
        """Of each row's format."""
        limits = np.empty(len(self.slot))
        incarnation = self._of_source(self.view.incarnation_of)
        for number in np.unique(incarnation).tolist():
            here = incarnation == number
            limits[here] = self.view.log2_max(number, self.only_slot)[self.slot[here]]
        return limits

    def _of_source(self, values: dict[int, int]) -> Ints:
        ids, inverse = np.unique(self.source_id, return_inverse=True)
        return np.array([values[number] for number in ids.tolist()], np.int64)[inverse]


_LIMITS = {name: math.log2(form.max) for name, form in FORMATS.items()}


def _floats(column: pa.Array) -> Floats:
    values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values.astype(np.float64, copy=False)
