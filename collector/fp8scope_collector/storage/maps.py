"""Answers about all slots of a run: heat maps, and which slots are worst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fp8scope_collector.storage.cover import cover, read_buckets
from fp8scope_collector.storage.history import Span, owned_spans
from fp8scope_collector.storage.quantities import Floats, Ints, Quantity, field_of, in_unit, source_of
from fp8scope_collector.storage.readmodels import HeatMap
from fp8scope_collector.storage.rollups import LEVELS, place
from fp8scope_collector.storage.run_view import RunView

RAW_ROWS = 64_000  # a map of more raw rows is made from rollups, in wider columns


def heatmaps(
    view: RunView,
    quantities: Sequence[Quantity],
    slots: Ints,
    *,
    first_step: int,
    last_step: int,
    max_columns: int,
    width: int | None,
) -> list[HeatMap]:
    """See `Reader.heatmaps`; `slots` are the numbers of the slots to show."""
    fields = [field_of(quantity) for quantity in quantities]
    spans = owned_spans(view.lives, first_step, last_step)
    if not spans or not slots.size:
        nothing = np.full((2, slots.size, 0), np.nan)
        return [HeatMap(quantity, width or 1, 0, slots, *nothing) for quantity in quantities]
    start, end = extent(spans)
    if width is None:
        width = choose_width(view, spans, max_columns, view.slots, RAW_ROWS)
    first_column = start // width
    shape = (end // width - first_column + 1, view.slots)
    low = {field: np.full(shape, np.nan) for field in fields}
    high = {field: np.full(shape, np.nan) for field in fields}
    found = cover(view.lives, spans, width)
    wanted: dict[str, list[tuple[str, bool]]] = {}  # by array: which fields take it, as their low
    for field in low:
        source = source_of(field)
        wanted.setdefault(source.low, []).append((field, True))
        wanted.setdefault(source.high, []).append((field, False))
    for part in read_buckets(view.connection, view.run_id, found.buckets, list(wanted)):
        column, there = part.bucket * part.level // width - first_column, slice(0, len(part.values))
        for field, is_low in wanted[part.name]:
            values = part.values
            if field == "headroom":
                values = view.log2_max(part.incarnation)[there] - values
            target, extreme = (low, np.fmin) if is_low else (high, np.fmax)
            extreme(target[field][column, there], values, out=target[field][column, there])
    for rows in view.rows(found.raw, _fields_of(low)):
        cell = (rows.step // width - first_column) * view.slots + rows.slot
        for field in low:
            lows, highs = rows.values(field)
            np.fmin.at(low[field].reshape(-1), cell, lows)
            np.fmax.at(high[field].reshape(-1), cell, highs)
    maps = []
    for quantity, field in zip(quantities, fields, strict=True):
        lows, highs = low[field][:, slots].T, high[field][:, slots].T
        lows, highs = in_unit(field, lows, highs)
        maps.append(HeatMap(quantity, width, first_column, slots, lows, highs))
    return maps


class Extremes:
    """The lowest and the highest value of each slot in a range of steps, in the field's unit, and where they were.

    `low_at` and `high_at` are (step, rank), int64 [2, slots]; `last` the last step that had the slot.
    """

    def __init__(self, view: RunView, field: str, first_step: int, last_step: int) -> None:
        count = view.slots
        self.low, self.high = np.full(count, np.nan), np.full(count, np.nan)
        self.low_at, self.high_at = np.full((2, count), -1, np.int64), np.full((2, count), -1, np.int64)
        self.last = np.full(count, -1, np.int64)
        found = cover(view.lives, owned_spans(view.lives, first_step, last_step), LEVELS[-1])
        source = source_of(field)
        names = [name + of for name in (source.low, source.high) for of in ("", "_at")]
        parts: dict[tuple[int, int, int], dict[str, Any]] = {}
        for stored in read_buckets(view.connection, view.run_id, found.buckets, [*names, "last"]):
            key = (stored.incarnation, stored.level, stored.bucket)
            if stored.name in (before := parts.setdefault(key, {})):  # another writer's part: take in what there is
                self._take_bucket(view, field, key, parts.pop(key), names)
                before = parts.setdefault(key, {})
            before[stored.name] = stored.values
        for key, arrays in parts.items():
            self._take_bucket(view, field, key, arrays, names)
        for rows in view.rows(found.raw, source.fields):
            lows, highs = rows.values(field)
            at = np.stack([rows.step, rows.rank])
            np.maximum.at(self.last, rows.slot, rows.step)
            for values, sign in ((lows, 1), (-highs, -1)):
                least = np.full(count, np.nan)
                np.fmin.at(least, rows.slot, values)
                equal = np.flatnonzero(values == least[rows.slot])
                order = equal[np.lexsort((at[1, equal], at[0, equal], rows.slot[equal]))]
                first = order[np.flatnonzero(np.diff(rows.slot[order], prepend=-1))]
                self._take(rows.slot[first], sign * values[first], at[:, first], is_low=sign == 1)
        self.low, self.high = in_unit(field, self.low, self.high)

    def _take_bucket(
        self, view: RunView, field: str, key: tuple[int, int, int], arrays: dict[str, Any], names: Sequence[str]
    ) -> None:
        incarnation, level, bucket = key
        slot = np.arange(max(len(array) for array in arrays.values()))
        if (last := arrays.get("last")) is not None:
            there = np.flatnonzero(self._rows_there(last, arrays))
            self.last[there] = np.maximum(self.last[there], last[there].astype(np.int64) + bucket * level)
        for is_low, (name, name_at) in ((True, names[:2]), (False, names[2:])):
            if name not in arrays:
                continue
            values = arrays[name].astype(np.float64)
            if field == "headroom":
                values = view.log2_max(incarnation)[: len(values)] - values
            steps, ranks = place(arrays[name_at])
            self._take(slot[: len(values)], values, np.stack([steps + bucket * level, ranks]), is_low=is_low)

    def _rows_there(self, last: Any, arrays: dict[str, Any]) -> Any:
        """Slots that the bucket has a value of (`last` is 0 both for its first step and for no row at all)."""
        there = last > 0
        for name, values in arrays.items():
            if name.endswith((".low", ".high")):
                there[: len(values)] |= ~np.isnan(values)
        return there

    def _take(self, slot: Ints, values: Floats, at: Ints, *, is_low: bool) -> None:
        """Takes over what is more extreme, or as extreme and earlier."""
        target, target_at = (self.low, self.low_at) if is_low else (self.high, self.high_at)
        sign = 1 if is_low else -1
        before, before_at = sign * target[slot], target_at[:, slot]
        earlier = (at[0] < before_at[0]) | ((at[0] == before_at[0]) & (at[1] < before_at[1]))
        better = (
            (sign * values < before) | (np.isnan(before) & ~np.isnan(values)) | ((sign * values == before) & earlier)
        )
        target[slot[better]] = values[better]
        target_at[:, slot[better]] = at[:, better]


def column_width(first_step: int, last_step: int, max_columns: int, stride: int) -> int:
    """The smallest power of two of steps, not below `stride`, that needs at most `max_columns` columns."""
    width = 1
    while width < stride or last_step // width - first_step // width + 1 > max_columns:
        width *= 2
    return width


def extent(spans: Sequence[Span]) -> tuple[int, int]:
    """The first and the last step of spans."""
    return min(span.first_step for span in spans), max(span.last_step for span in spans)


def choose_width(view: RunView, spans: Sequence[Span], most: int, slots: int, raw_rows: int) -> int:
    """The width of at most `most` columns; not so narrow that it takes more than `raw_rows` raw rows of `slots`."""
    width = column_width(*extent(spans), most, view.stride)
    rows = sum((span.last_step - span.first_step) // view.stride + 1 for span in spans) * slots
    if width < LEVELS[0] and rows > raw_rows and cover(view.lives, spans, LEVELS[0]).buckets:
        return LEVELS[0]
    return width


def _fields_of(fields: Sequence[str] | dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for field in fields for name in source_of(field).fields))
