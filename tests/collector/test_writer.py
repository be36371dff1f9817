"""The promises of the writing side, the same on SQLite and PostgreSQL: exactly once, exactly as sent."""

from __future__ import annotations

import itertools
import math
import random
import re
import sqlite3
import threading
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from fp8core.records import FIELDS
from fp8scope_collector.decode import Catalogues, decode_finish, decode_open, decode_stats
from fp8scope_collector.limits import Limits
from fp8scope_collector.messages import Batch, Source
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import open_engine
from fp8scope_collector.storage.registry import ContradictionError
from fp8scope_collector.storage.stats_store import StorageError
from fp8scope_collector.storage.writer import Seen, StatsWriter, is_transient
from fp8scope_protos.v1 import telemetry_pb2 as pb

LIMITS = Limits()


@pytest.fixture
def writer(engine: sa.Engine) -> StatsWriter:
    return StatsWriter(engine)


@pytest.fixture
def source(writer: StatsWriter, wire: Any) -> Source:
    return _register(writer, wire.open())


def test_rows_come_back_exactly(engine: sa.Engine, writer: StatsWriter, source: Source, wire: Any) -> None:
    columns = wire.columns(3)
    columns["amax"] = np.array([0.1, 1e-45, np.finfo(np.float32).max, -0.0, 448, np.inf], np.float32)
    columns["numel"] = np.array([0, 1, 2**31, 2**53 + 1, 2**63 - 1, 7], np.uint64)
    columns["sum_sq"] = np.array([1 / 3, 5e-324, 1.7e308, 0, np.inf, 1], np.float64)

    writer.commit([_decode(wire.stats(1, columns), source)], now_unix_ns=1)

    with engine.connect() as connection:
        rows = connection.execute(sa.select(schema.stats).order_by(schema.stats.c.slot)).mappings().all()
    assert [row["slot"] for row in rows] == list(range(6))
    for field in FIELDS:
        stored = np.array([row[field.name] for row in rows])
        np.testing.assert_array_equal(stored.astype(field.dtype), columns[field.name], err_msg=field.name)


def test_absent_columns_and_nan_are_null(engine: sa.Engine, writer: StatsWriter, source: Source, wire: Any) -> None:
    with_nan, without = wire.columns(1), wire.columns(2)
    with_nan["err_sq"][2] = np.nan
    with_nan["scale_min"][:3] = np.nan
    del without["err_sq"], without["underflow"]

    writer.commit([_decode(wire.stats(1, with_nan), source), _decode(wire.stats(2, without), source)], now_unix_ns=1)

    counts = "SELECT step, count(*), count(err_sq), count(scale_min), count(underflow) FROM stats GROUP BY step"
    assert sorted(_all(engine, counts)) == [(1, 6, 5, 3, 6), (2, 6, 0, 6, 0)]


def test_a_resend_of_committed_batches_changes_nothing(
    engine: sa.Engine, writer: StatsWriter, source: Source, wire: Any
) -> None:
    batches = [
        _decode(wire.stats(seq, wire.columns(seq), scalars=[pb.Scalar(step=seq, name="loss")]), source)
        for seq in (1, 2, 5)
    ]
    first = writer.commit(batches, now_unix_ns=1)
    before = _everything(engine)
    changed = wire.columns(1)
    changed["amax"] += 1

    again = writer.commit([*batches, _decode(wire.stats(4, changed), source)], now_unix_ns=2)

    assert first.fresh == (True, True, True)
    assert again.fresh == (False, False, False, False)
    assert first.up_to_seq == again.up_to_seq == {source.id: 5}
    assert _everything(engine) == before


def test_one_group_may_hold_a_batch_twice_and_out_of_order(
    engine: sa.Engine, writer: StatsWriter, source: Source, wire: Any
) -> None:
    batches = {seq: _decode(wire.stats(seq, wire.columns(seq)), source) for seq in (1, 2, 3)}

    committed = writer.commit([batches[seq] for seq in (3, 1, 3, 2, 1)], now_unix_ns=1)

    assert committed.fresh == (True, True, False, True, False)
    assert _all(engine, "SELECT count(*) FROM stats") == [(18,)]
    assert _all(engine, "SELECT up_to_seq, rows, last_step FROM source") == [(3, 18, 3)]


