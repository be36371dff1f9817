"""How a slot differs over the ranks, and how its magnitudes were distributed."""

from __future__ import annotations

from typing import Any

import numpy as np

from fp8scope_collector.storage import samples
from fp8scope_collector.storage.cover import cover, read_buckets
from fp8scope_collector.storage.curves import RAW_ROWS
from fp8scope_collector.storage.history import LAST_STEP, owned_spans
from fp8scope_collector.storage.maps import choose_width, column_width, extent
from fp8scope_collector.storage.quantities import Ints, in_unit, source_of
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
    names = [name + of for name in (source.low, source.high) for of in ("", "_at")]
    parts: dict[tuple[int, int, int], dict[str, list[Any]]] = {}
    for stored in read_buckets(view.connection, view.run_id, found.buckets, names, slot):
        key = (stored.incarnation, stored.level, stored.bucket)
        parts.setdefault(key, {}).setdefault(stored.name, []).append(stored.values[0])
    lows: list[tuple[int, float, int, int]] = []  # entry, value, step, rank
    highs: list[tuple[int, float, int, int]] = []
    for (incarnation, level, bucket), arrays in parts.items():
        for side, (name, name_at) in ((lows, names[:2]), (highs, names[2:])):
            for value, at in zip(arrays.get(name, []), arrays.get(name_at, []), strict=True):
                step, rank = (int(number) for number in place(at))
                own = float(view.log2_max(incarnation)[slot] - value) if field == "headroom" else float(value)
                side.append((bucket * level // width, own, bucket * level + step, rank))
    values: list[tuple[Ints, Any]] = []
    for rows in view.rows(found.raw, source.fields, slots=[slot]):
        entry_of = rows.step // width
        of_low, of_high = rows.values(field)
        for side, column in ((lows, of_low), (highs, of_high)):
            side += zip(entry_of.tolist(), column.tolist(), rows.step.tolist(), rows.rank.tolist(), strict=True)
        values.append((entry_of, of_low))
    entries = sorted({entry for entry, value, *_ in (*lows, *highs) if not np.isnan(value)})
    index = {entry: i for i, entry in enumerate(entries)}
    median, error = np.full(len(entries), np.nan), 0.0
    if not found.buckets:
        for entry, i in index.items():
            median[i] = np.nanmedian(np.concatenate([own[where == entry] for where, own in values]))
    elif field == "amax":
        median, error = _binned_medians(view, found.buckets, slot, width, index, values), MEDIAN_ERROR
    low, low_step, low_rank = _extremes(lows, index, 1)
    high, high_step, high_rank = _extremes(highs, index, -1)
    if field == "scale_exp2":
        median, _ = in_unit(field, median, median)
    low, high = in_unit(field, low, high)
    first = np.array(entries, np.int64) * width
    return Spread(first, first + width - 1, low, low_rank, low_step, high, high_rank, high_step, median, error)


def _extremes(found: list[tuple[int, float, int, int]], index: dict[int, int], sign: int) -> tuple[Any, Ints, Ints]:
    """Of each entry the most extreme value, the earliest step it was at, and then the lowest rank."""
    best: list[tuple[float, int, int]] = [(np.nan, -1, -1)] * len(index)
    known = [one for one in found if not np.isnan(one[1])]
    for entry, value, step, rank in sorted(known, key=lambda one: (one[0], sign * one[1], one[2], one[3])):
        if np.isnan(best[index[entry]][0]):
            best[index[entry]] = (value, step, rank)
    values, steps, ranks = ([one[part] for one in best] for part in range(3))
    return np.array(values, np.float64), np.array(steps, np.int64), np.array(ranks, np.int64)


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
