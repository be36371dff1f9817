"""Statistics in ClickHouse, or in chDB, which is ClickHouse inside this process; everything else stays relational.

Both speak the same SQL through clickhouse-connect. What a batch brought of a step and 256 slots is one row there, with
an array for each field (docs/adr/0086), and has the batch's number, so that the data itself says what is there: a batch
comes again after a crash between ClickHouse's insert and the relational commit, and is looked up before it is written
(docs/adr/0036). Blocks are large, each touches one partition and carries a token; what two collectors on both sides of
a partition may still write twice is one row for whoever reads.

`clickhouse_ddl` makes the tables, `clickhouse_block` lays rows out and takes them back, and `clickhouse_reach` reaches
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
from fp8scope_collector.storage.clickhouse_block import Block, Blocks, rows_of
from fp8scope_collector.storage.clickhouse_ddl import (
    RUNS_A_PARTITION,
    SLOTS_A_BLOCK,
    STATS_BY_STEP,
    create_tables,
    local,
    missing_columns,
    tune,
)
from fp8scope_collector.storage.clickhouse_http import ROWS_AT_ONCE, ReadService
from fp8scope_collector.storage.clickhouse_reach import Database, merge_when_idle
from fp8scope_collector.storage.history import LAST_STEP, Span, int_div
from fp8scope_collector.storage.stats_store import Pace

_row = sa.table(
    STATS_BY_STEP,
    *(sa.column(name, sa.BigInteger) for name in ("run_id", "source_id", "slot_block", "step", "seq")),
    *(sa.column(name) for name in ("slot", *(field.name for field in FIELDS))),
).c
_SORT_BYTES = 128 << 20  # what does not fit is sorted on disk: an export's memory does not grow with the run
_SPANS = 1000  # of one query: its text has a limit
_STEPS_AT_ONCE = 2048  # of all sources, where all tensors are wanted: what is sorted has to fit into memory
_NEAR_STEPS = 256  # between spans of one query: as many steps more of each source cost less than another query
_BATCHES_LOOKED_UP = 64  # in one query


class ClickHouseStats:
    """The table `stats_by_step` of one ClickHouse database or chDB folder; see `StatsStore`.

    Nothing is opened before it is needed. A chDB folder is this process's from `migrate`, or the first change, to
    `close`; what only reads has it for seconds, or reads through the process that has it.
    """

    pace = Pace(  # each insert is a part that has to be merged
        group_rows=131_072, rows_under_way=393_216, under_way_s=0.6, window=64, pause_s=0.2, rollup_rows=524_288
    )
    in_pieces = False  # a query costs milliseconds, and holds up nobody

    def __init__(self, url: sa.URL) -> None:
        """`url`: chdb:///FOLDER or clickhouse://USER:PASSWORD@HOST:PORT/DATABASE, with ?cluster=NAME for a cluster."""
        self.cluster = str(url.query["cluster"]) if "cluster" in url.query else None
        self._database = Database(url)
        self._service: ReadService | None = None  # what lets others read the folder
        in_file = self._database.folder is not None
        self._blocks, self._spare = Blocks(in_file=in_file), Blocks(in_file=in_file)
        self._prepared: tuple[list[Batch], Block] | None = None  # in `_spare`
        self._written: weakref.WeakKeyDictionary[Source, int] = weakref.WeakKeyDictionary()  # highest seq known stored

    def migrate(self) -> None:
        """Creates the tables, and adds columns that this version has and they have not."""
        if self._database.folder:
            self._database.folder.mkdir(parents=True, exist_ok=True)
        with self._database.client(changing=True) as client:
            *tables, view = create_tables(self.cluster)
            for statement in tables:
                client.command(statement)
            known = {row[0] for row in client.query(f"DESCRIBE TABLE {local(self.cluster)}").result_rows}
            for statement in [*missing_columns(self.cluster, known), view]:
                client.command(statement)
            settings = {row[0] for row in client.query("SELECT name FROM system.merge_tree_settings").result_rows}
            for statement in tune(self.cluster, settings, folder=self._database.folder is not None):
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
        with self._database.client() as client:
            database = client.query("SELECT currentDatabase()").result_rows[0][0]
            total = client.query(
                f"SELECT sum(bytes_on_disk) FROM {parts} WHERE active AND database = {{own:String}}"
                f" AND table = '{local(self.cluster)}'",
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
                    self._insert(client, prepared or blocks.rows(part), _token(part))

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
            which = sa.and_(_row.run_id.in_(sorted(set(runs.values()))), _row.source_id.in_(list(source_ids)))
            self._change("ALTER TABLE {} DELETE WHERE {}", which, {"mutations_sync": 2})

    def prune(self, connection: sa.Connection, source_id: int, below_step: int) -> int:
        """Removes the source's rows of the steps below `below_step`; their space comes back with the next merges."""
        span = Span(source_id, 0, 0, below_step - 1)
        if not (runs := self._runs(connection, [source_id])) or below_step <= 0:
            return 0
        which = _within(runs[source_id], [span])
        slots = sa.func.length(sa.func.arrayDistinct(sa.func.arrayFlatten(sa.func.groupArray(_row.slot))))
        each = sa.select(slots.label("rows")).where(which)
        each = each.group_by(_row.run_id, _row.source_id, _row.slot_block, _row.step)
        with self._database.client(changing=True) as client:
            count = self._sql(sa.select(sa.func.sum(each.subquery().c.rows)))
            found = client.query(count, settings={"optimize_aggregation_in_order": 1})
            rows = int(found.result_rows[0][0])
        if rows:
            self._change("DELETE FROM {} WHERE {}", which, {"lightweight_deletes_sync": 2})
        return rows

    def last_steps(self, connection: sa.Connection, source_id: int, count: int) -> list[int]:
        """The newest `count` recorded steps of a source, descending; reads no statistics."""
        source = schema.source.c
        known = sa.select(source.run_id, source.last_step).where(source.id == source_id, source.last_step.is_not(None))
        if (row := connection.execute(known).one_or_none()) is None:
            return []
        within = 4 * count  # steps: there they are, or further back
        while True:
            span = Span(source_id, 0, max(0, row.last_step - within + 1), row.last_step)
            query = sa.select(_row.step).distinct().where(_within(row.run_id, [span]))
            with self._database.client() as client:
                found = client.query(self._sql(query.order_by(_row.step.desc()).limit(count))).result_rows
            if len(found) == count or span.first_step == 0:
                return [step for (step,) in found]
            within *= 16

    def steps(self, connection: sa.Connection, spans: Sequence[Span]) -> list[tuple[int, int]]:
        """The recorded steps of the spans as (source id, step); reads no statistics."""
        runs = self._runs(connection, [span.source_id for span in spans])
        found: list[tuple[int, int]] = []
        for run_id, some in _together(spans, runs):
            query = sa.select(_row.source_id, _row.step).distinct().where(_within(run_id, some))
            with self._database.client() as client:
                found += [(source_id, step) for source_id, step in client.query(self._sql(query)).result_rows]
        return found

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
        runs = self._runs(connection, [span.source_id for span in spans])
        settings = {"max_block_size": ROWS_AT_ONCE, "max_bytes_before_external_sort": _SORT_BYTES}
        settings["query_plan_execute_functions_after_sorting"] = 0  # not whole arrays of which one value is wanted
        names = ["slot", *fields]
        shown = [_row[name] for name in names] if slots is None else _of_slots(names, slots)
        for run_id, some in _together(spans, runs, _STEPS_AT_ONCE * every if slots is None else LAST_STEP):
            query = sa.select(_row.source_id, _row.step, *shown).where(_within(run_id, some))
            if slots is not None:
                blocks = {slot // SLOTS_A_BLOCK for slot in slots}
                query = query.where(_row.slot_block.in_(sorted(blocks)), sa.func.hasAny(_row.slot, _literal([*slots])))
            if every > 1:
                firsts = sa.select(_row.source_id, sa.func.min(_row.step)).where(_within(run_id, some))
                firsts = firsts.group_by(_row.source_id, int_div(_row.step, every))
                query = query.where(sa.tuple_(_row.source_id, _row.step).in_(firsts))
            sources = [span.source_id for span in some]
            place = _row.source_id if sources == sorted(sources) else _by_source(some, range(len(some)))
            one_block = slots is not None and len(blocks) == 1  # then this is the table's order
            query = query.order_by(place, _row.step, *([] if one_block else [_row.slot_block]), _row.seq)
            yield from rows_of(self._blocks_of(query, names, settings), fields, batch_rows)

    def _blocks_of(self, query: sa.Select[Any], names: Sequence[str], settings: Mapping[str, int]) -> Iterator[Any]:
        """What the query gives, as it comes: source_id, step, and columns that are called `names`."""
        with self._database.client() as client:
            free = [f"{name} = {to}" for name, to in settings.items() if not client.server_settings[name].readonly]
            clause = f" SETTINGS {', '.join(free)}" if free else ""  # as an argument each is a query before and after
            with client.query_arrow_stream(self._sql(query) + clause) as blocks:
                for block in blocks:
                    table = pa.Table.from_batches([block]) if isinstance(block, pa.RecordBatch) else pa.table(block)
                    yield from table.rename_columns(["source_id", "step", *names]).to_batches()

    def close(self) -> None:
        """Closes the connections, and ends what others read through them."""
        if self._service:
            self._service.close()
            self._service = None
        self._database.close()

    def _look_up(self, client: Any, batches: Sequence[Batch]) -> None:
        """Learns which of these batches, all from sources of which none was missing yet, are stored already.

        A batch is stored whole or not at all, in one part, so one of its rows says it.
        """
        for batch in batches:
            self._written.setdefault(batch.source, 0)
        key = (_row.run_id, _row.source_id, _row.slot_block, _row.step, _row.seq)
        for start in range(0, len(batches), _BATCHES_LOOKED_UP):
            some = {
                (
                    *(batch.source.run_id, batch.source.id, int(batch.source.run_slot[batch.slot[0]]) // SLOTS_A_BLOCK),
                    *(int(batch.step[0]), batch.seq),
                ): batch.source
                for batch in batches[start : start + _BATCHES_LOOKED_UP]
            }
            query = sa.select(*key).where(sa.tuple_(*key).in_(list(some)))
            for found in client.query(self._sql(query)).result_rows:
                source = some[(*found,)]
                self._written[source] = max(self._written[source], found[-1])

    def _insert(self, client: Any, block: Block, token: str) -> None:
        """One block: on return it is on disk, and the same token again changes nothing."""
        settings = {"insert_deduplication_token": token, "async_insert": 0}
        settings["optimize_on_insert"] = 0  # rows that replace others do so in merges and for readers
        if self.cluster:
            settings |= {"distributed_foreground_insert": 1}
        if block.path:  # chDB takes it from there, and `raw_insert` would write it to a file first
            client.command(
                f"INSERT INTO {STATS_BY_STEP} ({', '.join(block.columns)}) FROM INFILE '{block.path}' SETTINGS "
                + ", ".join(f"{name} = {value!r}" for name, value in settings.items())
                + " FORMAT Native"
            )
        else:
            client.raw_insert(STATS_BY_STEP, block.columns, bytes(block.data), settings=settings, fmt="Native")

    def _change(self, statement: str, which: sa.ColumnElement[bool], settings: dict[str, int]) -> None:
        where = f"{local(self.cluster)} ON CLUSTER '{self.cluster}'" if self.cluster else STATS_BY_STEP
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
        where = f" ON CLUSTER '{self.cluster}'" if self.cluster else ""
        table = f"TABLE {database}.{local(self.cluster)}"
        return (
            f"statistics are not in it: they are in {self._database.shown}. Copy them after this, with "
            f"clickhouse-client: BACKUP {table}{where} TO Disk('backups', 'fp8scope.zip'), where `backups` is a disk "
            "that the server's configuration allows"
        )


def _together(
    spans: Sequence[Span], runs: Mapping[int, int], most: int = LAST_STEP
) -> Iterator[tuple[int, list[Span]]]:
    """The spans in their order with their run: together those of several sources that are about the same steps.

    At most so many steps of all sources are together, or one span.
    """
    some: list[Span] = []
    steps = 0
    for span in spans:
        if span.source_id not in runs:
            continue
        own = span.last_step - span.first_step + 1
        if some and not (
            len(some) < _SPANS
            and steps + own <= most
            and runs[span.source_id] == runs[some[0].source_id]
            and all(span.source_id != other.source_id for other in some)
            and span.first_step <= max(other.last_step for other in some) + _NEAR_STEPS
            and span.last_step >= min(other.first_step for other in some) - _NEAR_STEPS
        ):
            yield runs[some[0].source_id], some
            some, steps = [], 0
        some.append(span)
        steps += own
    if some:
        yield runs[some[0].source_id], some


def _within(run_id: int, spans: Sequence[Span]) -> sa.ColumnElement[bool]:
    """What lies in the spans, which are of different sources."""
    firsts, lasts = [span.first_step for span in spans], [span.last_step for span in spans]
    sources = [span.source_id for span in spans]
    inside = [_row.run_id == run_id, _row.source_id == sources[0] if len(sources) == 1 else _row.source_id.in_(sources)]
    inside += [_row.step.between(min(firsts), max(lasts))]
    if len({*firsts}) > 1 or len({*lasts}) > 1:
        inside += [_row.step >= _by_source(spans, firsts), _row.step <= _by_source(spans, lasts)]
    return sa.and_(*inside)


def _by_source(spans: Sequence[Span], values: Sequence[int]) -> Any:
    """The value that belongs to the source's span: looked up, however many there are."""
    return sa.func.transform(_row.source_id, *map(_literal, ([span.source_id for span in spans], [*values], 0)))


def _of_slots(names: Sequence[str], slots: Sequence[int]) -> list[sa.ColumnElement[Any]]:
    """Of arrays called `names`, one of which is `slot`, the values of these slots, as far as a row has them."""
    places = ", ".join(f"indexOf(slot, {slot})" for slot in sorted(slots))
    there = f"arrayFilter(place -> place > 0, [{places}])"
    return [
        sa.literal_column(f"if(empty({name}), {name}, arrayMap(place -> {name}[place], {there}))").label(f"{name}_")
        for name in names
    ]


def _literal(value: object) -> sa.ColumnElement[Any]:
    return sa.literal_column(str(value))


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
