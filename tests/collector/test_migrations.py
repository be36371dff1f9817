"""From the first tables, with data, to the newest; and what the reader's queries do with keys that are there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from fp8core.records import FIELDS
from fp8scope_collector.decode import decode_open, decode_stats
from fp8scope_collector.limits import Limits
from fp8scope_collector.storage.engine import migrate, newest_version, open_engine, stored_version, upgrade
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.writer import StatsWriter
from fp8scope_protos.v1 import telemetry_pb2 as pb

STEPS, SLOTS = 40, 6
BIG = ("stats", "scalar", "rollup", "histogram", "extra")


def test_data_of_the_first_tables_is_all_there_in_the_newest(database_url: str) -> None:
    engine = open_engine(database_url)
    _upgrade(engine, "0001")
    _fill_first_tables(engine)
    before = _contents(engine)

    migrate(engine)

    assert stored_version(engine) == newest_version()
    after = _contents(engine)
    for table, rows in before.items():
        columns = list(rows[0])
        assert [{name: row[name] for name in columns} for row in after[table]] == rows, table
    assert [tuple(row.values())[:2] for row in after["coverage"]] == [(1, 0)], "the steps that there are"

    while StatsWriter(engine).catch_up(now_unix_ns=10**18):  # what the first collector does that starts on them
        pass
    reader = Reader(database_url)
    (run,) = reader.runs()
    heat = reader.heatmap(run.id, "amax")
    assert (run.rows, run.last_step) == (STEPS * SLOTS, STEPS - 1)
    assert heat.high.shape[0] == SLOTS
    assert np.nanmax(heat.high) == STEPS - 1 + (SLOTS - 1) / 64
    assert reader.series(run.id, 2, ["amax"]).high["amax"].max() == STEPS - 1 + 2 / 64
    assert len(_contents(engine)["rollup"]) > 0
    reader.close()
    engine.dispose()


def test_every_version_between_can_be_upgraded(database_url: str) -> None:
    engine = open_engine(database_url)
    versions = [f"{number:04d}" for number in range(1, int(newest_version()) + 1)]

    for version in versions:
        _upgrade(engine, version)
        if version == "0001":
            _fill_first_tables(engine)
        assert stored_version(engine) == version

    assert len(_contents(engine)["stats"]) == STEPS * SLOTS
    engine.dispose()


Look = Callable[[Reader, int], object]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wire: Any
) -> Iterator[tuple[str, int]]:
    """A database of many runs, none analysed, and the id of one: a small part of the whole."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('plans')}/test.db"
        name, server = "", None
    else:
        server = request.getfixturevalue("postgres_server")
        name = server.create_database()
        url = server.url(name)
    engine = open_engine(url)
    migrate(engine)
    if server:
        with engine.begin() as connection:
            for table in BIG:
                connection.exec_driver_sql(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    writer = StatsWriter(engine)
    run_id = 0
    for number in range(20):
        opening = decode_open(wire.open(f"run-{number}", slots=60), Limits())
        source = writer.register(opening, now_unix_ns=1)
        run_id = run_id or source.run_id
        scalars = [pb.Scalar(step=step, name=name, value=1.0) for step in range(200) for name in ("loss", "norm")]
        batch = wire.stats(1, wire.columns(0, slots=60, steps=200), scalars=scalars)
        writer.commit([decode_stats(batch, source, Limits())], now_unix_ns=1)
    writer.roll_up()
    engine.dispose()
    yield url, run_id
    if server:
        server.drop_database(name)


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(lambda reader, run: reader.runs(), id="runs"),
        pytest.param(lambda reader, run: reader.progress(run), id="progress"),
        pytest.param(lambda reader, run: reader.heatmap(run, "amax"), id="heat map"),
        pytest.param(lambda reader, run: reader.heatmap(run, "overflow", first_step=150), id="newest columns"),
        pytest.param(lambda reader, run: reader.top(run, by="amax"), id="top"),
        pytest.param(lambda reader, run: reader.series(run, 3, ["amax", "overflow"]), id="series"),
        pytest.param(lambda reader, run: reader.series(run, 3, ["amax"], first_step=90, last_step=110), id="window"),
        pytest.param(lambda reader, run: reader.scalars(run), id="scalars"),
        pytest.param(lambda reader, run: reader.scalars(run, ["loss"]), id="one scalar"),
        pytest.param(lambda reader, run: next(reader.rows(run)), id="export"),
    ],
)
def test_queries_use_keys_and_scan_no_big_table(filled: tuple[str, int], look: Look) -> None:
    """Also on PostgreSQL's tables that nobody analysed."""
    url, run_id = filled
    reader = Reader(url)
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, sql: str, parameters: Any, *_: Any) -> None:
        asked.append((sql, parameters))

    sa.event.listen(reader._engine, "before_cursor_execute", note)
    look(reader, run_id)
    sa.event.remove(reader._engine, "before_cursor_execute", note)

    assert asked
    with reader._engine.connect() as connection:
        for sql, parameters in asked:
            assert sql == "BEGIN" or _scans(connection, sql, parameters) == [], sql
    reader.close()