def test_a_row_that_is_sent_again_replaces_the_first(
    engine: sa.Engine, writer: StatsWriter, source: Source, wire: Any
) -> None:
    def versions(*amax: float) -> dict[str, np.ndarray]:
        """The row of step 1 and slot 0, once for each value."""
        one = {name: column[:1] for name, column in wire.columns(1).items()}
        return {name: np.repeat(column, len(amax)) for name, column in one.items()} | {
            "amax": np.array(amax, np.float32)
        }

    writer.commit([_decode(wire.stats(1, versions(10)), source)], now_unix_ns=1)
    writer.commit(
        [_decode(wire.stats(3, versions(30, 31)), source), _decode(wire.stats(2, versions(20)), source)], now_unix_ns=2
    )

    assert _all(engine, "SELECT step, slot, amax FROM stats") == [(1, 0, 31.0)]
    assert _all(engine, "SELECT up_to_seq, rows FROM source") == [(3, 4)]


def test_replacing_rows_keeps_nulls_and_new_rows(
    engine: sa.Engine, writer: StatsWriter, source: Source, wire: Any
) -> None:
    writer.commit([_decode(wire.stats(1, wire.columns(1)), source)], now_unix_ns=1)
    sparse = wire.columns(1, steps=2)
    del sparse["numel"]

    writer.commit([_decode(wire.stats(2, sparse), source)], now_unix_ns=1)

    assert _all(engine, "SELECT count(*), count(numel), count(amax) FROM stats") == [(12, 0, 12)]


def test_scalars_keep_infinities_and_the_last_value(
    engine: sa.Engine, writer: StatsWriter, source: Source, wire: Any
) -> None:
    def scalars(**values: float) -> list[pb.Scalar]:
        return [pb.Scalar(step=1, name=name, value=value) for name, value in values.items()]

    first = pb.StatsBatch(seq=1, scalars=scalars(loss=2.5, norm=math.nan, high=math.inf, low=-math.inf, zero=-0.0))
    second = pb.StatsBatch(seq=2, scalars=scalars(loss=3.5))

    writer.commit([_decode(first, source), _decode(second, source)], now_unix_ns=1)

    assert dict(_all(engine, "SELECT name, value FROM scalar")) == {
        "loss": 3.5,
        "norm": None,
        "high": math.inf,
        "low": -math.inf,
        "zero": 0.0,
    }
    assert _all(engine, "SELECT rows, last_step FROM source") == [(0, None)]


def test_drop_totals_only_grow(engine: sa.Engine, writer: StatsWriter, source: Source) -> None:
    def dropped(seq: int, rows: int) -> Batch:
        return _decode(pb.StatsBatch(seq=seq, drops=[pb.Drop(reason="ring_full", rows=rows)]), source)

    writer.touch({source.id: Seen(5, {"ring_full": 20, "spool_full": 1})})
    writer.commit([dropped(1, 7), dropped(2, 9)], now_unix_ns=1)

    assert dict(_all(engine, "SELECT reason, rows FROM drop_total")) == {"ring_full": 20, "spool_full": 1}


def test_a_sign_of_life_moves_last_seen_forward_only(engine: sa.Engine, writer: StatsWriter, source: Source) -> None:
    writer.touch({source.id: Seen(50, {}), 999: Seen(1, {"unknown source": 1})})
    writer.touch({source.id: Seen(40, {})})

    assert _all(engine, "SELECT last_seen_unix_ns FROM source") == [(50,)]
    assert _all(engine, "SELECT count(*) FROM drop_total") == [(0,)]


