"""What rollups have to be: plain Python over the raw rows, slow and obvious."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import sqlalchemy as sa

from fp8core.records import FIELDS
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.history import Span
from fp8scope_collector.storage.rollups import COUNTS, LEVELS, PLACED, SUMS, VALUES, Rollup, place
from fp8scope_collector.storage.sql_stats import SqlStats
from fp8scope_collector.storage.stats_store import StatsStore

_FIELDS = [field.name for field in FIELDS]


def stored(engine: sa.Engine) -> dict[tuple[int, int, int], Rollup]:
    """Every bucket with its parts merged, by (incarnation, level, bucket)."""
    with engine.connect() as connection:
        return _stored(connection)


def _stored(connection: sa.Connection) -> dict[tuple[int, int, int], Rollup]:
    arrays: dict[tuple[int, int, int, int], dict[str, bytes]] = {}
    for row in connection.execute(sa.select(schema.rollup)):
        key = (row.incarnation, row.level, row.bucket, row.part)
        arrays.setdefault(key, {})[row.name] = row.data
    merged: dict[tuple[int, int, int], Rollup] = {}
    for (incarnation, level, bucket, _), part in sorted(arrays.items()):
        merged.setdefault((incarnation, level, bucket), Rollup(level)).merge(Rollup.load(level, part))
    return merged


def compare(engine: sa.Engine, store: StatsStore | None = None) -> None:
    """Every array of every bucket against plain Python over the raw rows, which are in the database or in `store`."""
    store = store or SqlStats(engine.dialect.name)
    source, coverage = schema.source.c, schema.coverage.c
    sources = sa.select(source.id, source.incarnation, source.rank, coverage.rolled_step)
    sources = sources.join_from(schema.source, schema.coverage, coverage.source_id == source.id)
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":  # one snapshot, as SQLite has: a collector may be writing
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        rows = [
            {"incarnation": own.incarnation, "rank": own.rank, **row}
            for own in connection.execute(sources).all()
            for batch in store.rows(connection, [Span(own.id, own.incarnation, 0, own.rolled_step - 1)], _FIELDS)
            for row in batch.to_pylist()
        ]
        got = _stored(connection)
    expected: dict[tuple[int, int, int], dict[int, list[Any]]] = {}
    for row, level in itertools.product(rows, LEVELS):
        bucket = expected.setdefault((row["incarnation"], level, row["step"] // level), {})
        bucket.setdefault(row["slot"], []).append(row)
    assert got.keys() == expected.keys()
    for (incarnation, level, bucket), slots in expected.items():
        rollup = got[incarnation, level, bucket]
        where = f"incarnation {incarnation} level {level} bucket {bucket}"
        assert np.flatnonzero(rollup.rows).tolist() == sorted(slots), where
        for slot, own in slots.items():
            compare_slot(rollup, slot, own, f"{where} slot {slot}")


def compare_slot(rollup: Rollup, slot: int, rows: list[Any], where: str) -> None:
    offsets = [row["step"] % rollup.level for row in rows]
    assert rollup.rows[slot] == len(rows), where
    assert (rollup.first[slot], rollup.last[slot]) == (min(offsets), max(offsets)), where
    steps = int(rollup.steps[slot])
    assert (steps.bit_count() if rollup.level == LEVELS[0] else steps) == len(set(offsets)), where
    for index, name in enumerate(VALUES):
        values = [
            (np.float32(value_of(row, name)), offset, row["rank"]) for row, offset in zip(rows, offsets, strict=True)
        ]
        known = [value for value in values if not math.isnan(value[0])]
        low, high = rollup.low[index, slot], rollup.high[index, slot]
        if not known:
            assert math.isnan(low), f"{where} {name}"
            assert math.isnan(high), f"{where} {name}"
            continue
        lowest, highest = min(v for v, *_ in known), max(v for v, *_ in known)
        np.testing.assert_allclose([low, high], [lowest, highest], rtol=3e-6, atol=1e-6, err_msg=f"{where} {name}")
        if name in PLACED and name not in ("peak_exp2", "sqnr_db"):  # logarithms of others may differ in the last bit
            for extreme, at in ((lowest, rollup.low_at), (highest, rollup.high_at)):
                step, rank = place(at[index, slot])
                expected = min((offset, rank) for value, offset, rank in known if value == extreme)
                assert (int(step), int(rank)) == expected, f"{where} {name}"
    for index, name in enumerate(COUNTS):
        assert rollup.counts[index, slot] == sum(row[name] or 0 for row in rows), f"{where} {name}"
    for index, name in enumerate(SUMS):
        expected_sum = sum(row[name] or 0.0 for row in rows)
        np.testing.assert_allclose(rollup.sums[index, slot], expected_sum, rtol=1e-6, err_msg=f"{where} {name}")
    slots, octaves, counts = rollup.bins()
    own = dict(zip(octaves[slots == slot].tolist(), counts[slots == slot].tolist(), strict=True))
    assert own == Counter(math.floor(4 * math.log2(row["amax"])) / 4 for row in rows if row["amax"]), where


def value_of(row: Any, name: str) -> float:
    numel, amax, scale = row["numel"], row["amax"], row["scale_max"]
    if name in row:
        return math.nan if row[name] is None else float(row[name])
    if name == "peak_exp2":
        return math.log2(amax * scale) if amax and scale else math.nan
    if name == "sqnr_db":
        if not row["sum_sq"] or row["err_sq"] is None:
            return math.nan
        return -10 * math.log10(row["err_sq"] / row["sum_sq"]) if row["err_sq"] else math.inf
    count = row[name.removesuffix("_ratio")]
    return math.nan if count is None or not numel else count / numel