def test_a_scan_would_be_noticed(filled: tuple[str, int]) -> None:
    url, _ = filled
    reader = Reader(url)
    with reader._engine.connect() as connection:
        assert _scans(connection, "SELECT max(amax) FROM stats WHERE slot = 3", ()) == ["stats"]
        assert _scans(connection, "SELECT max(amax) FROM stats WHERE source_id = 3 AND step = 5", ()) == []
    reader.close()


def _scans(connection: sa.Connection, sql: str, parameters: Any) -> list[str]:
    """The big tables that the database would read from end to end for this query."""
    if connection.dialect.name == "sqlite":
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", parameters)]
        read = [re.match(r"(SCAN|SEARCH) (\w+)(.*)", line) for line in plan]
        return [found[2] for found in read if found and found[2] in BIG and "=?" not in found[3]]
    (plan,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {sql}", parameters or None).scalar_one()
    return [node["Relation Name"] for node in _nodes(plan["Plan"]) if _is_scan(node)]


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", []):
        yield from _nodes(child)


def _is_scan(node: dict[str, Any]) -> bool:
    whole_index = node["Node Type"].startswith("Index") and "Index Cond" not in node
    return (node["Node Type"] == "Seq Scan" or whole_index) and node.get("Relation Name") in BIG


def _upgrade(engine: sa.Engine, version: str) -> None:
    with engine.begin() as connection:
        upgrade(connection, version)


def _fill_first_tables(engine: sa.Engine) -> None:
    """A run as the first version stored it: every value follows from its step and slot."""
    first = sa.MetaData()
    first.reflect(engine)
    tables = first.tables
    rows = [
        {"source_id": 1, "step": step, "slot": slot}
        | {f.name: step + slot / 64 if f.dtype != "uint64" else step for f in FIELDS if f.name in tables["stats"].c}
        for step in range(STEPS)
        for slot in range(SLOTS)
    ]
    roles = ("input", "weight", "grad_output")
    shape = {"module_class": "Fp8Linear", "in_features": 16, "out_features": 32}
    with engine.begin() as connection:
        connection.execute(tables["run"].insert().values(id=1, project="p", name="old", created_unix_ns=5))
        connection.execute(
            tables["source"]
            .insert()
            .values(
                id=1,
                run_id=1,
                rank=0,
                incarnation=1,
                source_uuid="u",
                world_size=1,
                started_unix_ns=5,
                first_seen_unix_ns=5,
                last_seen_unix_ns=6,
                clock_skew_ns=0,
                agent_version="0",
                environment_json="{}",
                up_to_seq=STEPS,
                rows=STEPS * SLOTS,
                last_step=STEPS - 1,
            )
        )
        for slot in range(SLOTS):
            key = {"run_id": 1, "slot": slot}
            connection.execute(
                tables["slot"].insert().values(**key, layer=f"blocks.{slot // 3}", role=roles[slot % 3], **shape)
            )
            recipe = {"incarnation": 1, "format": "E4M3FN", "recipe": "AmaxScaling()", "margin": 0}
            connection.execute(tables["slot_recipe"].insert().values(**key, **recipe))
        connection.execute(tables["stats"].insert(), rows)
        connection.execute(tables["scalar"].insert().values(source_id=1, name="loss", step=3, value=2.5))
        connection.execute(tables["drop_total"].insert().values(source_id=1, reason="ring_full", rows=7))


def _contents(engine: sa.Engine) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables, in the order of their keys."""
    stored = sa.MetaData()
    stored.reflect(engine)
    with engine.connect() as connection:
        return {
            name: [dict(row) for row in connection.execute(table.select().order_by(*table.primary_key)).mappings()]
            for name, table in stored.tables.items()
            if name != "alembic_version"
        }
