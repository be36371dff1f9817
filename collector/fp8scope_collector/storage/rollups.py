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

from collections.abc import Iterable, Mapping
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
_NOWHERE = np.uint32(0xFFFFFFFF)
_WHERE = np.uint32(20)  # place: steps into the bucket << 20 | rank

Floats = npt.NDArray[np.float32]
Columns = Mapping[str, npt.NDArray[Any]]
Array = npt.NDArray[Any]


def values_of(columns: Columns, rows: int) -> Floats:
    """`VALUES` of each row, float32 [len(VALUES), rows]; a field that is not in `columns` is NaN."""
    values = np.full((len(VALUES), rows), np.nan, np.float32)
    at = {name: values[index] for index, name in enumerate(VALUES)}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for name, column in columns.items():
            at[name][:] = column
        if "amax" in columns and "scale_max" in columns:
            peak = np.log2(at["amax"]) + np.log2(at["scale_max"])
            at["peak_exp2"][:] = np.where(np.isneginf(peak), np.nan, peak)
        if "numel" in columns:
            elements = columns["numel"].astype(np.float64)
            elements[elements == 0] = np.nan
            for ratio in RATIOS:
                if (count := columns.get(ratio.removesuffix("_ratio"))) is not None:
                    at[ratio][:] = count / elements
        if "err_sq" in columns and "sum_sq" in columns:
            signal = columns["sum_sq"].astype(np.float64)
            signal[signal == 0] = np.nan
            at["sqnr_db"][:] = -10 * np.log10(columns["err_sq"] / signal)
    return values


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

    @property
    def slots(self) -> int:
        """Slots that the arrays have room for."""
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return 310 * self.slots + sum(keys.nbytes + counts.nbytes for keys, counts in self._bins)

    def add(self, offset: int, rank: int, slot: npt.NDArray[np.int64], columns: Columns, values: Floats) -> None:
        """Adds rows of one rank at one step, `offset` steps into this bucket of level 16; no slot comes twice.

        `slot` ascends; `values` is what `values_of(columns)` says.
        """
        self._grow(int(slot[-1]) + 1)
        whole = int(slot[-1]) - int(slot[0]) + 1 == len(slot)
        where: Any = slice(int(slot[0]), int(slot[-1]) + 1) if whole else slot
        place = np.uint32(offset << 20 | min(rank, LARGEST_RANK))
        self.rows[where] += 1
        self.steps[where] |= np.uint16(1 << offset)
        self.first[where] = np.minimum(self.first[where], np.uint16(offset))
        self.last[where] = np.maximum(self.last[where], np.uint16(offset))
        self._extend(where, values, values, place, place)
        for index, name in enumerate(COUNTS):
            if name in columns:
                self.counts[index, where] += _known(columns[name]).astype(np.int64, copy=False)
        for index, name in enumerate(SUMS):
            if name in columns:
                self.sums[index, where] += _known(columns[name])
        amax = values[0]
        there = amax > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            octave = np.log2(amax)
        if not there.all():
            slot, octave, there = slot[there], octave[there], there[there]
        finite = np.isfinite(octave)
        bins = np.floor(octave[finite] * BINS_PER_OCTAVE).astype(np.int64) + _FIRST_BIN
        keys = slot[finite] << _BIN_BITS | bins
        self._bins.append((keys, np.ones(len(keys), np.int64)))

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
            np.where(at == _NOWHERE, _NOWHERE, at + np.uint32(shift << 20)) for at in (other.low_at, other.high_at)
        )
        self._extend(where, other.low, other.high, low_at, high_at)
        self.counts[:, where] += other.counts
        self.sums[:, where] += other.sums
        self._bins.append(other._merged_bins())  # merged once, not again in each level

    def _extend(self, where: Any, low: Floats, high: Floats, low_at: Any, high_at: Any) -> None:
        """Takes over what is more extreme; of equal ones the earlier step, then the lower rank."""
        placed = len(PLACED)
        for less, values, news, places, at in (
            (np.less, self.low, low, self.low_at, low_at),
            (np.greater, self.high, high, self.high_at, high_at),
        ):
            old, old_at = values[:, where], places[:, where]
            taken = less(news, old)
            taken |= np.isnan(old) & ~np.isnan(news)
            same = (news[:placed] == old[:placed]) & (at < old_at)
            if isinstance(where, slice):  # `old` and `old_at` are the arrays themselves
                np.copyto(old, news, where=taken)
                np.copyto(old_at, at, where=taken[:placed] | same)
            else:
                values[:, where] = np.where(taken, news, old)
                places[:, where] = np.where(taken[:placed] | same, at, old_at)

    def _grow(self, slots: int) -> None:
        missing = slots - self.slots
        if missing <= 0:
            return
        more = Rollup(self.level, missing)
        for name in _ARRAYS:
            setattr(self, name, np.concatenate([getattr(self, name), getattr(more, name)], axis=-1))

    def bins(self) -> tuple[Array, Array, Array]:
        """The distribution of log2(amax): slot, lower edge of the bin in powers of two, and how many rows."""
        keys, counts = self._merged_bins()
        return keys >> _BIN_BITS, _octave(keys), counts

    def _merged_bins(self) -> tuple[Array, Array]:
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


def _known(column: Array) -> Array:
    """The column with 0 in the place of NaN."""
    return np.where(np.isnan(column), 0, column) if column.dtype.kind == "f" else column


def dtype_of(name: str) -> np.dtype[Any]:
    """The type of an array by the name that it is stored as; of a distribution, its bytes."""
    if name == "amax.bins":
        return np.dtype("u1")
    return Rollup(LEVELS[0], 0)._array(name).dtype.newbyteorder("<")


def place(at: Array) -> tuple[Array, Array]:
    """Steps into the bucket and rank, of places as they are stored."""
    return (at >> _WHERE).astype(np.int64), (at & np.uint32(LARGEST_RANK)).astype(np.int64)


def merge_bins(parts: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Several distributions as one."""
    keys, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not len(keys):
        return keys, counts
    slot, bins = keys >> _BIN_BITS, keys & ((1 << _BIN_BITS) - 1)
    first = bins.min()
    width = bins.max() - first + 1
    if (slot.max() + 1) * width <= _DENSE * len(keys):
        bins += slot * width - first
        sums = np.bincount(bins, counts).astype(np.int64)  # exact: of fewer than 2**53 rows
        found = np.flatnonzero(sums)
        slot, bins = np.divmod(found, width)
        return slot << _BIN_BITS | (bins + first), sums[found]
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts)


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
