"""The rows before each row: shifts, counts, extremes and means along axis 1 of [ranks, steps, slots], NaN left out."""

from __future__ import annotations

import numpy as np

from fp8scope_collector.diagnosis.window import Bools, Floats, Ints


def before(values: Floats, rows: int) -> Floats:
    """`values` as they were `rows` rows earlier; NaN where there was no row yet."""
    shifted = np.full_like(values, np.nan)
    shifted[:, rows:] = values[:, : max(values.shape[1] - rows, 0)]
    return shifted


def counted(marks: Bools, rows: int) -> Ints:
    """How many of the last `rows` rows are marked, each row's own included."""
    if not marks.any():  # of most marks in most windows
        return np.zeros(marks.shape, dtype=np.int64)
    total = np.cumsum(marks, axis=1, dtype=np.int64)
    total[:, rows:] -= total[:, :-rows].copy()
    return total


def all_of_last(marks: Bools, rows: int) -> Bools:
    """Whether the last `rows` rows are all marked."""
    every = marks.copy()
    every[:, : rows - 1] = False
    if not every.any():
        return every
    for back in range(1, rows):
        every[:, back:] &= marks[:, : marks.shape[1] - back]
    return every


def largest(values: Floats, rows: int) -> Floats:
    """The largest of the last `rows` rows, a power of two."""
    reach = 1
    while reach < rows:
        extended = values.copy()
        np.fmax(values[:, reach:], values[:, :-reach], out=extended[:, reach:])
        values, reach = extended, 2 * reach
    assert reach == rows
    return values


def smallest(values: Floats, rows: int) -> Floats:
    """The smallest of the last `rows` rows, a power of two."""
    return -largest(-values, rows)


def mean(values: Floats, rows: int, *, at_least: int) -> Floats:
    """The mean of the last `rows` rows; NaN where fewer than `at_least` have a value.

    `rows` is a power of two. Rows are added in the same order wherever a window begins, so that the mean is the same to
    the last bit.
    """
    known = ~np.isnan(values)
    full: Ints = np.minimum(np.arange(1, values.shape[1] + 1), rows)[None, :, None]
    count = full if known.all() else counted(known, rows)
    total, reach = np.where(known, values, 0.0), 1
    while reach < rows:
        total[:, reach:] = total[:, reach:] + total[:, :-reach]
        reach *= 2
    assert reach == rows
    return np.where(count >= at_least, total / np.maximum(count, 1), np.nan)
