"""What raw rows become when they are merged over ranks and over the steps of a bucket: arrays over slots.

A bucket of level L holds the steps from L * bucket on, L of them, of all ranks of one incarnation. For each slot and
each of `VALUES` it has the smallest and the largest value of any row, and for the first of them (`PLACED`) at which
step and rank that was; sums; and how log2(amax) was distributed, in quarters of a power of two. Each array merges with
the same of another bucket or of another writer, in any order: merging is all that ever happens, so a rollup equals its
rows.

Values are float32: extremes are those of the rows, rounded to it (a float64 or a count loses digits there; amax and
scales lose none). NaN: no row had it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain, groupby
from operator import or_
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import zstandard

from fp8core.records import FIELDS

LEVELS = (16, 256, 4096)
RATIOS = ("overflow_ratio", "underflow_ratio", "subnormal_ratio", "nonfinite_ratio")
PLACED = ("amax", "scale_min", "scale_max", "peak_exp2", "sqnr_db", *RATIOS)
VALUES = (*PLACED, *(field.name for field in FIELDS if field.name not in PLACED))
COUNTS = tuple(field.name for field in FIELDS if field.dtype == "uint64")
SUMS = ("amax", "sum_sq", "err_sq")
BINS_PER_OCTAVE = 4
LARGEST_RANK = (1 << 20) - 1  # larger ones are shown as this one
_FIRST_BIN = 600  # floor(4 * log2(2**-149)) + 600 = 4
_BIN_BITS = 11
_DENSE = 4  # counters for each value at most: counting is faster than sorting
_AT_ONCE = 256  # segments: their number fits uint8
_NOWHERE = np.uint32(0xFFFFFFFF)
_STEP_BITS = 20  # place: steps into the bucket << 20 | rank

Floats = npt.NDArray[np.float32]
Columns = Mapping[str, npt.NDArray[Any]]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Segment:
    """Rows of one rank at one step, ascending by slot, each slot once."""

    rank: int
    step: int
    slot: npt.NDArray[np.int64]
    columns: Columns

    @property
    def place(self) -> int:
        """Where in its bucket of level 16 it is."""
        return self.step % LEVELS[0] << _STEP_BITS | min(self.rank, LARGEST_RANK)


class Rollup:
    """The arrays of one bucket; grows with the slots that it meets."""

    NAMES: ClassVar[tuple[str, ...]]  # of the arrays, as they are stored

    def __init__(self, level: int, slots: int = 0) -> None:
        self.level = level
        self.rows = np.zeros(slots, np.int64)
        self.steps = np.zeros(slots, np.uint16)  # level 16: a bit for each step; above: how many
        self.first = np.full(slots, 0xFFFF, np.uint16)  # steps into the bucket
        self.last = np.zeros(slots, np.uint16)
        self.low = np.full((len(VALUES), slots), np.nan, np.float32)
        self.high = np.full((len(VALUES), slots), np.nan, np.float32)
        self.low_at = np.full((len(PLACED), slots), _NOWHERE)
        self.high_at = np.full((len(PLACED), slots), _NOWHERE)
        self.counts = np.zeros((len(COUNTS), slots), np.int64)
        self.sums = np.zeros((len(SUMS), slots))
        self._bins: list[tuple[Array, Array]] = []  # sorted (slot << 11 | bin) and how often
        self._keys: list[Array] = []  # the same of single rows, in any order

    @property
    def slots(self) -> int:
        """Slots that the arrays have room for."""
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return 310 * self.slots + sum(array.nbytes for array in (*chain(*self._bins), *self._keys))

    def add(self, segments: Iterable[Segment]) -> None:
        """Adds rows of this bucket, which is of level 16; those of the same slots, one after the other, cost little."""
        for _, group in groupby(segments, _shape):
            alike = list(group)
            for begin in range(0, len(alike), _AT_ONCE):
                self._add_alike(alike[begin : begin + _AT_ONCE])

    def _add_alike(self, segments: Sequence[Segment]) -> None:
        """Adds rows of the same slots, with the same columns."""
        slot, columns = segments[0].slot, segments[0].columns
        offsets = [segment.step % LEVELS[0] for segment in segments]
        self._grow(int(slot[-1]) + 1)
        where: Any = slice(int(slot[0]), int(slot[-1]) + 1) if _is_whole(slot) else slot
        self.rows[where] += len(segments)
        self.steps[where] |= np.uint16(reduce(or_, (1 << offset for offset in offsets)))
        self.first[where] = np.minimum(self.first[where], np.uint16(min(offsets)))
        self.last[where] = np.maximum(self.last[where], np.uint16(max(offsets)))
        for names, arrays in ((COUNTS, self.counts), (SUMS, self.sums)):
            for name, own in zip(names, arrays, strict=True):
                if name in columns:
                    own[where] = _total(own[where], [segment.columns[name] for segment in segments])
        *extremes, octaves = _extremes(sorted(segments, key=lambda segment: segment.place))
        self._extend(where, *extremes)
        known = np.isfinite(octaves)
        octaves *= BINS_PER_OCTAVE
        with np.errstate(invalid="ignore"):
            keys = np.floor(octaves, out=octaves).astype(np.int64)
        keys += (slot << _BIN_BITS) + _FIRST_BIN
        self._keys.append(keys.ravel() if known.all() else keys[known])

    def merge(self, other: Rollup, shift: int = 0, new_steps: Array | None = None) -> None:
        """Adds what `other` holds, whose bucket begins `shift` steps into this one.

        Above level 16 only a number of steps is known: `new_steps` says, by slot, how many of `other` no part of this
        bucket has yet. Without it both are parts of one bucket, which were told that.
        """
        self._grow(other.slots)
        where = slice(0, other.slots)
        there = other.rows > 0
        self.rows[where] += other.rows
        if self.level == LEVELS[0]:
            self.steps[where] |= other.steps
        else:
            self.steps[where] += (other.steps if new_steps is None else new_steps).astype(np.uint16)
        move = np.uint16(shift)
        self.first[where] = np.where(there, np.minimum(self.first[where], other.first + move), self.first[where])
        self.last[where] = np.where(there, np.maximum(self.last[where], other.last + move), self.last[where])
        low_at, high_at = (
            np.where(at == _NOWHERE, _NOWHERE, at + np.uint32(shift << _STEP_BITS))
            for at in (other.low_at, other.high_at)
        )
        self._extend(where, other.low, other.high, low_at, high_at)
        self.counts[:, where] += other.counts
        self.sums[:, where] += other.sums
        self._bins.append(other._merged_bins())  # merged once, not again in each level

    def _extend(self, where: Any, low: Floats, high: Floats, low_at: Any, high_at: Any) -> None:
        """Takes over what is more extreme; of equal ones the earlier step, then the lower rank."""
        placed = len(PLACED)
        known = ~np.isnan(low)
        for values, news, places, at, holds in (
            (self.low, low, self.low_at, low_at, np.less_equal),
            (self.high, high, self.high_at, high_at, np.greater_equal),
        ):
            old, old_at = values[:, where], places[:, where]  # the arrays themselves where `where` is a slice
            taken = ~holds(old, news)
            taken &= known
            np.copyto(old_at, at, where=taken[:placed] | (news[:placed] == old[:placed]) & (at < old_at))
            np.copyto(old, news, where=taken)
            if not isinstance(where, slice):
                values[:, where], places[:, where] = old, old_at

    def _grow(self, slots: int) -> None:
        known = self.slots
        if slots <= known:
            return
        more = Rollup(self.level, slots - known)
        for name in _ARRAYS:
            array = getattr(more, name)
            setattr(self, name, np.concatenate([getattr(self, name), array], axis=-1) if known else array)

    def bins(self) -> tuple[Array, Array, Array]:
        """The distribution of log2(amax): slot, lower edge of the bin in powers of two, and how many rows."""
        keys, counts = self._merged_bins()
        return keys >> _BIN_BITS, _octave(keys), counts

    def _merged_bins(self) -> tuple[Array, Array]:
        if self._keys:
            self._bins.append(_counted(np.concatenate(self._keys)))
            self._keys = []
        if len(self._bins) > 1:
            self._bins = [merge_bins(self._bins)]
        return self._bins[0] if self._bins else (np.empty(0, np.int64), np.empty(0, np.int64))

    # as stored

    def dump(self) -> dict[str, bytes]:
        """The arrays by name, without those that say nothing."""
        stored: dict[str, Array] = {"rows": self.rows, "steps": self.steps, "first": self.first, "last": self.last}
        for index, name in enumerate(VALUES):
            if not np.isnan(self.low[index]).all():
                stored |= {f"{name}.low": self.low[index], f"{name}.high": self.high[index]}
                if index < len(PLACED):
                    stored |= {f"{name}.low_at": self.low_at[index], f"{name}.high_at": self.high_at[index]}
        stored |= {f"{name}.sum": self.counts[index] for index, name in enumerate(COUNTS) if self.counts[index].any()}
        stored |= {f"{name}.sum": self.sums[index] for index, name in enumerate(SUMS) if self.sums[index].any()}
        dumped = {name: array.astype(array.dtype.newbyteorder("<")).tobytes() for name, array in stored.items()}
        keys, counts = self._merged_bins()
        return dumped | {"amax.bins": pack_bins(keys, counts)}

    @classmethod
    def load(cls, level: int, stored: Mapping[str, bytes]) -> Rollup:
        """The bucket whose arrays were dumped."""
        rollup = cls(level, len(stored["rows"]) // 8)
        for name, data in stored.items():
            if name == "amax.bins":
                rollup._bins.append(unpack_bins(data))
            else:
                target = rollup._array(name)
                target[:] = np.frombuffer(data, target.dtype.newbyteorder("<"))
        return rollup

    def _array(self, name: str) -> Array:
        """The array that is stored as `name`."""
        value, _, of = name.partition(".")
        if of == "sum":
            sums: Array = self.counts[COUNTS.index(value)] if value in COUNTS else self.sums[SUMS.index(value)]
            return sums
        array: Array = getattr(self, of or value)
        row: Array = array[VALUES.index(value)] if of else array
        return row


Rollup.NAMES = (
    *("rows", "steps", "first", "last", "amax.bins"),
    *(f"{name}.{of}" for name in VALUES for of in ("low", "high")),
    *(f"{name}.{of}" for name in PLACED for of in ("low_at", "high_at")),
    *(f"{name}.sum" for name in (*COUNTS, *SUMS)),
)
_ARRAYS = ("rows", "steps", "first", "last", "low", "high", "low_at", "high_at", "counts", "sums")


def _is_whole(slot: npt.NDArray[np.int64]) -> bool:
    return int(slot[-1]) - int(slot[0]) + 1 == len(slot)


def _shape(segment: Segment) -> tuple[object, ...]:
    """The same for two segments if they have the same slots and columns."""
    slot = segment.slot
    return (int(slot[0]), len(slot), b"" if _is_whole(slot) else slot.tobytes(), *segment.columns)


def _total(own: Array, columns: Sequence[Array]) -> Array:
    """`own` and the columns, added in this order; NaN counts as 0."""
    total: Array = sum(columns, start=own)
    if total.dtype.kind == "i" or (own.dtype.kind == "f" and not np.isnan(total).any()):
        return total
    known = (np.where(np.isnan(column), 0, column).astype(own.dtype, copy=False) for column in columns)
    return sum(known, start=own)


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _extremes(segments: Sequence[Segment]) -> tuple[Floats, Floats, Array, Array, Floats]:
    """The smallest and the largest of each of `VALUES` in segments of the same slots, ascending by place.

    And the first places of both of `PLACED`, which say nothing where no value is known; and log2(amax) of all rows,
    float32 [segments, slots].
    """
    length, slots, placed = len(segments), len(segments[0].slot), len(PLACED)
    places = np.array([segment.place for segment in segments], np.uint32)
    octaves = np.full((length, slots), np.nan, np.float32)
    low = np.full((len(VALUES), slots), np.nan, np.float32)
    _fill(dict(zip(VALUES, low, strict=True)), octaves[0], segments[0].columns)
    if length == 1:
        return low, low, places, places, octaves
    high, values = low.copy(), np.full_like(low, np.nan)
    at = dict(zip(VALUES, values, strict=True))
    since = np.zeros((2, placed, slots), np.uint8)  # segments since the first of the most extreme
    unknown, kept = np.empty((2, placed, slots), bool)
    for segment, octave in zip(segments[1:], octaves[1:], strict=True):
        _fill(at, octave, segment.columns)
        np.isnan(values[:placed], out=unknown)
        since += 1
        for most, ages, holds, extreme in (
            (low, since[0], np.less_equal, np.fmin),
            (high, since[1], np.greater_equal, np.fmax),
        ):
            holds(most[:placed], values[:placed], out=kept)
            np.logical_or(kept, unknown, out=kept)
            np.multiply(ages, kept.view(np.uint8), out=ages)
            extreme(most, values, out=most)
    low_at, high_at = places[length - 1 - since]
    return low, high, low_at, high_at, octaves


def _fill(at: Mapping[str, Floats], octave: Floats, columns: Columns) -> None:
    """Writes `VALUES` of each row, and log2(amax), except of fields that are not in `columns`."""
    for name, column in columns.items():
        at[name][:] = column
    if "amax" in columns:
        np.log2(at["amax"], out=octave)
        if "scale_max" in columns:
            peak = np.log2(at["scale_max"], out=at["peak_exp2"])
            peak += octave
            peak[peak == -np.inf] = np.nan
    if "numel" in columns:
        elements = columns["numel"] / (columns["numel"] != 0)  # 0 becomes NaN
        for ratio in RATIOS:
            if (count := columns.get(ratio.removesuffix("_ratio"))) is not None:
                np.divide(count, elements, out=at[ratio], casting="same_kind")
    if "err_sq" in columns and "sum_sq" in columns:
        noise = columns["err_sq"] / (columns["sum_sq"] / (columns["sum_sq"] != 0))
        np.multiply(np.log10(noise, out=noise), -10, out=at["sqnr_db"], casting="same_kind")


def dtype_of(name: str) -> np.dtype[Any]:
    """The type of an array by the name that it is stored as; of a distribution, its bytes."""
    if name == "amax.bins":
        return np.dtype("u1")
    return Rollup(LEVELS[0], 0)._array(name).dtype.newbyteorder("<")


def place(at: Array) -> tuple[Array, Array]:
    """Steps into the bucket and rank, of places as they are stored."""
    return (at >> np.uint32(_STEP_BITS)).astype(np.int64), (at & np.uint32(LARGEST_RANK)).astype(np.int64)


def merge_bins(parts: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Several distributions as one."""
    keys, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _counted(keys, counts)


