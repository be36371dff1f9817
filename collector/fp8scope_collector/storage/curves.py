"""Answers about one slot over steps: its fields as curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fp8scope_collector.storage.cover import cover, read_slot
from fp8scope_collector.storage.history import owned_spans
from fp8scope_collector.storage.maps import choose_width, extent
from fp8scope_collector.storage.quantities import Floats, Ints, in_unit, source_of
from fp8scope_collector.storage.readmodels import Series
from fp8scope_collector.storage.rollups import LEVELS
from fp8scope_collector.storage.run_view import RunView

RAW_ROWS = 5_000  # a curve of more raw rows is made from rollups, with wider entries


def series(
    view: RunView, slot: int, fields: Sequence[str], *, first_step: int, last_step: int, max_points: int
) -> Series:
    """See `Reader.series`."""
    spans = owned_spans(view.lives, first_step, last_step)
    if not spans:
        none = np.empty(0)
        empty = none.astype(np.int64)
        return Series(empty, empty, empty, dict.fromkeys(fields, none), dict.fromkeys(fields, none))
    start, end = extent(spans)
    width = choose_width(view, spans, max_points, 1, RAW_ROWS)
    entries = _Entries(start // width, end // width - start // width + 1, width)
    low = {field: entries.empty() for field in fields}
    high = {field: entries.empty() for field in fields}
    found = cover(view.lives, spans, width)
    wanted: dict[str, list[tuple[str, bool]]] = {}
    for field in fields:
        source = source_of(field)
        wanted.setdefault(source.low, []).append((field, True))
        wanted.setdefault(source.high, []).append((field, False))
    limit: dict[int, float] = {}
    if "headroom" in fields and slot < view.slots:
        limit = {life: float(view.log2_max(life)[slot]) for life in {span.incarnation for span in spans}}
    own_steps = ("steps", "first", "last")
    for group, name, bucket, values in read_slot(
        view.connection, view.run_id, found.buckets, [*own_steps, *wanted], slot
    ):
        steps = bucket * group.level
        if name in own_steps:
            for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                entries.note(name, group.level, step, value)
            continue
        for field, is_low in wanted[name]:
            own = values.astype(np.float64)
            target, extreme = (low, np.fmin) if is_low else (high, np.fmax)
            extreme.at(target[field], entries.of(steps), limit[group.incarnation] - own if field == "headroom" else own)
    names = list(dict.fromkeys(name for field in fields for name in source_of(field).fields))
    for rows in view.rows(found.raw, names, slots=[slot]):
        entry_of = entries.of(rows.step)
        entries.note_rows(rows.step)
        for field in fields:
            lows, highs = rows.values(field)
            np.fmin.at(low[field], entry_of, lows)
            np.fmax.at(high[field], entry_of, highs)
    for field in fields:
        low[field], high[field] = in_unit(field, low[field], high[field])
    count, first, last = entries.counts()
    there = count > 0
    return Series(
        first[there],
        last[there],
        count[there],
        {field: values[there] for field, values in low.items()},
        {field: values[there] for field, values in high.items()},
    )


class _Entries:
    """The entries of a curve, `width` steps each, and which recorded steps they stand for."""

    def __init__(self, first: int, count: int, width: int) -> None:
        self._first, self._count, self._width = first, count, width
        self._steps: list[Ints] = []  # recorded steps, one by one
        self._buckets: dict[tuple[int, int], dict[str, int]] = {}  # what buckets say, by level and first step

    def empty(self) -> Floats:
        """A value for each, none known."""
        return np.full(self._count, np.nan)

    def of(self, step: Any) -> Any:
        """The entry of a step, or of each of several."""
        return step // self._width - self._first

    def note(self, name: str, level: int, step: int, value: int) -> None:
        """What a part of the bucket that begins at `step` says of its steps."""
        known = self._buckets.setdefault((level, step), {"steps": 0, "first": level, "last": 0})
        if name == "steps":
            known[name] = known[name] | value if level == LEVELS[0] else known[name] + value
        else:
            known[name] = min(known[name], value) if name == "first" else max(known[name], value)

    def note_rows(self, step: Ints) -> None:
        """Steps of raw rows."""
        self._steps.append(np.unique(step))

    def counts(self) -> tuple[Ints, Ints, Ints]:
        """Of each entry how many recorded steps, the first and the last of them."""
        count = np.zeros(self._count, np.int64)
        first, last = np.full(self._count, 2**62, np.int64), np.full(self._count, -1, np.int64)
        for (level, step), known in self._buckets.items():
            if level == LEVELS[0]:
                self._steps.append(step + np.flatnonzero([known["steps"] >> bit & 1 for bit in range(level)]))
            elif known["steps"]:
                entry = self.of(step)
                count[entry] += known["steps"]
                first[entry] = min(first[entry], step + known["first"])
                last[entry] = max(last[entry], step + known["last"])
        if self._steps:
            steps = np.unique(np.concatenate(self._steps))
            entry = self.of(steps)
            count += np.bincount(entry, minlength=self._count)
            np.minimum.at(first, entry, steps)
            np.maximum.at(last, entry, steps)
        return count, first, last
