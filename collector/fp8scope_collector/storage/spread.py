"""How a slot differs over the ranks, and how its magnitudes were distributed."""

from __future__ import annotations

from typing import Any

import numpy as np

from fp8scope_collector.storage import samples
from fp8scope_collector.storage.cover import cover, read_buckets, read_slot
from fp8scope_collector.storage.curves import RAW_ROWS
from fp8scope_collector.storage.history import LAST_STEP, owned_spans
from fp8scope_collector.storage.maps import choose_width, column_width, extent
from fp8scope_collector.storage.quantities import Floats, Ints, in_unit, source_of
from fp8scope_collector.storage.readmodels import Histograms, Ranks, Spread
from fp8scope_collector.storage.rollups import BINS_PER_OCTAVE, bins_of, place
from fp8scope_collector.storage.run_view import RunView

BINS = 256
RANK_ROWS = 16_384  # what one answer about ranks reads at most: with more ranks it has fewer columns
MEDIAN_ERROR = 2 ** (0.5 / BINS_PER_OCTAVE) - 1  # half a bin: 9 %


def spread(view: RunView, slot: int, field: str, *, first_step: int, last_step: int, max_points: int) -> Spread:
    """See `Reader.spread`."""
    spans = owned_spans(view.lives, first_step, last_step)
    width = choose_width(view, spans, max_points, 1, RAW_ROWS) if spans else 1
    found = cover(view.lives, spans, width)
    source = source_of(field)
    names = list(dict.fromkeys(name + of for name in (source.low, source.high) for of in ("", "_at")))
    low, high = _Extremes(1), _Extremes(-1)
    for group in found.buckets:
        arrays = read_slot(view.connection, view.run_id, group, names, slot)
        for extremes, name in ((low, source.low), (high, source.high)):
            if name in arrays:
                bucket, own = arrays[name]
                values = own.astype(np.float64)
                if field == "headroom":
                    values = view.log2_max(group.incarnation, slot)[slot] - values
                step, rank = place(arrays[f"{name}_at"][1])
                extremes.add(bucket * group.level // width, values, bucket * group.level + step, rank)
    raw: list[tuple[Ints, Floats]] = []
    for rows in view.rows(found.raw, source.fields, slots=[slot]):
        entry_of = rows.step // width
        lows, highs = rows.values(field)
        low.add(entry_of, lows, rows.step, rows.rank)
        high.add(entry_of, highs, rows.step, rows.rank)
        raw.append((entry_of, lows))
    entry, lowest, low_step, low_rank = low.found()
    _, highest, high_step, high_rank = high.found()
    median, error = np.full(len(entry), np.nan), 0.0
    if not found.buckets:
        for i, number in enumerate(entry.tolist()):
            median[i] = np.nanmedian(np.concatenate([own[where == number] for where, own in raw]))
    elif field == "amax":
        index = {number: i for i, number in enumerate(entry.tolist())}
        median, error = _binned_medians(view, found.buckets, slot, width, index, raw), MEDIAN_ERROR
    if field == "scale_exp2":
        median, _ = in_unit(field, median, median)
    lowest, highest = in_unit(field, lowest, highest)
    first = entry * width
    return Spread(first, first + width - 1, lowest, low_rank, low_step, highest, high_rank, high_step, median, error)


class _Extremes:
    """Of each entry the lowest (sign 1) or highest (sign -1) value, its earliest step, and then the lowest rank."""

    def __init__(self, sign: int) -> None:
        self._sign = sign
        self._parts: list[Floats] = [np.empty((4, 0))]

    def add(self, entry: Ints, value: Floats, step: Ints, rank: Ints) -> None:
        """Takes in values, NaN for none."""
        self._parts.append(np.stack([entry, value, step, rank])[:, ~np.isnan(value)])

    def found(self) -> tuple[Ints, Floats, Ints, Ints]:
        """Entries that have a value, ascending; the values, their steps and ranks."""
        entry, value, step, rank = np.concatenate(self._parts, axis=1)
        order = np.lexsort((rank, step, self._sign * value, entry))
        best = order[np.flatnonzero(np.diff(entry[order], prepend=-1))]
        return entry[best].astype(np.int64), value[best], step[best].astype(np.int64), rank[best].astype(np.int64)


def _binned_medians(
    view: RunView, buckets: Any, slot: int, width: int, index: dict[int, int], raw: list[tuple[Ints, Any]]
) -> Any:
    """The middle of the bin that holds the median of amax; zeros are below all bins."""
    found: dict[int, list[tuple[Any, Any]]] = {}
    for stored in read_buckets(view.connection, view.run_id, buckets, ["amax.bins"]):
        octave, counts = bins_of(stored.values.tobytes(), slot)
        found.setdefault(stored.bucket * stored.level // width, []).append((octave, counts))
    for entry_of, amax in raw:
        for number in np.unique(entry_of).tolist():
            own = amax[(entry_of == number) & (amax > 0) & np.isfinite(amax)]
            octave = np.floor(np.log2(own) * BINS_PER_OCTAVE) / BINS_PER_OCTAVE
            found.setdefault(number, []).append((octave, np.ones(len(own), np.int64)))
    medians = np.full(len(index), np.nan)
    for entry, parts in found.items():
        octave, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if entry in index and counts.sum():
            order = np.argsort(octave)
            middle = np.searchsorted(np.cumsum(counts[order]), (counts.sum() + 1) // 2)
            medians[index[entry]] = 2 ** (octave[order][middle] + 0.5 / BINS_PER_OCTAVE)
    return medians


def ranks(view: RunView, slot: int, field: str, *, first_step: int, last_step: int, max_columns: int) -> Ranks:
    """See `Reader.ranks`."""
    spans = sorted(owned_spans(view.lives, first_step, last_step), key=lambda span: -span.first_step)
    every = 1
    if spans:
        columns = max(1, min(max_columns, RANK_ROWS // len({view.rank_of[span.source_id] for span in spans})))
        every = column_width(*extent(spans), columns, view.stride)
    found = [
        np.stack([rows.rank, rows.step // every, *rows.values(field)])
        for rows in view.rows(spans, source_of(field).fields, slots=[slot], every=every)
    ]
    rank, column, low, high = np.concatenate([np.empty((4, 0)), *found], axis=1)
    numbers, row_of = np.unique(rank.astype(np.int64), return_inverse=True)
    entries, entry_of = np.unique(column.astype(np.int64), return_inverse=True)
    lows, highs = np.full((2, len(numbers), len(entries)), np.nan)
    lows[row_of, entry_of], highs[row_of, entry_of] = low, high  # of two lives in one column the earlier comes last
    return Ranks(numbers, entries * every, entries * every + every - 1, *in_unit(field, lows, highs))


def histograms(view: RunView, slot: int, *, first_step: int, last_step: int, max_columns: int) -> Histograms:
    """See `Reader.histograms`."""
    spans = owned_spans(view.lives, first_step, last_step)
    found = list(samples.histograms(view.connection, spans, slot)) if spans else []
    if not found:
        empty = np.empty(0, np.int64)
        return Histograms(empty, empty, empty, np.empty((BINS, 0), np.int64))
    step = np.array([one.step for one in found])
    steps = np.unique(step)
    width = 1 if len(steps) <= max_columns else column_width(*extent(spans), max_columns, 1)
    columns, column_of = np.unique(step // width, return_inverse=True)
    first, last = np.full(len(columns), LAST_STEP, np.int64), np.full(len(columns), -1, np.int64)
    np.minimum.at(first, column_of, step)
    np.maximum.at(last, column_of, step)
    counts = np.zeros((BINS, len(columns)), np.int64)
    for one, column in zip(found, column_of.tolist(), strict=True):
        counts[one.first_bin : one.first_bin + len(one.counts), column] += one.counts.astype(np.int64)
    return Histograms(first, last, np.bincount(column_of, minlength=len(columns)), counts)