def _counted(keys: Array, counts: Array | None = None) -> tuple[Array, Array]:
    """Distinct keys, ascending, and how often they come: each as often as `counts` says, or once."""
    if not len(keys):
        return keys, np.empty(0, np.int64)
    slot, bins = keys >> _BIN_BITS, keys & ((1 << _BIN_BITS) - 1)
    first = bins.min()
    width = bins.max() - first + 1
    if (slot.max() + 1) * width <= _DENSE * len(keys):
        slot *= width
        slot += bins
        slot -= first
        sums = np.bincount(slot, counts).astype(np.int64, copy=False)  # exact: of fewer than 2**53 rows
        found = np.flatnonzero(sums)
        slot = found // width
        return (slot << _BIN_BITS) + (found - slot * width + first), sums[found]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    if counts is None:
        return keys[starts], np.diff(starts, append=len(keys))
    return keys[starts], np.add.reduceat(counts[order], starts)


def pack_bins(keys: Array, counts: Array) -> bytes:
    """A distribution as it is stored: sorted keys as differences, then counts, uint32, one zstd frame."""
    return zstandard.compress(np.concatenate([np.diff(keys, prepend=0), counts]).astype("<u4").tobytes(), 1)


def unpack_bins(data: bytes) -> tuple[Array, Array]:
    """The distribution that `pack_bins` made it from."""
    both = np.frombuffer(zstandard.decompress(data), "<u4").astype(np.int64).reshape(2, -1)
    return np.cumsum(both[0]), both[1]


def bins_of(data: bytes, slot: int) -> tuple[Array, Array]:
    """One slot's part of a stored distribution: lower edges in powers of two, and counts."""
    keys, counts = unpack_bins(data)
    own = slice(*np.searchsorted(keys, [slot << _BIN_BITS, (slot + 1) << _BIN_BITS]))
    return _octave(keys[own]), counts[own]


def _octave(keys: Array) -> Array:
    return ((keys & ((1 << _BIN_BITS) - 1)) - _FIRST_BIN) / BINS_PER_OCTAVE
