"""Which part of an answer comes from rollups and which from raw rows, so that each wanted row is in it exactly once.

A bucket is used where all its rows are wanted: those of every life of its incarnation within the steps asked for, and
none that a resumed life rewrote. Where a bucket is cut, the level below is tried, at last raw rows. Raw is also what
lies at or above a life's `rolled_step`. See docs/adr/0035.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from fp8scope_collector.storage import schema
from fp8scope_collector.storage.history import Life, Span, without
from fp8scope_collector.storage.quantities import Ints
from fp8scope_collector.storage.rollups import LEVELS, dtype_of

Interval = tuple[int, int]  # both ends included


@dataclass(frozen=True)
class Buckets:
    """Consecutive buckets of one incarnation and level, both ends included."""

    incarnation: int
    level: int
    first: int
    last: int

    @property
    def steps(self) -> Interval:
        """The steps that they hold."""
        return self.first * self.level, (self.last + 1) * self.level - 1


@dataclass(frozen=True)
class Cover:
    """Buckets and spans of raw rows that hold each wanted row once."""

    buckets: list[Buckets]
    raw: list[Span]


def cover(lives: Sequence[Life], spans: Sequence[Span], width: int) -> Cover:
    """What to read for `spans`, parts of `lives`, where steps are wanted no finer than `width`, a power of two."""
    buckets: list[Buckets] = []
    wanted: dict[int, list[Interval]] = {}
    for span in spans:
        wanted.setdefault(span.source_id, []).append((span.first_step, span.last_step))
    for incarnation in sorted({span.incarnation for span in spans}):
        own = [life for life in lives if life.incarnation == incarnation and life.rolled_step > life.first_step]
        levels = [level for level in reversed(LEVELS) if level <= width]
        if not own or not levels:
            continue
        unwanted: list[Interval] = []
        for life in own:
            rolled_up = (life.first_step, min(life.last_step, life.rolled_step - 1))
            unwanted += without(rolled_up, wanted.get(life.source_id, []))
        top = LEVELS[-1]  # beyond the first and the last step there is nothing unwanted
        first = min(life.first_step for life in own) // top * top
        last = (max(life.rolled_step for life in own) // top + 1) * top - 1
        buckets += _whole_buckets(incarnation, levels, without((first, last), unwanted))
    raw: list[Span] = []
    rolled = {life.source_id: life.rolled_step for life in lives}
    for span in spans:
        used = [
            (group.steps[0], min(group.steps[1], rolled[span.source_id] - 1))
            for group in buckets
            if group.incarnation == span.incarnation
        ]
        for start, end in without((span.first_step, span.last_step), [u for u in used if u[0] <= u[1]]):
            raw.append(replace(span, first_step=start, last_step=end))
    return Cover(buckets, raw)


def _whole_buckets(incarnation: int, levels: Sequence[int], free: list[Interval]) -> Iterator[Buckets]:
    for level in levels:
        left: list[Interval] = []
        for start, end in free:
            first, last = -(-start // level), (end + 1) // level - 1
            if first > last:
                left.append((start, end))
                continue
            yield Buckets(incarnation, level, first, last)
            left += [(start, first * level - 1), ((last + 1) * level, end)]
        free = [(start, end) for start, end in left if start <= end]


@dataclass(frozen=True)
class Stored:
    """One array of one part of a bucket."""

    incarnation: int
    level: int
    bucket: int
    name: str
    values: npt.NDArray[Any]


def read_buckets(
    connection: sa.Connection, run_id: int, buckets: Sequence[Buckets], names: Sequence[str]
) -> Iterator[Stored]:
    """The arrays called `names` of all parts of the buckets, over slots; one that says nothing is not stored."""
    rollup = schema.rollup.c
    types = {name: dtype_of(name) for name in names}
    for group in buckets:
        query = sa.select(rollup.name, rollup.bucket, rollup.data).where(_of(run_id, group, names))
        for name, bucket, value in connection.execute(query):
            yield Stored(group.incarnation, group.level, bucket, name, np.frombuffer(value, types[name]))


def read_slot(
    connection: sa.Connection, run_id: int, group: Buckets, names: Sequence[str], slot: int
) -> dict[str, tuple[Ints, npt.NDArray[Any]]]:
    """What the arrays called `names` have of one slot: by name the buckets, ascending, and a value of each.

    A bucket comes once for each of its parts, in the same order under each name. Not for `amax.bins`, which has no
    value of a slot.
    """
    rollup = schema.rollup.c
    types = {name: dtype_of(name) for name in names}
    found: dict[str, tuple[Ints, npt.NDArray[Any]]] = {}
    for size in sorted({dtype.itemsize for dtype in types.values()}):
        same = [name for name in names if types[name].itemsize == size]
        query = sa.select(rollup.name, rollup.bucket, sa.func.substr(rollup.data, size * slot + 1, size))
        query = query.where(_of(run_id, group, same)).order_by(rollup.name, rollup.bucket, rollup.part)
        rows = [row for row in connection.execute(query).all() if row[2]]
        for name, own in groupby(rows, key=itemgetter(0)):
            _, numbers, values = zip(*own, strict=True)
            found[name] = np.array(numbers, np.int64), np.frombuffer(b"".join(values), types[name])
    return found


def _of(run_id: int, group: Buckets, names: Sequence[str]) -> sa.ColumnElement[bool]:
    rollup = schema.rollup.c
    return sa.and_(
        rollup.run_id == run_id,
        rollup.level == group.level,
        rollup.name.in_(names),
        rollup.incarnation == group.incarnation,
        rollup.bucket.between(group.first, group.last),
    )
