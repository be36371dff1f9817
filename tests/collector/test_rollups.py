"""Rollups are at every moment exactly the raw rows below `rolled_step`, whatever happened before."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch, Source
from fp8scope_collector.storage import rolling, schema
from fp8scope_collector.storage.engine import migrate, open_engine, open_stats
from fp8scope_collector.storage.rollups import Rollup, Segment, merge_bins, place
from fp8scope_collector.storage.stats_store import Pace, StatsStore
from fp8scope_collector.storage.writer import StatsWriter
from random_runs import insert_run, insert_source
from rollup_reference import compare, compare_slot, stored

SLOTS = 5


@pytest.fixture(params=["sqlite", "postgresql", "chdb"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    stats = f"?stats=chdb:///{tmp_path}/stats" if request.param == "chdb" else ""
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else f"sqlite:///{tmp_path}/test.db"
    engine = open_engine(url + stats)
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: sa.Engine) -> Iterator[StatsStore]:
    store = open_stats(engine)
    store.migrate()
    yield store
    store.close()


@pytest.mark.parametrize("seed", range(4))
def test_rollups_are_the_raw_rows_whatever_happens(
    engine: sa.Engine, store: StatsStore, seed: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(rolling, "CATCH_UP_ROWS", 40)
    rng = random.Random(seed)
    writers = [StatsWriter(engine, store)]
    sources = {(rank, life): add_source(engine, rank, life) for life in (1, 2) for rank in range(3)}
    at = dict.fromkeys(sources, 0)
    seq = Counter[tuple[int, int]]()
    for _ in range(50):
        what = rng.choice(["batches"] * 6 + ["flush", "catch up", "crash", "another collector"])
        writer = rng.choice(writers)
        if what == "batches":
            group = []
            for who in rng.choices(sorted(sources), k=rng.randrange(1, 5)):
                at[who] += rng.choice([0, 1, 1, 1, 2, 9, 300]) if rng.random() < 0.9 else -min(at[who], 20)
                seq[who] += 1
                group.append(random_batch(rng, sources[who], seq[who], at[who]))
            writer.commit(group, now_unix_ns=1)
        elif what == "flush":
            writer.roll_up()
        elif what == "catch up":
            writer.catch_up(now_unix_ns=2**62)
        elif what == "crash":
            writers[writers.index(writer)] = StatsWriter(engine, store)
        elif engine.dialect.name == "postgresql" and len(writers) < 2:
            writers.append(StatsWriter(engine, store))
        if rng.random() < 0.3:
            compare(engine, store)
    for writer in writers:
        writer.roll_up()
        while writer.catch_up(now_unix_ns=2**62):
            pass
    compare(engine, store)
    with engine.connect() as connection:
        lagging = sa.select(sa.func.count()).select_from(schema.coverage).join(schema.source)
        assert connection.scalar(lagging.where(schema.coverage.c.rolled_step <= schema.source.c.last_step)) == 0


def test_a_crash_leaves_what_was_not_written_to_be_caught_up(engine: sa.Engine, store: StatsStore) -> None:
    source = add_source(engine, 0, 1)
    rng = random.Random(1)
    crashed = StatsWriter(engine, store)
    crashed.commit([random_batch(rng, source, 1, 7)], now_unix_ns=1)
    crashed.roll_up()
    crashed.commit([random_batch(rng, source, 2, 8)], now_unix_ns=1)

    writer = StatsWriter(engine, store)
    assert rolled_steps(engine) == [8]
    assert writer.catch_up(now_unix_ns=2**62)
    assert not writer.catch_up(now_unix_ns=2**62)

    assert rolled_steps(engine) == [9]
    compare(engine, store)


def test_steady_batches_are_written_every_few_seconds_and_never_caught_up_with(
    engine: sa.Engine, store: StatsStore, monkeypatch: Any
) -> None:
    monkeypatch.setattr(store, "pace", Pace(rollup_rows=3 * SLOTS))
    sources = [add_source(engine, rank, 1) for rank in range(2)]
    rng = random.Random(2)
    writer = StatsWriter(engine, store)

    for step in range(40):
        writer.commit([random_batch(rng, s, step + 1, step, whole=True) for s in sources], now_unix_ns=1)
        assert not writer.catch_up(now_unix_ns=2**62)
        assert min(rolled_steps(engine)) >= step - 1

    compare(engine, store)


def test_pruned_rows_stay_in_the_rollups_even_when_late_rows_come(engine: sa.Engine, store: StatsStore) -> None:
    source = add_source(engine, 0, 1)
    rng = random.Random(3)
    writer = StatsWriter(engine, store)
    for step in range(32):
        writer.commit([random_batch(rng, source, step + 1, step, whole=True)], now_unix_ns=1)
    writer.roll_up()
    before = stored(engine)
    with engine.begin() as connection:
        store.prune(connection, source.id, 20)
        connection.execute(sa.update(schema.coverage).values(pruned_step=20))

    writer.commit([random_batch(rng, source, 33, 18, whole=True)], now_unix_ns=1)

    after = stored(engine)
    assert after[1, 16, 0].dump() == before[1, 16, 0].dump()
    assert after[1, 16, 1].dump() == before[1, 16, 1].dump()


def rolled_steps(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(schema.coverage.c.rolled_step)))


def add_source(engine: sa.Engine, rank: int, incarnation: int) -> Source:
    with engine.begin() as connection:
        run_id = connection.scalar(sa.select(schema.run.c.id))
        if run_id is None:
            run_id = insert_run(connection, "run")
        source_id = insert_source(connection, run_id, rank, incarnation, last_seen_unix_ns=1)
    ids = np.arange(SLOTS)
    return Source(
        id=source_id,
        run_id=run_id,
        run="run",
        rank=rank,
        incarnation=incarnation,
        up_to_seq=0,
        finished=False,
        run_slot=ids[::-1] if rank == 2 else ids,
        role=np.zeros(SLOTS, np.int8),
        log2_max=np.full(SLOTS, 8.0),
    )


def random_batch(rng: random.Random, source: Source, seq: int, step: int, *, whole: bool = False) -> Batch:
    """One or two steps, some of their slots, some columns absent, some values NaN or zero."""
    keys = [(step + s, slot) for s in range(1 if whole else rng.choice([1, 1, 2])) for slot in range(SLOTS)]
    if not whole:
        keys = rng.sample(keys, rng.randrange(1, len(keys) + 1)) if rng.random() < 0.2 else keys
        keys += rng.sample(keys, 1) if rng.random() < 0.1 else []
        keys = keys if rng.random() < 0.8 else rng.sample(keys, len(keys))
    columns: dict[str, Any] = {}
    for field in FIELDS:
        if field.dtype == "uint64":
            values: list[float] = [rng.choice([0, 1, rng.randrange(1 << 40)]) for _ in keys]
            columns[field.name] = np.array(values, np.int64)
        else:
            values = [rng.choice([0.0, math.nan, 2.0 ** rng.uniform(-20, 20), 1.0]) for _ in keys]
            columns[field.name] = np.array(values, field.dtype)
    for name in rng.sample(sorted(columns), rng.choice([0, 0, 3])):
        del columns[name]
    step_column, slot_column = (np.array(column, np.int64) for column in zip(*keys, strict=True))
    return Batch(source=source, seq=seq, size_bytes=1, step=step_column, slot=slot_column, columns=columns)


@pytest.mark.parametrize("octaves", [3, 2000])
def test_distributions_merge_alike_counted_and_sorted(octaves: int) -> None:
    """Of a narrow one the bins are counted, of a wide one they are sorted."""
    rng = np.random.default_rng(octaves)
    parts = [
        (np.sort(rng.choice(50, 200) << 11 | rng.integers(20, 20 + octaves, 200)), rng.integers(1, 9, 200))
        for _ in range(5)
    ]

    keys, counts = merge_bins(parts)

    expected: Counter[int] = Counter()
    for part_keys, part_counts in parts:
        for key, count in zip(part_keys.tolist(), part_counts.tolist(), strict=True):
            expected[key] += count
    assert list(zip(keys.tolist(), counts.tolist(), strict=True)) == sorted(expected.items())


@pytest.mark.parametrize("seed", range(30))
def test_rows_in_any_order_and_in_any_pieces_make_the_same_bucket(seed: int) -> None:
    """With ties, zeros of both signs, infinities and NaN; of the same slots, of some of them, and of other columns."""
    rng = random.Random(seed)
    chosen = {
        **dict.fromkeys(("amax", "sum_sq"), (math.nan, -math.nan, 0.0, -0.0, 1.0, 1.0, 2.0**-140)),
        **dict.fromkeys(("scale_min", "scale_max", "err_sq"), (math.nan, -math.nan, 0.0, 1.0, 2.0, math.inf)),
    }
    segments, rows = [], []
    for step, rank in rng.sample([(step, rank) for step in range(32, 40) for rank in range(4)], 20):
        slots = [1, 2, 3] if rng.random() < 0.8 else sorted(rng.sample(range(SLOTS), rng.randrange(1, SLOTS)))
        columns = {
            field.name: np.array(rng.choices(chosen.get(field.name, (0, 0, 1, 1 << 40)), k=len(slots)), field.dtype)
            for field in FIELDS
            if rng.random() < 0.99
        }
        segments.append(Segment(rank, step, np.array(slots), columns))
        for row, slot in enumerate(slots):
            values = {name: column[row].item() for name, column in columns.items()}
            known = {field.name: values.get(field.name, math.nan) for field in FIELDS}
            known = {name: None if math.isnan(value) else value for name, value in known.items()}
            rows.append({"step": step, "rank": rank, "slot": slot, **known})
    rollup, other = Rollup(16), Rollup(16)

    rollup.add(segments[:1])
    rollup.add(segments[1:9])
    other.add(segments[9:])
    rollup.merge(other)

    for slot in {row["slot"] for row in rows}:
        compare_slot(rollup, slot, [row for row in rows if row["slot"] == slot], f"slot {slot}")


def test_of_a_thousand_ranks_the_first_with_an_extreme_has_it() -> None:
    amax = np.ones(1000, np.float32)
    amax[[300, 700]], amax[[299, 999]] = 2, 0.5
    rollup = Rollup(16)

    rollup.add([Segment(rank, 5, np.arange(1), {"amax": amax[rank : rank + 1]}) for rank in range(999, -1, -1)])

    assert (rollup.low[0, 0], rollup.high[0, 0]) == (0.5, 2)
    assert [place(at[0, 0]) for at in (rollup.low_at, rollup.high_at)] == [(5, 299), (5, 300)]
