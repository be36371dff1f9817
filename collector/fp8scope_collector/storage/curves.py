"""Answers about one slot over steps: its fields as curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fp8scope_collector.storage.cover import Buckets, cover, read_slot
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
    for group in found.buckets:
        own = read_slot(view.connection, view.run_id, group, [*_Entries.arrays_of(group), *wanted], slot)
        entries.note_buckets(group, own)
        for name, (bucket, values) in own.items():
            for field, is_low in wanted.get(name, ()):
                exact = values.astype(np.float64)
                if field == "headroom":
                    exact = view.log2_max(group.incarnation, slot)[slot] - exact
                target, extreme = (low, np.fmin) if is_low else (high, np.fmax)
                extreme.at(target[field], entries.of(bucket * group.level), exact)
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
        self._steps: list[Ints] = []  # recorded steps, one by one, some of them more than once
        self._known: list[tuple[Ints, Ints, Ints, Ints]] = []  # by bucket: how many steps, their first and their last

    def empty(self) -> Floats:
        """A value for each, none known."""
        return np.full(self._count, np.nan)

    def of(self, step: Any) -> Any:
        """The entry of a step, or of each of several."""
        return step // self._width - self._first

    @staticmethod
    def arrays_of(group: Buckets) -> tuple[str, ...]:
        """What buckets say of their steps: which there are, or else how many, the first and the last."""
        return ("steps",) if group.level == LEVELS[0] else ("steps", "first", "last")

    def note_buckets(self, group: Buckets, arrays: dict[str, tuple[Ints, Any]]) -> None:
        """Steps of buckets, as `read_slot` has them; of several parts each says which of the steps it adds."""
        if "steps" not in arrays:
            return
        bucket, steps = arrays["steps"]
        start = bucket * group.level
        if group.level == LEVELS[0]:
            offsets = np.arange(group.level)
            self._steps.append((start[:, None] + offsets)[(steps[:, None] >> offsets & 1) == 1])
        else:
            there = steps > 0
            first, last = (start[there] + arrays[name][1][there].astype(np.int64) for name in ("first", "last"))
            self._known.append((self.of(start[there]), steps[there].astype(np.int64), first, last))

    def note_rows(self, step: Ints) -> None:
        """Steps of raw rows."""
        self._steps.append(step)

    def counts(self) -> tuple[Ints, Ints, Ints]:
        """Of each entry how many recorded steps, the first and the last of them."""
        steps = np.unique(np.concatenate([np.empty(0, np.int64), *self._steps]))
        known = [*self._known, (self.of(steps), np.ones_like(steps), steps, steps)]
        count = np.zeros(self._count, np.int64)
        first, last = np.full(self._count, 2**62, np.int64), np.full(self._count, -1, np.int64)
        for entry, own, own_first, own_last in known:
            np.add.at(count, entry, own)
            np.minimum.at(first, entry, own_first)
            np.maximum.at(last, entry, own_last)
        return count, first, last