def test_the_end_of_a_source_is_recorded(engine: sa.Engine, writer: StatsWriter, source: Source, wire: Any) -> None:
    ending = wire.finish(9, pb.OUTCOME_FAILED, message="RuntimeError: loss is NaN\0")

    writer.commit([decode_finish(ending, source, LIMITS)], now_unix_ns=1)

    found = _all(engine, "SELECT outcome, outcome_message, finished_unix_ns, up_to_seq FROM source")
    assert found == [("failed", "RuntimeError: loss is NaN", ending.finished_unix_ns, 9)]


def test_batches_of_a_deleted_source_are_told_apart(
    engine: sa.Engine, writer: StatsWriter, source: Source, wire: Any
) -> None:
    other = _register(writer, wire.open("other"))
    with engine.begin() as connection:
        connection.execute(sa.delete(schema.run).where(schema.run.c.id == source.run_id))

    committed = writer.commit(
        [_decode(wire.stats(1, wire.columns(1)), each) for each in (source, other)], now_unix_ns=1
    )

    assert committed.fresh == (False, True)
    assert committed.up_to_seq == {other.id: 1}
    assert _all(engine, "SELECT DISTINCT source_id FROM stats") == [(other.id,)]


def test_two_collectors_with_the_same_batches_write_each_once(engine: sa.Engine, database_url: str, wire: Any) -> None:
    """Both take all batches of all sources, in groups of random order: no row is lost, doubled or deadlocked away."""
    engines = [engine, open_engine(database_url)]
    writers = [StatsWriter(each) for each in engines]
    sources = [_register(writers[0], wire.open(rank=rank)) for rank in range(3)]
    batches = [_decode(wire.stats(seq, wire.columns(seq)), source) for seq in range(1, 13) for source in sources]
    failures: list[BaseException] = []

    def collect(writer: StatsWriter, seed: int) -> None:
        chance = random.Random(seed)
        try:
            for start in range(0, len(batches), 9):
                group = batches[start : start + 9]
                chance.shuffle(group)
                writer.commit(group, now_unix_ns=1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=collect, args=(writer, seed)) for seed, writer in enumerate(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert _all(engine, "SELECT count(*) FROM stats") == [(3 * 12 * 6,)]
    assert _all(engine, "SELECT DISTINCT up_to_seq, rows FROM source") == [(12, 72)]
    engines[1].dispose()


# registration


def test_a_source_that_reconnects_is_recognised(writer: StatsWriter, wire: Any) -> None:
    opening = wire.open()
    source = _register(writer, opening)
    writer.commit([_decode(wire.stats(4, wire.columns(1)), source)], now_unix_ns=1)

    again = _register(writer, opening)

    assert (again.id, again.incarnation, again.up_to_seq) == (source.id, 1, 4)


def test_another_process_with_a_taken_incarnation_gets_the_one_after_the_highest(
    writer: StatsWriter, wire: Any
) -> None:
    lives = [_register(writer, wire.open(incarnation=asked)).incarnation for asked in (1, 4, 1, 2)]

    assert lives == [1, 4, 5, 2]


def test_ranks_count_their_incarnations_apart(writer: StatsWriter, wire: Any) -> None:
    lives = [_register(writer, wire.open(rank=rank)).incarnation for rank in (0, 1, 0)]

    assert lives == [1, 1, 2]


def test_a_layer_has_one_number_on_all_ranks(engine: sa.Engine, writer: StatsWriter, wire: Any) -> None:
    def stage(first_layer: int) -> list[pb.Slot]:
        return [
            pb.Slot(slot=i, layer=f"blocks.{first_layer + i}.fc", role=pb.ROLE_INPUT, format="E4M3FN") for i in range(3)
        ]

    numbers = [_register(writer, wire.open(rank=rank, slots=stage(2 * rank))).run_slot.tolist() for rank in range(3)]

    assert numbers == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert _all(engine, "SELECT slot, layer FROM slot ORDER BY slot")[-1] == (6, "blocks.6.fc")


def test_ranks_with_the_same_catalogue_are_numbered_once(engine: sa.Engine, writer: StatsWriter, wire: Any) -> None:
    catalogues = Catalogues()
    openings = [decode_open(wire.open(rank=rank), LIMITS, catalogues) for rank in range(3)]
    first = writer.register(openings[0], now_unix_ns=10)
    asked: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda _c, _cursor, sql, *_: asked.append(sql))

    others = [writer.register(opening, now_unix_ns=10) for opening in openings[1:]]

    assert all(other.run_slot is first.run_slot for other in others)
    assert not any("slot" in re.findall(r"FROM (\w+)", sql) for sql in asked)
    assert len({source.id for source in (first, *others)}) == 3


