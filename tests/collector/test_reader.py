"""The reader against a reference in plain Python over every row: random runs with gaps, ranks and resumed lives."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from fp8core.records import FIELDS, Role
from fp8scope_collector.storage import rolling, schema, spread
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.history import int_div
from fp8scope_collector.storage.reader import QUANTITIES, HeatMap, Quantity, Reader, Worst
from fp8scope_collector.storage.writer import StatsWriter
from random_runs import (
    LAYERS,
    NOW,
    SECOND,
    Recorded,
    insert_rows,
    insert_run,
    insert_slot,
    insert_source,
    quantity_of,
    random_row,
    record,
)


def roll_up(engine: sa.Engine, share: float) -> None:
    """Rolls up about this share of what is stored."""
    writer = StatsWriter(engine)
    with engine.connect() as connection:
        rows = connection.scalar(sa.select(sa.func.count()).select_from(schema.stats)) or 0
    for _ in range(int(share * rows / 100)):
        writer.catch_up(now_unix_ns=2**62)
    while share == 1 and writer.catch_up(now_unix_ns=2**62):
        pass


@pytest.fixture(params=[0, 0.5, 1], ids=["raw", "half rolled up", "rolled up"])
def rolled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(rolling, "CATCH_UP_ROWS", 100)
    return float(request.param)


def reference_heatmap(run: Recorded, quantity: Quantity, got: HeatMap, first: int, last: int) -> np.ndarray[Any, Any]:
    expected = np.full((2, *got.low.shape), np.nan)
    for (step, slot, _), (row, largest) in run.history(first, last).items():
        if slot in got.slots:
            cell = (got.slots.tolist().index(slot), step // got.width - got.first_column)
            low, high = quantity_of(row, largest, "amax" if quantity == "spread" else quantity)
            expected[0][cell] = np.fmin(expected[0][cell], low)
            expected[1][cell] = np.fmax(expected[1][cell], high)
    if quantity == "spread":
        low, high = (np.log2(np.where(side > 0, side, np.nan)) for side in expected)
        return np.array([high - low] * 2)
    return expected


@pytest.mark.parametrize("seed", range(3))
def test_heat_map_equals_the_reference(engine: sa.Engine, reader: Reader, seed: int, rolled: float) -> None:
    record(engine, seed + 100, name="another")
    run = record(engine, seed)
    roll_up(engine, rolled)
    last = max(step for _, _, step, _ in run.rows)

    for quantity, (first, end), columns in itertools.product(QUANTITIES, [(0, last), (7, last - 4)], [500, 11, 4]):
        got = reader.heatmap(run.run_id, quantity, first_step=first, last_step=end, max_columns=columns)

        assert got.low.shape[1] <= columns
        expected = reference_heatmap(run, quantity, got, first, end)
        bounds = {"rtol": 1e-6, "atol": 4e-6} if got.width >= 16 else {"rtol": 1e-12, "atol": 1e-12}
        np.testing.assert_allclose([got.low, got.high], expected, err_msg=f"{quantity} {first}-{end}", **bounds)


@pytest.mark.parametrize("role", Role)
def test_heat_map_of_one_role_has_its_layers_in_model_order(engine: sa.Engine, reader: Reader, role: Role) -> None:
    run = record(engine, 5)

    got = reader.heatmap(run.run_id, "amax", roles=[role])

    slots = {slot.slot: slot for slot in reader.slots(run.run_id)}
    assert [(slots[n].layer, slots[n].role) for n in got.slots.tolist()] == [(layer, role) for layer in LAYERS]


@pytest.mark.parametrize("seed", range(2))
def test_series_equals_the_reference_and_keeps_extremes(
    engine: sa.Engine, reader: Reader, seed: int, rolled: float
) -> None:
    run = record(engine, seed + 20)
    roll_up(engine, rolled)
    fields = [field.name for field in FIELDS] + ["scale_exp2", "headroom", "overflow_ratio", "sqnr_db"]

    for slot, points in itertools.product([0, 4], [10_000, 9, 3]):
        got = reader.series(run.run_id, slot, fields, max_points=points)

        rows = by_step(run, slot)
        assert got.count.sum() == len(rows)
        assert len(got.step) <= points
        for i, (start, end) in enumerate(zip(got.step.tolist(), got.last.tolist(), strict=True)):
            steps = [step for step in rows if start <= step <= end]
            assert (min(steps), max(steps), len(steps)) == (start, end, got.count[i])
            inside = [pair for step in steps for pair in rows[step]]
            for name in fields:
                pairs = [quantity_of(row, largest, name.removesuffix("_ratio")) if name not in row else
                         (math.nan if row[name] is None else row[name],) * 2 for row, largest in inside]  # fmt: skip
                expected = [nan_extreme(side, [p[i] for p in pairs]) for i, side in enumerate((np.fmin, np.fmax))]
                np.testing.assert_allclose(
                    (got.low[name][i], got.high[name][i]), expected, 1e-6, 4e-6, err_msg=f"{name} at {start}-{end}"
                )


def by_step(run: Recorded, slot: int) -> dict[int, list[Any]]:
    steps: dict[int, list[Any]] = {}
    for (step, number, _), pair in run.history().items():
        if number == slot:
            steps.setdefault(step, []).append(pair)
    return steps


def nan_extreme(extreme: np.ufunc, values: list[float]) -> float:
    return float(extreme.reduce(np.array([math.nan, *values])))


@pytest.mark.parametrize("steps", [12, 70])
def test_top_ranks_as_the_reference(engine: sa.Engine, reader: Reader, steps: int, rolled: float) -> None:
    run = record(engine, 3)
    roll_up(engine, rolled)
    last = max(step for _, _, step, _ in run.rows)
    first = last - 11 if steps == 12 else max(0, last - steps + 1) // 16 * 16

    for by in QUANTITIES:
        check_top(run, by, first, last, reader.top(run.run_id, last_steps=steps, limit=5, by=by))


@pytest.mark.parametrize(("steps", "told"), [({0: [7, 9], 1: [5, 9]}, (5, 1)), ({0: [7, 9], 1: [7], 2: [7]}, (7, 0))])
def test_of_equal_values_the_earliest_step_and_then_the_lowest_rank_are_told(
    engine: sa.Engine, reader: Reader, steps: dict[int, list[int]], told: tuple[int, int]
) -> None:
    row = random_row(random.Random(1)) | {"numel": 256, "overflow": 100}
    with engine.begin() as connection:
        run_id = insert_run(connection, "gpt")
        insert_slot(connection, run_id, 0, "fc", Role.INPUT)
        for rank, recorded in steps.items():
            source_id = insert_source(connection, run_id, rank, 1)
            insert_rows(
                connection, source_id, [{"source_id": source_id, "step": s, "slot": 0, **row} for s in recorded]
            )

    (worst,) = reader.top(run_id, last_steps=100, limit=1, by="overflow")

    assert (worst.step, worst.rank) == told


def check_top(run: Recorded, by: Quantity, first: int, last: int, got: list[Worst]) -> None:
    values: dict[int, list[tuple[float, float]]] = {}
    where: dict[tuple[int, int, int], tuple[float, float]] = {}
    for (step, slot, rank), (row, largest) in run.history(first, last).items():
        pair = quantity_of(row, largest, "amax" if by == "spread" else by)
        values.setdefault(slot, []).append(pair)
        where[slot, step, rank] = pair
    value = {}
    for slot, pairs in values.items():
        low, high = nan_extreme(np.fmin, [p[0] for p in pairs]), nan_extreme(np.fmax, [p[1] for p in pairs])
        if by == "spread":
            low, high = (math.log2(side) if side > 0 else math.nan for side in (low, high))
        value[slot] = low if by in ("headroom", "sqnr_db") else high - low if by in ("scale_exp2", "spread") else high
    low_is_bad = by in ("headroom", "sqnr_db")
    expected = sorted((v for v in value.values() if low_is_bad or v > 0), reverse=not low_is_bad)[:5]
    np.testing.assert_allclose([worst.value for worst in got], expected, 1e-6, 4e-6)
    np.testing.assert_allclose([value[worst.slot] for worst in got], expected, 1e-6, 4e-6)
    for worst in got:
        extreme = where[worst.slot, worst.step, worst.rank][0 if low_is_bad else 1]
        every = [pair[0 if low_is_bad else 1] for (slot, *_), pair in where.items() if slot == worst.slot]
        assert extreme == pytest.approx(np.nanmin(every) if low_is_bad else np.nanmax(every), 1e-6, 4e-6)
        own = {(step, rank): pair for (slot, step, rank), pair in where.items() if slot == worst.slot}
        equal = [place for place, pair in own.items() if pair[0 if low_is_bad else 1] == extreme]
        assert (worst.step, worst.rank) == min(equal), "the earliest of equal ones is told"
        assert worst.last_step == max(step for slot, step, _ in where if slot == worst.slot)


def test_a_live_view_gets_the_same_columns_from_ticks_as_from_one_query(engine: sa.Engine, reader: Reader) -> None:
    run = record(engine, 8)
    whole = reader.heatmap(run.run_id, "underflow", max_columns=16)
    middle = int(whole.steps[len(whole.steps) // 2])

    tick = reader.heatmap(run.run_id, "underflow", first_step=middle, width=whole.width)

    assert tick.width == whole.width
    offset = tick.first_column - whole.first_column
    np.testing.assert_array_equal(tick.high, whole.high[:, offset:])


def test_columns_are_not_narrower_than_the_distance_of_recorded_steps(engine: sa.Engine, reader: Reader) -> None:
    run = record(engine, 30, every=10)

    got = reader.heatmap(run.run_id, "amax")

    assert got.width == 16
    assert reader.progress(run.run_id).stride == 10  # type: ignore[union-attr]


def test_cursor_settles_behind_the_slowest_rank_that_still_sends(engine: sa.Engine, reader: Reader) -> None:
    with engine.begin() as connection:
        run_id = insert_run(connection, "gpt")
        row = {"slot": 0, **random_row(random.Random(0))}
        for rank, steps, seen in [(0, 30, 1), (1, 20, 2), (2, 10, 500)]:
            source = insert_source(connection, run_id, rank, last_seen_unix_ns=NOW - seen * SECOND)
            insert_rows(connection, source, [{"source_id": source, "step": s, **row} for s in range(steps)])

    progress = reader.progress(run_id)

    assert progress is not None
    assert (progress.first_step, progress.last_step, progress.settled_step, progress.lives) == (0, 29, 19, 3)


@pytest.mark.parametrize("field", ["amax", "headroom", "overflow_ratio"])
def test_spread_knows_the_rank_and_the_step_of_each_extreme(
    engine: sa.Engine, reader: Reader, rolled: float, field: str
) -> None:
    run = record(engine, 23)
    roll_up(engine, rolled)

    for points in (10_000, 3):
        got = reader.spread(run.run_id, 4, field, max_points=points)

        values = {(step, rank): quantity_of(row, largest, field.removesuffix("_ratio"))[0]
                  for (step, slot, rank), (row, largest) in run.history().items() if slot == 4}  # fmt: skip
        values = {key: value for key, value in values.items() if not math.isnan(value)}
        assert len(got.step)
        for i, (first, last) in enumerate(zip(got.step.tolist(), got.last.tolist(), strict=True)):
            inside = {key: value for key, value in values.items() if first <= key[0] <= last}
            low, high = min(inside.values()), max(inside.values())
            np.testing.assert_allclose([got.low[i], got.high[i]], [low, high], 1e-6, 4e-6)
            for extreme, step, rank in ((low, got.low_step, got.low_rank), (high, got.high_step, got.high_rank)):
                assert inside[int(step[i]), int(rank[i])] == pytest.approx(extreme, 1e-6, 4e-6)
            if not math.isnan(got.median[i]) and min(inside.values()) > 0:
                middle = sorted(inside.values())
                at = (len(middle) - 1) // 2, len(middle) // 2
                error = got.median_error + 1e-6
                bounds = middle[at[0]] - abs(middle[at[0]]) * error, middle[at[1]] + abs(middle[at[1]]) * error
                assert bounds[0] <= got.median[i] <= bounds[1]
        assert got.median_error == (0 if points == 10_000 or not rolled else pytest.approx(0.0905, abs=1e-3)) or (
            field != "amax"
        )


@pytest.mark.parametrize("seed", [9, 10])
def test_each_rank_is_shown_at_the_first_step_that_it_has_in_a_column(
    engine: sa.Engine, reader: Reader, seed: int
) -> None:
    run = record(engine, seed)
    history = run.history(3, 70)
    recorded = {(rank, step) for step, _, rank in history}

    for quantity, columns in itertools.product(["amax", "headroom", "overflow_ratio", "scale_exp2"], [1000, 8, 3]):
        got = reader.ranks(run.run_id, 4, quantity, first_step=3, last_step=70, max_columns=columns)

        width = int(got.last[0] - got.step[0]) + 1
        assert width == 1 if columns == 1000 else len(got.step) <= columns
        expected = {}
        for rank, column in {(rank, step // width) for rank, step in recorded}:
            step = min(step for r, step in recorded if r == rank and step // width == column)
            if found := history.get((step, 4, rank)):
                expected[rank, column * width] = quantity_of(*found, quantity.removesuffix("_ratio"))
        shown = {
            (rank, step): (low, high)
            for rank, lows, highs in zip(got.ranks.tolist(), got.low.tolist(), got.high.tolist(), strict=True)
            for step, low, high in zip(got.step.tolist(), lows, highs, strict=True)
        }
        assert len({rank for rank, _ in expected}) == 3
        for key in {*shown, *expected}:
            nothing = (math.nan, math.nan)
            assert shown.get(key, nothing) == pytest.approx(expected.get(key, nothing), 1e-12, 1e-12, nan_ok=True), key


def test_very_many_ranks_are_shown_in_fewer_columns(
    engine: sa.Engine, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "RANK_ROWS", 64)
    with engine.begin() as connection:
        run_id = insert_run(connection, "gpt")
        for rank in range(16):
            source_id = insert_source(connection, run_id, rank)
            row = {"source_id": source_id, "slot": 0, **random_row(random.Random(0)), "amax": rank + 1}
            insert_rows(connection, source_id, [{**row, "step": step} for step in range(40)])

    got = reader.ranks(run_id, 0, "amax")

    assert (got.ranks.tolist(), got.step.tolist(), got.last.tolist()) == ([*range(16)], [0, 16, 32], [15, 31, 47])
    np.testing.assert_array_equal(got.low, np.repeat(np.arange(1.0, 17)[:, None], 3, axis=1))


def test_histograms_of_ranks_add_up_and_long_ranges_come_in_columns(engine: sa.Engine, reader: Reader) -> None:
    with engine.begin() as connection:
        run_id = insert_run(connection, "gpt")
        for rank, steps in [(0, (0, 1, 3)), (1, (1,))]:
            source_id = insert_source(connection, run_id, rank)
            row = {"source_id": source_id, "slot": 4, **random_row(random.Random(0))}
            insert_rows(connection, source_id, [{**row, "step": step} for step in range(4)])
            key = {"source_id": source_id, "slot": 4, "first_bin": 120}
            rows = [{**key, "step": step, "counts": np.array([step, 1], "<u8").tobytes()} for step in steps]
            connection.execute(schema.histogram.insert(), rows)

    fine = reader.histograms(run_id, 4)
    coarse = reader.histograms(run_id, 4, 0, 3, max_columns=2)

    assert (fine.step.tolist(), fine.sampled.tolist()) == ([0, 1, 3], [1, 2, 1])
    assert fine.counts[120:122].tolist() == [[0, 2, 3], [1, 2, 1]]
    assert (coarse.step.tolist(), coarse.last.tolist(), coarse.sampled.tolist()) == ([0, 3], [1, 3], [3, 1])
    assert coarse.counts[120:122].tolist() == [[2, 3], [3, 1]]
    assert reader.histograms(run_id, 3).counts.shape == (256, 0)


def test_scalars_come_from_the_lowest_rank_and_count_nan(engine: sa.Engine, reader: Reader) -> None:
    with engine.begin() as connection:
        run_id = insert_run(connection, "gpt")
        first, second = (insert_source(connection, run_id, rank) for rank in (0, 1))
        values = [*((first, "loss", s, None if s == 5 else 10.0 - s) for s in range(9)), (second, "loss", 3, 99.0)]
        values += [(second, "a.only", s, float(s)) for s in (0, 4, 100)]
        columns = ("source_id", "name", "step", "value")
        connection.execute(schema.scalar.insert(), [dict(zip(columns, v, strict=True)) for v in values])

    only, loss = reader.scalars(run_id)
    (coarse,) = reader.scalars(run_id, ["loss"], max_points=3)
    (part,) = reader.scalars(run_id, ["loss"], first_step=2, last_step=3)

    assert (only.name, only.step.tolist(), only.low.tolist()) == ("a.only", [0, 4, 100], [0.0, 4.0, 100.0])
    np.testing.assert_array_equal(loss.low, [10, 9, 8, 7, 6, np.nan, 4, 3, 2])
    assert loss.missing.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert (coarse.low.tolist(), coarse.high.tolist()) == ([7.0, 3.0, 2.0], [10.0, 6.0, 2.0])
    assert part.low.tolist() == [8.0, 7.0]


def test_scalars_of_a_resumed_run_are_the_newest_life(engine: sa.Engine, reader: Reader) -> None:
    with engine.begin() as connection:
        run_id = insert_run(connection, "gpt")
        for incarnation, steps, value in [(1, range(10), 1.0), (2, range(4, 7), 2.0)]:
            source = insert_source(connection, run_id, 0, incarnation)
            rows = [{"source_id": source, "name": "loss", "step": s, "value": value} for s in steps]
            connection.execute(schema.scalar.insert(), rows)

    (loss,) = reader.scalars(run_id)

    assert loss.low.tolist() == [1, 1, 1, 1, 2, 2, 2, 1, 1, 1]


def test_rows_has_every_row_of_every_life_in_bounded_batches(engine: sa.Engine, reader: Reader) -> None:
    run = record(engine, 12)
    record(engine, 13, name="another")

    batches = list(reader.rows(run.run_id, batch_rows=100))

    assert max(batch.num_rows for batch in batches) <= 100
    assert batches[0].schema.names[:6] == ["run", "incarnation", "rank", "layer", "role", "step"]
    slots = {(slot.layer, slot.role.value): slot.slot for slot in reader.slots(run.run_id)}
    got = {
        (row["rank"], row["incarnation"], row["step"], slots[row["layer"], row["role"]]): row
        for batch in batches
        for row in batch.to_pylist()
    }
    assert got.keys() == run.rows.keys()
    for key, row in run.rows.items():
        assert {name: got[key][name] for name in row} == row


def test_window_of_one_slot_is_read_by_seeks(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    engine = open_engine(url)
    migrate(engine)
    run = record(engine, 1)
    reader = Reader(url)
    plans: list[str] = []

    @sa.event.listens_for(reader._engine, "before_cursor_execute")
    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "stats" in statement and "EXPLAIN" not in statement:
            cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.extend(row[3] for row in cursor.fetchall())

    reader.series(run.run_id, 3, ["amax", "headroom"])

    assert not [plan for plan in plans if plan.startswith("SCAN stats")]
    assert "SEARCH stats USING PRIMARY KEY (source_id=? AND step=? AND slot=?)" in plans
    reader.close()
    engine.dispose()


def test_integer_division_is_refused_for_an_unknown_database() -> None:
    class Unknown(sa.engine.default.DefaultDialect):
        name = "other"

    with pytest.raises(sa.exc.CompileError, match="int_div does not know how other divides"):
        int_div(schema.stats.c.step, 4).compile(dialect=Unknown())
