"""Statistics in ClickHouse, or in chDB, which is ClickHouse inside this process; everything else stays relational.

Both speak the same SQL through clickhouse-connect. A row has its batch's number, so that the data itself says what is
there: a batch comes again after a crash between ClickHouse's insert and the relational commit, and is looked up before
it is written (docs/adr/0036). Blocks are large, each touches one partition and carries a token; what two collectors on
both sides of a partition may still write twice is one row when it is read (`final`).

Rows are ordered by run, blocks of 256 steps, slot, source, step: one tensor's window is a few granules, and so is the
newest window of all tensors (docs/adr/0037). `clickhouse_ddl` makes the tables, and `clickhouse_reach` reaches
them: a chDB folder belongs to one process, and a collector that has one lets others read through it.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch, Source
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.clickhouse_block import Block, Blocks
from fp8scope_collector.storage.clickhouse_ddl import (
    RUNS_A_PARTITION,
    STATS,
    STATS_STEP,
    STEPS_A_BLOCK,
    create_tables,
    local,
    missing_columns,
    tune,
)
from fp8scope_collector.storage.clickhouse_http import ReadService
from fp8scope_collector.storage.clickhouse_reach import Database, merge_when_idle
from fp8scope_collector.storage.history import Span, int_div
from fp8scope_collector.storage.stats_store import Pace, row_schema

_KEY = ("run_id", "source_id", "step", "slot", "seq")
_stats = sa.table(
    STATS, *(sa.column(name, sa.BigInteger) for name in _KEY), *(sa.column(field.name) for field in FIELDS)
)
_stats_step = sa.table(STATS_STEP, *(sa.column(name, sa.BigInteger) for name in ("run_id", "source_id", "step")))
_SORT_BYTES = 128 << 20  # what does not fit is sorted on disk: an export's memory does not grow with the run
_SPANS = 1000  # of one query: its text has a limit
_FIRST_ROWS = 64  # batches whose first row is looked up in one query


class ClickHouseStats:
    """The tables `stats` and `stats_step` of one ClickHouse database or chDB folder; see `StatsStore`.

    Nothing is opened before it is needed. A chDB folder is this process's from `migrate`, or the first change, to
    `close`; what only reads has it for no longer than a query, or reads through the process that has it.
    """

    pace = Pace(  # each insert is a part that has to be merged
        group_rows=131_072, rows_under_way=393_216, under_way_s=0.6, window=64, pause_s=0.2, rollup_rows=1_048_576
    )
    in_pieces = False  # a few rows cost as much as all those of their blocks

    def __init__(self, url: sa.URL) -> None:
        """`url`: chdb:///FOLDER or clickhouse://USER:PASSWORD@HOST:PORT/DATABASE, with ?cluster=NAME for a cluster."""
        self.cluster = str(url.query["cluster"]) if "cluster" in url.query else None
        self._database = Database(url)
        self._service: ReadService | None = None  # what lets others read the folder
        self._blocks, self._spare = Blocks(), Blocks()
        self._prepared: tuple[list[Batch], Block] | None = None  # in `_spare`
        self._written: weakref.WeakKeyDictionary[Source, int] = weakref.WeakKeyDictionary()  # highest seq known stored

    def migrate(self) -> None:
        """Creates the tables, and adds columns that this version has and they have not."""
        if self._database.folder:
            self._database.folder.mkdir(parents=True, exist_ok=True)
        with self._database.client(changing=True) as client:
            for statement in create_tables(self.cluster):
                client.command(statement)
            for table in dict.fromkeys((local(STATS, self.cluster), STATS)):
                known = {row[0] for row in client.query(f"DESCRIBE TABLE {table}").result_rows}
                for statement in missing_columns(table, self.cluster, known):
                    client.command(statement)
            settings = {row[0] for row in client.query("SELECT name FROM system.merge_tree_settings").result_rows}
            for table in (STATS, STATS_STEP):
                for statement in tune(table, self.cluster, settings):
                    client.command(statement)
        if self._database.folder:
            merge_when_idle()

    def offer(self) -> None:
        """Lets other processes read the chDB folder that this one has; a server does that itself."""
        if self._database.folder and not self._service:
            self._service = ReadService(self._database.folder)

    def size_bytes(self) -> int:
        """The parts that count, on disk, as ClickHouse compressed them; of a cluster one replica of each shard."""
        parts = f"cluster('{self.cluster}', system.parts)" if self.cluster else "system.parts"
        tables = ", ".join(f"'{local(table, self.cluster)}'" for table in (STATS, STATS_STEP))
        with self._database.client() as client:
            database = client.query("SELECT currentDatabase()").result_rows[0][0]
            total = client.query(
                f"SELECT sum(bytes_on_disk) FROM {parts} WHERE active AND database = {{own:String}}"
                f" AND table IN ({tables})",
                parameters={"own": database},
            )
            return int(total.result_rows[0][0])

    def write(
        self, connection: sa.Connection, batches: Sequence[Batch], meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Writes what is not there yet: durable when it returns, whatever becomes of the caller's transaction.

        Inserts are made in a thread of their own, `meanwhile` in the caller's.
        """
        batches = [batch for batch in batches if batch.rows]
        if not batches:
            return
        with self._database.client(changing=True) as client:
            self._look_up(client, [batch for batch in batches if batch.source not in self._written])
            new = [batch for batch in batches if batch.seq > self._written[batch.source]]
            parts = _by_partition(new)
            prepared = None
            if self._prepared and parts == [self._prepared[0]]:
                prepared, self._prepared = self._prepared[1], None
                self._blocks, self._spare = self._spare, self._blocks
            blocks = self._blocks

            def insert() -> None:
                for part in parts:
                    self._insert(client, STATS, prepared or blocks.rows(part), _token(part))
                self._insert(client, STATS_STEP, blocks.steps(batches), _token(batches))

            try:
                _beside(insert, meanwhile)
            except BaseException:
                for batch in new:  # who knows: looked up again before the next attempt
                    self._written.pop(batch.source, None)
                raise
            for source in {batch.source for batch in batches} - {batch.source for batch in new}:
                del self._written[source]  # all of them were there: the next may be, too
            for batch in new:
                self._written[batch.source] = batch.seq

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Lays out their block, while that of the write before is still inserted."""
        parts = _by_partition([batch for batch in batches if batch.rows])
        if len(parts) == 1:
            self._prepared = None
            self._prepared = parts[0], self._spare.rows(parts[0])

    def delete(self, connection: sa.Connection, source_ids: Sequence[int]) -> None:
        """Removes everything of these sources, and gives its space back before it returns."""
        if source_ids:
            runs = self._runs(connection, source_ids)
            for table in (_stats, _stats_step):
                which = sa.and_(table.c.run_id.in_(sorted(set(runs.values()))), table.c.source_id.in_(list(source_ids)))
                self._change(table.name, "ALTER TABLE {} DELETE WHERE {}", which, {"mutations_sync": 2})

    def prune(self, connection: sa.Connection, source_id: int, below_step: int) -> int:
        """Removes the source's rows of the steps below `below_step`; their space comes back with the next merges."""
        span = Span(source_id, 0, 0, below_step - 1)
        if not (runs := self._runs(connection, [source_id])) or below_step <= 0:
            return 0
        which = _within(runs[source_id], [span])
        with self._database.client(changing=True) as client:
            count = sa.select(sa.func.count()).select_from(_stats).where(which)
            rows = int(client.query(self._sql(count), settings={"final": 1}).result_rows[0][0])
        if rows:
            self._change(STATS, "DELETE FROM {} WHERE {}", which, {"lightweight_deletes_sync": 2})
            old = sa.and_(_stats_step.c.source_id == source_id, _stats_step.c.step < below_step)
            self._change(STATS_STEP, "DELETE FROM {} WHERE {}", old, {"lightweight_deletes_sync": 2})
        return rows

    def last_steps(self, connection: sa.Connection, source_id: int, count: int) -> list[int]:
        """The newest `count` recorded steps of a source, descending, from the narrow table of steps."""
        step = _stats_step.c.step
        query = sa.select(step).distinct().where(_stats_step.c.source_id == source_id).order_by(step.desc())
        with self._database.client() as client:
            return [row[0] for row in client.query(self._sql(query.limit(count))).result_rows]

    def steps(self, connection: sa.Connection, spans: Sequence[Span]) -> list[tuple[int, int]]:
        """The recorded steps of the spans as (source id, step), from the narrow table of steps."""
        if not spans:
            return []
        table = _stats_step.c
        inside = [
            sa.and_(table.source_id == span.source_id, table.step.between(span.first_step, span.last_step))
            for span in spans
        ]
        query = sa.select(table.source_id, table.step).distinct().where(sa.or_(*inside))
        with self._database.client() as client:
            return [(source_id, step) for source_id, step in client.query(self._sql(query)).result_rows]

    def rows(
        self,
        connection: sa.Connection,
        spans: Sequence[Span],
        fields: Sequence[str],
        *,
        slots: Sequence[int] | None = None,
        every: int = 1,
        batch_rows: int = 50_000,
    ) -> Iterator[pa.RecordBatch]:
        """The spans' rows, those beside each other by one query; of a row that is there twice the later batch's."""
        layout = row_schema(fields)
        runs = self._runs(connection, [span.source_id for span in spans])
        settings = {"final": 1, "max_block_size": batch_rows, "max_bytes_before_external_sort": _SORT_BYTES}
        row, there = _stats.c, _stats_step.c
        for run_id, some in _together(spans, runs):
            query = sa.select(*(row[name] for name in layout.names)).where(_within(run_id, some))
            if slots is not None:
                query = query.where(row.slot.in_(list(slots)))
            if every > 1:
                firsts = sa.select(there.source_id, sa.func.min(there.step)).where(
                    there.run_id == run_id, _of_spans(there, some)
                )
                firsts = firsts.group_by(there.source_id, int_div(there.step, every))
                query = query.where(sa.tuple_(row.source_id, row.step).in_(firsts))
            place = [_by_source(row.source_id, some, range(len(some)))] if len(some) > 1 else []
            query = query.order_by(*place, row.step, row.slot)
            with self._database.client() as client:
                free = {name: to for name, to in settings.items() if not client.server_settings[name].readonly}
                with client.query_arrow_stream(self._sql(query), settings=free) as blocks:
                    for block in blocks:
                        table = (
                            pa.table(block) if not isinstance(block, pa.RecordBatch) else pa.Table.from_batches([block])
                        )
                        yield from table.cast(layout).to_batches(max_chunksize=batch_rows)

    def close(self) -> None:
        """Closes the connections, and ends what others read through them."""
        if self._service:
            self._service.close()
            self._service = None
        self._database.close()

    def _look_up(self, client: Any, batches: Sequence[Batch]) -> None:
        """Learns which of these batches, all from sources of which none was missing yet, are stored already.

        A batch is stored whole or not at all, in one part, so its first row says it; a later number in that row means
        that a later batch replaced it.
        """
        for batch in batches:
            self._written.setdefault(batch.source, 0)
        row = _stats.c
        key = sa.tuple_(row.run_id, int_div(row.step, STEPS_A_BLOCK), row.slot, row.source_id, row.step)
        for start in range(0, len(batches), _FIRST_ROWS):
            some = batches[start : start + _FIRST_ROWS]
            firsts = {
                (batch.source.id, int(batch.step[0]), int(batch.source.run_slot[batch.slot[0]])): batch
                for batch in some
            }
            keys = [
                (batch.source.run_id, step // STEPS_A_BLOCK, slot, source_id, step)
                for (source_id, step, slot), batch in firsts.items()
            ]
            query = sa.select(row.source_id, row.step, row.slot, sa.func.max(row.seq)).where(key.in_(keys))
            query = query.group_by(row.source_id, row.step, row.slot)
            stored = {(*found[:3],): found[3] for found in client.query(self._sql(query)).result_rows}
            for batch in some:
                first = (batch.source.id, int(batch.step[0]), int(batch.source.run_slot[batch.slot[0]]))
                if stored.get(first, 0) >= batch.seq:
                    self._written[batch.source] = max(self._written[batch.source], batch.seq)

    def _insert(self, client: Any, table: str, block: Block, token: str) -> None:
        """One block: on return it is on disk, and the same token again changes nothing."""
        settings = {"insert_deduplication_token": f"{table} {token}", "async_insert": 0}
        settings["optimize_on_insert"] = 0  # rows that replace others do so in merges and for readers
        if self.cluster:
            settings |= {"distributed_foreground_insert": 1}
        columns, data = block
        sent = data if self._database.folder else bytes(data)
        client.raw_insert(table, columns, sent, settings=settings, fmt="Native")

    def _change(self, table: str, statement: str, which: sa.ColumnElement[bool], settings: dict[str, int]) -> None:
        where = f"{local(table, self.cluster)} ON CLUSTER '{self.cluster}'" if self.cluster else table
        with self._database.client(changing=True) as client:
            client.command(statement.format(where, self._sql(which)), settings=settings)

    def _runs(self, connection: sa.Connection, source_ids: Sequence[int]) -> dict[int, int]:
        """The run of each source."""
        source = schema.source.c
        query = sa.select(source.id, source.run_id).where(source.id.in_(list(set(source_ids))))
        return {row.id: row.run_id for row in connection.execute(query)}

    def _sql(self, element: sa.ClauseElement) -> str:
        return str(element.compile(dialect=self._database.dialect, compile_kwargs={"literal_binds": True}))

    @property
    def backup_hint(self) -> str:
        """In words; `backup` says it."""
        if folder := self._database.folder:
            return (
                f"statistics are not in it: they are in the folder {folder}, which is the collector's while it runs. "
                f"Stop it and copy the folder, after this (`cp -a {folder} COPY`), and give the copy as "
                "?stats=chdb:///COPY with the copied database"
            )
        database = self._database.url.database or "default"
        tables = ", ".join(f"TABLE {database}.{local(table, self.cluster)}" for table in (STATS, STATS_STEP))
        where = f" ON CLUSTER '{self.cluster}'" if self.cluster else ""
        return (
            f"statistics are not in it: they are in {self._database.shown}. Copy them after this, with "
            f"clickhouse-client: BACKUP {tables}{where} TO Disk('backups', 'fp8scope.zip'), where `backups` is a disk "
            "that the server's configuration allows"
        )


def _together(spans: Sequence[Span], runs: Mapping[int, int]) -> Iterator[tuple[int, list[Span]]]:
    """The spans in their order with their run: those of several sources together that reach into the same blocks.

    All sources of a run lie side by side in a block, so that a query for one of them reads the others' rows, too.
    """
    some: list[Span] = []
    for span in spans:
        if span.source_id not in runs:
            continue
        if some and not (
            len(some) < _SPANS
            and runs[span.source_id] == runs[some[0].source_id]
            and all(span.source_id != other.source_id for other in some)
            and span.first_step // STEPS_A_BLOCK <= max(other.last_step for other in some) // STEPS_A_BLOCK
            and span.last_step // STEPS_A_BLOCK >= min(other.first_step for other in some) // STEPS_A_BLOCK
        ):
            yield runs[some[0].source_id], some
            some = []
        some.append(span)
    if some:
        yield runs[some[0].source_id], some


def _within(run_id: int, spans: Sequence[Span]) -> sa.ColumnElement[bool]:
    """The rows of spans; the blocks of steps are said apart, as ClickHouse does not conclude them from the steps."""
    row = _stats.c
    first, last = min(span.first_step for span in spans), max(span.last_step for span in spans)
    blocks = int_div(row.step, STEPS_A_BLOCK).between(first // STEPS_A_BLOCK, last // STEPS_A_BLOCK)
    return sa.and_(row.run_id == run_id, blocks, _of_spans(row, spans))


def _of_spans(row: Any, spans: Sequence[Span]) -> sa.ColumnElement[bool]:
    """What of `row`, columns with a source and a step, lies in the spans, which are of different sources."""
    firsts, lasts = [span.first_step for span in spans], [span.last_step for span in spans]
    inside = [row.source_id.in_([span.source_id for span in spans]), row.step.between(min(firsts), max(lasts))]
    if len({*firsts}) > 1 or len({*lasts}) > 1:
        inside += [row.step >= _by_source(row.source_id, spans, firsts)]
        inside += [row.step <= _by_source(row.source_id, spans, lasts)]
    return sa.and_(*inside)


def _by_source(source_id: sa.ColumnElement[int], spans: Sequence[Span], values: Sequence[int]) -> Any:
    """The value that belongs to the source's span: looked up, however many there are."""
    sources = [span.source_id for span in spans]
    literals: list[sa.ColumnElement[Any]] = [sa.literal_column(str(each)) for each in (sources, list(values), 0)]
    return sa.func.transform(source_id, *literals)


def _by_partition(batches: Sequence[Batch]) -> list[list[Batch]]:
    """The batches of each partition, a block each."""
    parts: dict[int, list[Batch]] = {}
    for batch in batches:
        parts.setdefault(batch.source.run_id // RUNS_A_PARTITION, []).append(batch)
    return [*parts.values()]


def _beside(work: Callable[[], None], meanwhile: Callable[[], None] | None) -> None:
    """Does `work` in another thread and `meanwhile` in this; returns when both have ended, raises what one raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="fp8scope-insert", daemon=True)  # a server that hangs holds up no exit
    thread.start()
    try:
        if meanwhile:
            meanwhile()
    finally:
        thread.join()
    if errors:
        raise errors[0]


def _token(batches: Sequence[Batch]) -> str:
    """The same for the same batches, whoever brings them."""
    return hashlib.sha256(repr([(batch.source.id, batch.seq) for batch in batches]).encode()).hexdigest()
