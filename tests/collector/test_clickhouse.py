"""What is ClickHouse's own: its tables, blocks and tokens, chDB's one process, and what a cluster would be told."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sqlalchemy as sa

import fp8scope_collector
from fp8core.records import FIELDS
from fp8scope_collector.decode import decode_open, decode_stats
from fp8scope_collector.limits import Limits
from fp8scope_collector.messages import Batch, Source
from fp8scope_collector.storage import clickhouse, schema
from fp8scope_collector.storage.clickhouse import ClickHouseStats
from fp8scope_collector.storage.clickhouse_block import rows_of
from fp8scope_collector.storage.clickhouse_ddl import create_tables, missing_columns, tune
from fp8scope_collector.storage.engine import migrate, open_engine, open_stats
from fp8scope_collector.storage.history import FIRST_STEP, LAST_STEP, Span, int_div
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.stats_store import StorageError
from fp8scope_collector.storage.writer import StatsWriter
from rollup_reference import compare


@dataclass
class Beside:
    """A SQLite database whose statistics are in chDB."""

    url: str
    engine: sa.Engine
    store: ClickHouseStats
    source: Source

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        with self.store._database.client() as client:
            return [tuple(row) for row in client.query(statement).result_rows]

    def write(self, *batches: Batch) -> None:
        with self.engine.connect() as connection:
            self.store.write(connection, batches)

    def amax(self) -> list[float]:
        span = Span(self.source.id, 1, FIRST_STEP, LAST_STEP)
        with self.engine.connect() as connection:
            return [v for b in self.store.rows(connection, [span], ["amax"]) for v in b["amax"].to_pylist()]


@pytest.fixture
def chdb(tmp_path: Path, wire: Any) -> Iterator[Beside]:
    url = f"sqlite:///{tmp_path}/test.db?stats=chdb:///{tmp_path}/stats"
    engine = open_engine(url)
    migrate(engine)
    store = open_stats(engine)
    assert isinstance(store, ClickHouseStats)
    store.migrate()
    source = StatsWriter(engine, store).register(decode_open(wire.open(), Limits()), now_unix_ns=1)
    yield Beside(url, engine, store, source)
    store.close()
    engine.dispose()


def test_a_group_is_one_part_and_its_token_a_second_time_changes_nothing(chdb: Beside, wire: Any) -> None:
    chdb.sql("SYSTEM STOP MERGES")
    group = [decode_stats(wire.stats(seq, wire.columns(seq)), chdb.source, Limits()) for seq in (1, 2, 3)]

    for _ in range(2):
        chdb.write(*group)
        chdb.store._written.clear()  # as another collector would: it knows nothing
    parts = "SELECT rows FROM system.parts WHERE active AND table = 'stats_by_step'"
    assert chdb.sql(parts) == [(3,)]

    chdb.store._look_up = lambda client, batches: [  # type: ignore[method-assign]  # nor does it look
        chdb.store._written.setdefault(batch.source, 0) for batch in batches
    ]
    chdb.write(*group)
    assert chdb.sql(parts) == [(3,)]


def test_what_comes_in_order_is_not_sorted_again(chdb: Beside, wire: Any) -> None:
    earlier = dataclasses.replace(chdb.source, id=chdb.source.id + 1, run_id=chdb.source.run_id - 1)
    batches = [
        decode_stats(wire.stats(seq, wire.columns(step)), source, Limits())
        for source in (chdb.source, earlier)
        for seq, step in enumerate((255, 256, 300), 1)
    ]
    counter = "SELECT sum(value) FROM system.events WHERE event = 'MergeTreeDataWriterBlocksAlreadySorted'"
    before = chdb.sql(counter)[0][0]

    chdb.write(*batches)

    assert chdb.sql(counter)[0][0] == before + 1
    assert chdb.sql("SELECT count() FROM stats") == [(36,)]


def test_the_view_has_a_row_for_each_tensor_as_the_reader_has(chdb: Beside, wire: Any) -> None:
    columns = wire.columns(4, steps=2)
    columns["err_sq"][3] = np.nan
    backwards = {name: column[::-1].copy() for name, column in columns.items()}
    chdb.write(decode_stats(wire.stats(1, backwards), chdb.source, Limits()))

    names = ["source_id", "step", "slot", *(field.name for field in FIELDS)]
    with chdb.engine.connect() as connection:
        span = Span(chdb.source.id, 1, FIRST_STEP, LAST_STEP)
        rows = pa.Table.from_batches(chdb.store.rows(connection, [span], names[3:]))
    found = chdb.sql(f"SELECT {', '.join(names)} FROM stats ORDER BY step, slot")
    assert found == [tuple(row[name] for name in names) for row in rows.to_pylist()]
    assert len(found) == 12


def test_rows_of_several_blocks_of_slots_come_by_step_and_slot_and_the_last_one_counts(chdb: Beside) -> None:
    number = np.array([*range(300), 700, 511, 512])  # of the slots in the run, by wire id
    sources = [
        dataclasses.replace(chdb.source, id=chdb.source.id + i, run_slot=number, role=np.zeros(303, np.int8))
        for i in (0, 1)
    ]
    chance = np.random.default_rng(3)
    expected: dict[tuple[int, int, int], tuple[float, int | None]] = {}
    batches = []
    for seq in (1, 2, 3):
        for source in sources:
            step = chance.integers(3 * seq, 3 * seq + 4, 500)  # a batch of a few steps, in any order, some rows twice
            slot = chance.integers(0, 303, 500)
            columns = {"amax": chance.random(500, np.float32)}
            if seq != 2:
                columns["overflow"] = chance.integers(0, 9, 500)
            batches.append(Batch(source, seq, 1, step, slot, columns))
            counts = columns["overflow"].tolist() if seq != 2 else [None] * 500
            for row in zip(step.tolist(), number[slot].tolist(), columns["amax"].tolist(), counts, strict=True):
                expected[source.id, row[0], row[1]] = row[2:]
    batches.sort(key=lambda batch: (batch.source.id, batch.seq))
    chdb.write(*batches[:4])
    chdb.write(*batches[4:])

    engine = chdb.engine
    with engine.begin() as connection:  # the second source is a row of the database, too
        row = connection.execute(sa.select(schema.source)).mappings().one()
        values = dict(row) | {"id": sources[1].id, "rank": 7, "source_uuid": "another", "last_step": 12}
        connection.execute(sa.insert(schema.source).values(values))
    spans = [Span(sources[1].id, 1, 4, 10), Span(sources[0].id, 1, 0, 8)]
    for order in (spans, spans[::-1]):
        for slots in (None, [700], [3, 299], [511, 0, 700, 255]):
            with engine.connect() as connection:
                found = chdb.store.rows(connection, order, ["amax", "overflow"], slots=slots, batch_rows=170)
                rows = [tuple(row.values()) for batch in found for row in batch.to_pylist()]
            assert rows == [
                (*key, *expected[key])
                for span in order
                for key in sorted(expected)
                if key[0] == span.source_id and span.first_step <= key[1] <= span.last_step
                if slots is None or key[2] in slots
            ]
    with engine.connect() as connection:
        steps = sorted({key[1] for key in expected if key[0] == sources[1].id}, reverse=True)
        assert chdb.store.last_steps(connection, sources[1].id, 4) == steps[:4]
        assert chdb.store.last_steps(connection, sources[1].id, 99) == steps
    with engine.begin() as connection:
        below = sum(key[0] == sources[1].id and key[1] < 6 for key in expected)
        assert chdb.store.prune(connection, sources[1].id, 6) == below


@pytest.mark.parametrize("most", [1, 4, 100])  # rows at a time
def test_rows_are_the_same_wherever_blocks_are_cut(most: int) -> None:
    lists = [  # of a (source, step), batch after batch: slots, and amax, which is absent in one
        (8, 3, [0, 1, 2, 5], [1.0, 2.0, 3.0, 4.0]),
        (8, 4, [1, 2], [5.0, 6.0]),
        (8, 4, [0, 2, 3], [7.0, np.nan, 8.0]),
        (8, 4, [3], [9.0]),
        (2, 4, [1, 2], []),
        (2, 4, [2], [10.0]),
        (2, 5, [], []),
        (2, 6, [7], [11.0]),
    ]
    schema = pa.schema(
        [
            ("source_id", pa.int64()),
            ("step", pa.int64()),
            ("slot", pa.list_(pa.int32())),
            ("amax", pa.list_(pa.float32())),
        ]
    )
    whole = pa.RecordBatch.from_arrays([pa.array(column) for column in zip(*lists, strict=True)], schema=schema)
    expected = [
        (8, 3, 0, 1.0), (8, 3, 1, 2.0), (8, 3, 2, 3.0), (8, 3, 5, 4.0),
        (8, 4, 0, 7.0), (8, 4, 1, 5.0), (8, 4, 2, None), (8, 4, 3, 9.0),
        (2, 4, 1, None), (2, 4, 2, 10.0), (2, 6, 7, 11.0),
    ]  # fmt: skip

    for cuts in itertools.product([False, True], repeat=len(lists) - 1):
        ends = [place for place, cut in enumerate(cuts, 1) if cut]
        blocks = [whole.slice(start, end - start) for start, end in pairwise([0, *ends, len(lists)])]
        batches = list(rows_of(blocks, ["amax"], most))
        assert [tuple(row.values()) for batch in batches for row in batch.to_pylist()] == expected, cuts
        assert max(batch.num_rows for batch in batches) <= most


@pytest.mark.parametrize(("most", "queries"), [(2048, 1), (12, 2), (11, 3), (3, 5)])
def test_no_query_is_about_more_steps_of_all_tensors_than_can_be_sorted_in_memory(
    chdb: Beside, wire: Any, monkeypatch: pytest.MonkeyPatch, most: int, queries: int
) -> None:
    writer = StatsWriter(chdb.engine, chdb.store)
    spans = []
    for rank in range(5):
        source = writer.register(decode_open(wire.open(rank=rank), Limits()), now_unix_ns=1)
        chdb.write(decode_stats(wire.stats(1, wire.columns(1, steps=4)), source, Limits()))
        spans.append(Span(source.id, 1, 1, 4))
    expected = [(span.source_id, step, slot) for span in spans for step in range(1, 5) for slot in range(6)]
    asked: list[object] = []
    ask = chdb.store._blocks_of
    monkeypatch.setattr(chdb.store, "_blocks_of", lambda *query: asked.append(query) or ask(*query))
    monkeypatch.setattr(clickhouse, "_STEPS_AT_ONCE", most)

    def read(slots: list[int] | None) -> list[tuple[int, ...]]:
        with chdb.engine.connect() as connection:
            found = pa.Table.from_batches(chdb.store.rows(connection, spans, [], slots=slots))
        return [*zip(*(found[name].to_pylist() for name in ("source_id", "step", "slot")), strict=True)]

    assert (read(None), len(asked)) == (expected, queries)
    asked.clear()
    assert (read([2]), len(asked)) == ([row for row in expected if row[2] == 2], 1)


def test_of_absent_and_present_columns_in_one_group_only_absent_ones_are_null(chdb: Beside, wire: Any) -> None:
    whole, partial = (decode_stats(wire.stats(seq, wire.columns(seq)), chdb.source, Limits()) for seq in (1, 2))
    partial = dataclasses.replace(partial, columns={"amax": partial.columns["amax"]})

    chdb.write(whole, partial)

    names = ", ".join(f"countIf({field.name} IS NULL)" for field in FIELDS)
    (first,), (second,) = (chdb.sql(f"SELECT {names} FROM stats WHERE seq = {seq}") for seq in (1, 2))
    assert first == tuple(int(np.isnan(whole.columns[field.name]).sum()) for field in FIELDS)
    assert second == tuple(0 if field.name == "amax" else 6 for field in FIELDS)


def test_tables_are_tuned_where_the_server_knows_the_setting(chdb: Beside) -> None:
    (made,) = chdb.sql("SELECT create_table_query FROM system.tables WHERE name = 'stats_by_step'")

    assert "auto_statistics_types = ''" in made[0]
    assert "merge_selector_base = 20" in made[0]
    assert "vertical_merge_algorithm_min_rows_to_activate = 1" in made[0]
    assert "min_columns_to_activate_adaptive_write_buffer = 1" in made[0]
    assert tune(None, ["merge_selector_base"]) == ["ALTER TABLE stats_by_step MODIFY SETTING merge_selector_base = 20"]
    assert tune("gpus", []) == []


def test_an_insert_is_one_file_in_a_folder_and_parts_that_others_may_read_are_as_always(
    chdb: Beside, wire: Any
) -> None:
    chdb.write(decode_stats(wire.stats(1, wire.columns(1)), chdb.source, Limits()))

    assert chdb.sql("SELECT part_storage_type FROM system.parts WHERE table = 'stats_by_step'") == [("Packed",)]
    assert tune(None, ["min_bytes_for_full_part_storage"]) == tune("gpus", ["min_bytes_for_full_part_storage"]) == []


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_merges_get_what_others_leave_of_the_processors(chdb: Beside) -> None:
    threads = [*Path("/proc/self/task").glob("*")]
    merging = [int(each.name) for each in threads if (each / "comm").read_text().strip() == "MergeMutate"]

    assert merging
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in merging} == {10}


def test_what_two_collectors_wrote_twice_is_read_once(chdb: Beside, wire: Any) -> None:
    batches = [decode_stats(wire.stats(seq, wire.columns(seq)), chdb.source, Limits()) for seq in (1, 2)]
    chdb.sql("SYSTEM STOP MERGES")
    chdb.write(*batches)
    once = chdb.amax()

    chdb.store._look_up = lambda client, batches: [  # type: ignore[method-assign]  # before the other's was to be seen
        chdb.store._written.setdefault(batch.source, 0) for batch in batches
    ]
    chdb.store._written.clear()
    chdb.write(batches[1])

    assert chdb.sql("SELECT count() FROM stats_by_step") == [(3,)]
    assert chdb.sql("SELECT count() FROM stats") == [(12,)]
    assert chdb.amax() == once
    assert len(once) == 12


def test_a_batch_whose_rows_a_later_one_replaced_is_still_known(chdb: Beside, wire: Any) -> None:
    first, later = (decode_stats(wire.stats(seq, wire.columns(1)), chdb.source, Limits()) for seq in (1, 2))
    chdb.write(first, later)
    chdb.store._written.clear()

    chdb.write(first)

    assert chdb.sql("SELECT groupArray(seq) FROM (SELECT seq FROM stats_by_step ORDER BY seq)") == [([1, 2],)]


@pytest.mark.parametrize("stored", [False, True])  # when it fails
def test_an_insert_that_fails_while_the_next_group_is_laid_out_loses_and_doubles_nothing(
    chdb: Beside, wire: Any, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    writer = StatsWriter(chdb.engine, chdb.store)
    groups = [_batches(chdb, wire, seqs) for seqs in ((1, 2), (3, 4), (5, 6))]
    insert, failures = chdb.store._insert, [True, False, True]
    laid_out = threading.Event()

    def fails(client: Any, block: Any, token: str) -> None:
        laid_out.wait(10)
        fail = bool(failures) and failures.pop(0)
        if stored or not fail:
            insert(client, block, token)
        if fail:
            raise StorageError("gone")

    monkeypatch.setattr(chdb.store, "_insert", fails)
    todo = deque(groups)

    def look_ahead() -> None:
        if todo:
            writer.prepare(todo[0])
        laid_out.set()

    while todo:
        group = todo.popleft()
        laid_out.clear()
        try:
            writer.commit(group, now_unix_ns=1, meanwhile=look_ahead)
        except StorageError:
            todo.extendleft([batch] for batch in reversed(group))  # as another group, with another token
    writer.roll_up()

    assert not failures
    expected = [value for group in groups for batch in group for value in batch.columns["amax"].tolist()]
    assert chdb.amax() == expected
    assert chdb.sql("SELECT count() FROM stats") == [(len(expected),)]
    assert chdb.sql("SELECT groupArray(step) FROM (SELECT step FROM stats_by_step FINAL ORDER BY step)") == [
        ([1, 2, 3, 4, 5, 6],)
    ]
    compare(chdb.engine, chdb.store)


def test_a_group_other_than_the_one_prepared_is_laid_out_as_it_is(chdb: Beside, wire: Any) -> None:
    first, second, third = ([batch] for batch in _batches(chdb, wire, (1, 2, 3)))
    chdb.store.prepare(second)

    chdb.write(*first)
    chdb.write(*second)
    chdb.store.prepare(first)
    chdb.write(*third)

    assert chdb.amax() == [value for [batch] in (first, second, third) for value in batch.columns["amax"].tolist()]


def test_what_fails_meanwhile_is_raised_when_the_insert_has_ended(chdb: Beside, wire: Any) -> None:
    group = _batches(chdb, wire, (1,))

    def breaks() -> None:
        raise ValueError("broken")

    with chdb.engine.connect() as connection, pytest.raises(ValueError, match="broken"):
        chdb.store.write(connection, group, breaks)
    chdb.write(*group)

    assert chdb.amax() == group[0].columns["amax"].tolist()
    assert chdb.sql("SELECT count() FROM stats") == [(6,)]


def _batches(chdb: Beside, wire: Any, seqs: Sequence[int]) -> list[Batch]:
    return [decode_stats(wire.stats(seq, wire.columns(seq)), chdb.source, Limits()) for seq in seqs]


def test_runs_of_two_partitions_are_two_inserts(chdb: Beside, wire: Any) -> None:
    far = dataclasses.replace(chdb.source, id=77, run_id=1234)
    batches = [decode_stats(wire.stats(1, wire.columns(1)), source, Limits()) for source in (chdb.source, far)]

    chdb.write(*batches)

    parts = "SELECT partition, rows FROM system.parts WHERE active AND table = 'stats_by_step' ORDER BY partition"
    assert chdb.sql(parts) == [("0", 1), ("12", 1)]


def test_a_column_that_an_older_version_did_not_have_is_added(chdb: Beside) -> None:
    chdb.sql("DROP VIEW stats")
    chdb.sql("ALTER TABLE stats_by_step DROP COLUMN subnormal")
    chdb.sql("CREATE VIEW stats AS SELECT 1 AS one")

    chdb.store.migrate()

    names = [field.name for field in FIELDS]
    for table in ("stats_by_step", "stats"):
        columns = [row[0] for row in chdb.sql(f"DESCRIBE TABLE {table}")]
        assert set(columns) - {"slot_block"} == {"run_id", "source_id", "step", "slot", "seq", *names}


def test_deleting_gives_the_space_back(chdb: Beside, wire: Any) -> None:
    chdb.write(decode_stats(wire.stats(1, wire.columns(0, steps=50)), chdb.source, Limits()))

    with chdb.engine.connect() as connection:
        chdb.store.delete(connection, [chdb.source.id])

    assert chdb.sql("SELECT sum(rows) FROM system.parts WHERE active AND table LIKE 'stats%'") == [(0,)]


def test_a_copy_made_as_backup_says_has_every_row_and_metrics_know_the_size(
    start_collector: Callable[..., Any], connect: Callable[..., Any], wire: Any, run: Callable[..., Any], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/test.db?stats=chdb:///{tmp_path}/stats"
    collector = start_collector(url)
    opening = wire.open()
    stream = connect(collector.grpc, opening)
    for seq in (1, 2, 3):
        stream.send(stats=wire.stats(seq, wire.columns(seq)))
    stream.wait_ack(3)

    said = json.loads(run("backup", str(tmp_path / "copy.db"), "--db", url, "--json").stdout)["missing"]
    stream.send(stats=wire.stats(4, wire.columns(4)))
    stream.wait_ack(4)
    assert collector.terminate() == 0
    command = said.partition("`")[2].partition("`")[0].replace("COPY", str(tmp_path / "copied"))
    subprocess.run(command.split(), check=True)

    copy = f"sqlite:///{tmp_path}/copy.db?stats=chdb:///{tmp_path}/copied"
    again = start_collector(copy)
    stream = connect(again.grpc, opening)
    assert stream.opened.up_to_seq == 3, "batch 4 is in the copied statistics and not in the copied database"
    stream.send(stats=wire.stats(4, wire.columns(4)))
    stream.wait_ack(4)
    assert 500 < again.metrics()[("fp8scope_statistics_bytes",)] < 1_000_000
    assert again.terminate() == 0
    with contextlib.closing(Reader(copy)) as reader:
        rows = pa.Table.from_batches(reader.rows(reader.run("run").id))
    assert rows["step"].to_pylist() == [step for step in (1, 2, 3, 4) for _ in range(6)]


def test_a_clickhouse_server_is_backed_up_by_its_own_command() -> None:
    one = ClickHouseStats(sa.make_url("clickhouse://user:secret@host:8123/telemetry"))
    cluster = ClickHouseStats(sa.make_url("clickhouse://user:secret@host:8123/telemetry?cluster=all"))

    assert "BACKUP TABLE telemetry.stats_by_step TO Disk(" in one.backup_hint
    assert "BACKUP TABLE telemetry.stats_by_step_local ON CLUSTER 'all' TO Disk(" in cluster.backup_hint
    assert "secret" not in one.backup_hint + cluster.backup_hint


@pytest.mark.parametrize(
    ("stats", "sentence"),
    [
        ("nonsense", "stats='nonsense' in the database's URL is malformed; expected chdb:///FOLDER or clickhouse://"),
        ("mysql://me:secret@host/db", r"stats='mysql://me:\*\*\*@host/db' in the database's URL is no such URL"),
        ("chdb://", "is no such URL; expected chdb:///FOLDER"),
    ],
)
def test_a_url_that_cannot_hold_statistics_is_explained(tmp_path: Path, stats: str, sentence: str) -> None:
    with pytest.raises(StorageError, match=sentence):
        open_stats(open_engine(f"sqlite:///{tmp_path}/test.db?stats={stats}"))


def test_a_server_that_does_not_answer_is_explained(tmp_path: Path, free_port: Callable[[], int]) -> None:
    port = free_port()
    store = open_stats(open_engine(f"sqlite:///{tmp_path}/test.db?stats=clickhouse://me:secret@127.0.0.1:{port}/base"))

    with pytest.raises(StorageError, match=rf"statistics in clickhouse://me:\*\*\*@127.0.0.1:{port}/base cannot be"):
        store.migrate()


def test_clickhouse_understands_what_a_cluster_is_told(chdb: Beside, run: Callable[..., Any]) -> None:
    """As far as one process can tell: it parses each statement, and makes the tables with the engines of one server."""
    printed = run("clickhouse-ddl", "--cluster", "gpus").stdout

    statements = create_tables("gpus")
    assert printed == "\n\n".join(f"{statement};" for statement in statements) + "\n"
    for statement in [*statements, *missing_columns("gpus", [])]:
        assert chdb.sql(f"EXPLAIN AST {statement}")
    assert all("ON CLUSTER 'gpus'" in statement for statement in statements)
    assert "ReplicatedReplacingMergeTree('/clickhouse/tables/{shard}/{database}/{table}', '{replica}')" in printed
    assert "Distributed('gpus', currentDatabase(), stats_by_step_local, source_id)" in printed


def test_bucket_arithmetic_rounds_down_on_clickhouse_too(chdb: Beside) -> None:
    number = sa.literal_column("number", sa.BigInteger)
    for width in (1, 3, 16, 4096):
        statement = sa.select(int_div(number, width)).select_from(sa.text("numbers(10000)"))
        found = chdb.sql(chdb.store._sql(statement))
        assert [row[0] for row in found] == (np.arange(10000) // width).tolist()


def test_no_query_divides_columns_with_pythons_operator() -> None:
    """`//` silently becomes `/` on ClickHouse's dialect: queries say `int_div`."""
    assert _divided_columns("query = sa.select(stats.c.step // 16)") == ["stats.c.step // 16"]
    assert _divided_columns("x = sa.func.max(step) // width") == ["sa.func.max(step) // width"]
    assert _divided_columns("x = first_step // width; y = len(rows) // 2") == []
    for path in Path(fp8scope_collector.__file__).parent.rglob("*.py"):
        assert _divided_columns(path.read_text()) == [], path


def _divided_columns(source: str) -> list[str]:
    """The floor divisions of something that looks like a column or an SQL function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.FloorDiv):
            names = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            if names & {"c", "func", "columns"}:
                found.append(ast.unparse(node))
    return found


def test_rows_arrive_in_arrows_types(chdb: Beside, wire: Any) -> None:
    chdb.write(decode_stats(wire.stats(1, wire.columns(1)), chdb.source, Limits()))

    with chdb.engine.connect() as connection:
        (batch,) = chdb.store.rows(connection, [Span(chdb.source.id, 1, 0, 9)], ["amax", "numel", "sum_sq"])

    assert batch.schema.types[3:] == [pa.float32(), pa.uint64(), pa.float64()]
