"""The rows before each row: shifts, counts, extremes and means along axis 1 of [ranks, steps, slots], NaN left out."""

from __future__ import annotations

import numpy as np

from fp8scope_collector.diagnosis.window import Bools, Floats, Ints


def before(values: Floats, rows: int) -> Floats:
    """`values` as they were `rows` rows earlier; NaN where there was no row yet."""
    shifted = np.empty_like(values)
    shifted[:, :rows] = np.nan
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
    every, reach = marks, 1
    while reach < rows and marks.any():
        back = min(reach, rows - reach)
        longer = every.copy()
        longer[:, back:] &= every[:, :-back]
        every, reach = longer, reach + back
    every = every.copy() if every is marks else every
    every[:, : rows - 1] = False
    return every


def largest(values: Floats, rows: int) -> Floats:
    """The largest of the last `rows` rows, a power of two."""
    reach = 1
    while reach < rows:
        extended = np.empty_like(values)
        extended[:, :reach] = values[:, :reach]
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
    total, reach = values if count is full else np.where(known, values, 0.0), 1
    while reach < rows:
        longer = np.empty_like(total)
        longer[:, :reach] = total[:, :reach]
        np.add(total[:, reach:], total[:, :-reach], out=longer[:, reach:])
        total, reach = longer, 2 * reach
    assert reach == rows
    means: Floats = total / np.maximum(count, 1)
    means[np.broadcast_to(count < at_least, means.shape)] = np.nan
    return means


def median(values: Floats) -> Floats:
    """The median along the last axis, as `np.median` has it; sorting is several times as fast as its selection."""
    ordered = np.sort(values, axis=-1)  # NaN comes last
    size = values.shape[-1]
    middle: Floats = (ordered[..., (size - 1) // 2] + ordered[..., size // 2]) / 2
    return np.where(np.isnan(ordered[..., -1]), np.nan, middle)