def test_a_catalogue_is_stored_anew_for_another_life_and_for_a_run_that_was_deleted(
    engine: sa.Engine, writer: StatsWriter, wire: Any
) -> None:
    sources = [_register(writer, wire.open()), _register(writer, wire.open())]
    lives = _all(engine, "SELECT incarnation, count(*) FROM slot_recipe GROUP BY incarnation ORDER BY incarnation")
    with engine.begin() as connection:
        connection.execute(sa.delete(schema.run))

    sources.append(writer.register(decode_open(wire.open(), LIMITS), now_unix_ns=11))

    assert lives == [(1, 6), (2, 6)]
    assert _all(engine, "SELECT count(*) FROM slot") == [(6,)]
    assert _all(engine, "SELECT incarnation, count(*) FROM slot_recipe GROUP BY incarnation") == [(1, 6)]
    assert sources[2].run_slot is not sources[0].run_slot


def test_numbers_of_a_registration_that_was_not_committed_are_not_used(
    engine: sa.Engine, writer: StatsWriter, wire: Any
) -> None:
    @sa.event.listens_for(engine, "commit", once=True)
    def fail(_: sa.Connection) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full") as kept:
        _register(writer, wire.open())
    source = _register(writer, wire.open())

    assert kept.traceback, "what the failed attempt had in memory is still there"
    assert _all(engine, "SELECT count(*) FROM slot") == [(6,)]
    assert _all(engine, "SELECT count(*) FROM slot_recipe") == [(6,)]
    assert source.run_slot.tolist() == [0, 1, 2, 3, 4, 5]


def test_rows_are_stored_under_the_number_of_the_run(engine: sa.Engine, writer: StatsWriter, wire: Any) -> None:
    _register(writer, wire.open())
    reversed_slots = [
        pb.Slot(
            slot=5 - slot.slot,
            layer=slot.layer,
            role=slot.role,
            format=slot.format,
            recipe=slot.recipe,
            in_features=slot.in_features,
            out_features=slot.out_features,
        )
        for slot in reversed(wire.open().slots)
    ]
    source = _register(writer, wire.open(rank=1, slots=reversed_slots))

    writer.commit([_decode(wire.stats(1, wire.columns(1)), source)], now_unix_ns=1)

    sent = wire.columns(1)["amax"]
    assert [amax for (amax,) in _all(engine, "SELECT amax FROM stats ORDER BY slot")] == sent[::-1].tolist()


def test_a_layer_with_another_shape_is_a_contradiction(writer: StatsWriter, source: Source, wire: Any) -> None:
    opening = wire.open(rank=1)
    opening.slots[3].in_features = 17

    sentence = r"layer 'blocks.1.fc' has in_features=16, out_features=32 in run 'run'; rank 1 says in_features=17"
    with pytest.raises(ContradictionError, match=sentence):
        _register(writer, opening)


def test_another_recipe_needs_another_incarnation(
    engine: sa.Engine, writer: StatsWriter, source: Source, wire: Any
) -> None:
    opening = wire.open(rank=1)
    opening.slots[0].recipe = "CurrentScaling()"

    with pytest.raises(
        ContradictionError, match=r"'blocks.0.fc' input is E4M3FN, AmaxScaling\(\), margin 0 in incarna"
    ):
        _register(writer, opening)
    opening.incarnation = 2
    _register(writer, opening)

    recipes = "SELECT incarnation, recipe FROM slot_recipe WHERE slot = 0 ORDER BY incarnation"
    assert _all(engine, recipes) == [(1, "AmaxScaling()"), (2, "CurrentScaling()")]


def test_a_uuid_belongs_to_one_rank(writer: StatsWriter, wire: Any) -> None:
    _register(writer, wire.open(source_uuid="same"))

    with pytest.raises(ContradictionError, match="'same' is rank 0 of run 'run'; this stream says rank 1 of run 'run'"):
        _register(writer, wire.open(source_uuid="same", rank=1))


def test_a_refused_registration_leaves_nothing_behind(engine: sa.Engine, writer: StatsWriter, wire: Any) -> None:
    _register(writer, wire.open(source_uuid="same"))
    before = _everything(engine)

    with pytest.raises(ContradictionError):
        _register(writer, wire.open("new run", source_uuid="same"))

    assert _everything(engine) == before


def test_the_run_has_the_newest_source_s_configuration(engine: sa.Engine, writer: StatsWriter, wire: Any) -> None:
    _register(writer, wire.open(project="p", config_json='{"lr": 1}', tags=["a"], notes="first"))
    _register(writer, wire.open(project="p", config_json='{"lr": 2}'))

    found = _all(engine, "SELECT project, name, config_json, tags_json, notes FROM run")
    assert found == [("p", "run", '{"lr": 2}', '["a"]', "first")]


def refused(by_driver: Exception) -> Exception:
    """As SQLAlchemy would raise it."""
    return sa.exc.DBAPIError.instance("INSERT", None, by_driver, type(by_driver))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (sqlite3.OperationalError("database or disk is full"), True),
        (refused(sqlite3.OperationalError("database is locked")), True),
        (refused(psycopg.errors.DeadlockDetected("deadlock detected")), True),
        (refused(psycopg.errors.AdminShutdown("terminating connection")), True),
        (sa.exc.TimeoutError("pool"), True),
        (StorageError("chDB says no"), True),
        (sqlite3.IntegrityError("NOT NULL"), False),
        (refused(sqlite3.IntegrityError("NOT NULL")), False),
        (refused(psycopg.errors.NotNullViolation("null value")), False),
        (refused(psycopg.errors.NumericValueOutOfRange("out of range")), False),
        (ValueError("ours"), False),
    ],
)
def test_what_a_database_refuses_for_its_values_is_not_tried_again(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient


def test_ranks_that_register_at_once_on_two_collectors_share_run_and_slots(
    engine: sa.Engine, database_url: str, wire: Any
) -> None:
    engines = [engine, open_engine(database_url)]
    ranks = itertools.count()
    failures: list[BaseException] = []

    def register_ranks(writer: StatsWriter) -> None:
        try:
            while (rank := next(ranks)) < 8:
                _register(writer, wire.open(rank=rank))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=register_ranks, args=(StatsWriter(each),)) for each in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    for table, rows in {"run": 1, "source": 8, "slot": 6, "slot_recipe": 6}.items():
        assert _all(engine, f"SELECT count(*) FROM {table}") == [(rows,)], table
    engines[1].dispose()


def _register(writer: StatsWriter, opening: pb.Open) -> Source:
    return writer.register(decode_open(opening, LIMITS), now_unix_ns=10)


def _decode(message: pb.StatsBatch, source: Source) -> Batch:
    return decode_stats(message, source, LIMITS)


def _all(engine: sa.Engine, sql: str) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(sql)]


def _everything(engine: sa.Engine) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables, but for when sources were seen."""
    return {
        table.name: sorted(
            _all(
                engine,
                f"SELECT {', '.join(c.name for c in table.c if c.name != 'last_seen_unix_ns')} FROM {table.name}",
            ),
            key=repr,
        )
        for table in schema.metadata.sorted_tables
    }
