"""Diagnosis of runs that are going on: every few seconds what is new is read, judged, and written down as findings.

`Watcher` looks after all runs of a database, `RunWatch` after one. A run's last 72 rows are kept in memory and
extended by a cursor over committed rows, up to the step that all its ranks have passed; a rank that falls silent is
waited for ten seconds. The findings are those that `fp8scope diagnose` gives (docs/adr/0063): where rows come late or
a resumed run rewrites steps, the run is judged again from there, and what is not found again is marked as rewritten.
After a restart it goes on from what is stored.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
import structlog

from fp8scope_collector.diagnosis.book import Book, Change, Judged
from fp8scope_collector.diagnosis.engine import Episodes
from fp8scope_collector.diagnosis.finding import Finding
from fp8scope_collector.diagnosis.priority import Transactions
from fp8scope_collector.diagnosis.rules import run_silent
from fp8scope_collector.diagnosis.source import GIVEN_UP_S, PIECE_ROWS, Cursor, RunRows
from fp8scope_collector.diagnosis.thresholds import DATED_BACK_ROWS, GAP_ROWS, SILENT_S
from fp8scope_collector.diagnosis.window import LOOKBACK, Context, Window
from fp8scope_collector.messages import run_label
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import open_engine, open_stats
from fp8scope_collector.storage.findings import DIAGNOSIS, LEASE_S
from fp8scope_collector.storage.history import Span
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.stats_store import StatsStore, StorageError
from fp8scope_collector.storage.writer import is_transient

PATIENCE_S = 10.0  # for a rank that is behind the others and sends nothing
CELLS = 2_000_000  # ranks times tensors times rows of a run in memory: 130 MB; more ranks are not judged
REDO_ROWS = 2048  # rows that are read again at most for an episode that was going on
PIECE_CELLS = 128 * 1680  # read and judged before the clock is looked at again: half a second of a whole core
RUN_BUDGET_S = 1.0  # of one pass for one run: others wait
FORGET_S = 600.0  # a run that sent nothing for so long is dropped from memory, and read again when it goes on

log = structlog.get_logger()


@dataclass(frozen=True)
class SourceNow:
    """One process life of one rank, as the database has it."""

    id: int
    rank: int
    incarnation: int
    last_step: int
    last_seen_unix_ns: int
    ended: bool


@dataclass(frozen=True)
class RunNow:
    """A run and its process lives, as the database has them."""

    id: int
    label: str
    created_unix_ns: int
    sources: tuple[SourceNow, ...]

    @property
    def newest(self) -> list[SourceNow]:
        """The newest life of each rank."""
        by_rank: dict[int, SourceNow] = {}
        for source in sorted(self.sources, key=lambda source: source.incarnation):
            by_rank[source.rank] = source
        return list(by_rank.values())

    @property
    def has_ended(self) -> bool:
        """Whether every rank's newest life has ended."""
        return all(source.ended for source in self.newest)

    @property
    def heard_unix_ns(self) -> int:
        """When a rank was heard last."""
        return max(source.last_seen_unix_ns for source in self.sources)

    def is_over(self, now_unix_ns: int) -> bool:
        """Whether it has ended, or was not heard of for a day."""
        return self.has_ended or now_unix_ns - self.heard_unix_ns > GIVEN_UP_S * 1e9

    @property
    def last_step(self) -> int:
        """The largest step that a rank has committed."""
        return max((source.last_step for source in self.sources), default=-1)


@dataclass(frozen=True)
class News:
    """What changed of a run's findings; `live`: the run is going on, `recent`: or was a few minutes ago."""

    run: str
    live: bool
    recent: bool
    changes: tuple[Change, ...]


class Pace:
    """How far all ranks of a run have come, those that have stopped left out."""

    def __init__(self) -> None:
        self._moved: dict[int, tuple[int, float]] = {}

    def settled(self, run: RunNow, now_s: float) -> int:
        """The step that every rank has passed which has ended, is not behind, or moved within `PATIENCE_S`."""
        if run.has_ended:
            return run.last_step
        newest = run.newest
        front = max(source.last_step for source in newest)
        waiting = []
        for source in newest:
            step, since = self._moved.get(source.id, (None, now_s))
            if source.last_step == front or source.last_step != step:
                since = now_s
            self._moved[source.id] = (source.last_step, since)
            if not source.ended and now_s - since < PATIENCE_S:
                waiting.append(source.last_step)
        return min(waiting, default=front)


class RunWatch:
    """One run's diagnosis, as far as it has come."""

    def __init__(
        self,
        writing: Transactions,
        reading: sa.Engine,
        store: StatsStore,
        reader: Reader,
        run: RunNow,
        clock: Callable[[], float],
    ) -> None:
        self.created_unix_ns = run.created_unix_ns
        self.heard_unix_ns = 0
        self._writing = writing
        self._reading = reading
        self._store = store
        self._reader = reader
        self._run_id = run.id
        self._clock = clock
        self._pace = Pace()
        self._known: frozenset[int] = frozenset()  # sources whose slots and ranks are accounted for
        self._rows: RunRows | None = None
        self._book: Book | None = None
        self._cursor = Cursor()
        self._context = Context()
        self._episodes = Episodes()
        self._judged: dict[int, int] = {}  # the last step of each source that is judged

    def advance(self, run: RunNow, now_unix_ns: int, budget_s: float) -> tuple[list[Change], bool]:
        """Judges what is new; the changes, whether there is more than fitted into `budget_s`, or one piece."""
        self.heard_unix_ns = run.heard_unix_ns
        to_step = self._pace.settled(run, now_unix_ns / 1e9)
        sources = frozenset(source.id for source in run.sources)
        if sources != self._known:
            self._meet(run)
        if (late := self._late(run, to_step)) is not None:
            self._begin(late)
        more = self._judge(to_step, budget_s)
        caught_up = not more
        if caught_up:
            self._cursor = replace(self._cursor, step=max(self._cursor.step, to_step))
        # Of a look that time cut short, too: what it has judged would seem to have come late in the next.
        self._judged = {source.id: min(source.last_step, self._cursor.step) for source in run.sources}
        over = caught_up and run.is_over(now_unix_ns)
        self._listen(run, now_unix_ns)
        changes = self._write(now_unix_ns, ended=over, settled=caught_up)
        return changes, more

    @property
    def judged_steps(self) -> int:
        """The sum of the last judged steps of all its processes."""
        return sum(self._judged.values())

    def _meet(self, run: RunNow) -> None:
        """Another process came: takes in its slots and ranks, and begins again from what is stored."""
        slots = tuple(self._reader.slots(self._run_id))
        ranks = judged_ranks(sorted({source.rank for source in run.sources}), len(slots))
        fresh = self._rows is None or self._rows.slots != slots
        self._rows = RunRows(self._reader, self._reading, self._store, self._run_id, slots, ranks)
        self._known = frozenset(source.id for source in run.sources)
        if fresh or self._book is None:
            self._book = Book(self._writing, self._reading, self._run_id, slots)
            judged = self._book.judged or Judged(-1, 0, {})
            self._judged = dict(judged.sources)
            self._begin(judged.step + 1, rows=judged.rows)
        else:
            self._context.take_in(ranks)

    def _late(self, run: RunNow, to_step: int) -> int | None:
        """The first step that was judged without rows which have come since; None: nothing came late."""
        found: list[int] = []
        for source in run.sources:
            seen = self._judged.get(source.id, -1)
            if source.last_step > seen and seen < self._cursor.step and self._is_judged(source.rank):
                until = min(self._cursor.step, to_step)
                span = Span(source.id, source.incarnation, seen + 1, until)
                with self._reading.connect() as connection:
                    steps = self._store.steps(connection, [span]) if seen < until else []
                found += [step for _, step in steps[:1]]
        return min(found, default=None)

    def _is_judged(self, rank: int) -> bool:
        return self._rows is not None and self._rows.ranks is not None and rank in self._rows.ranks

    def _begin(self, step: int, rows: int | None = None) -> None:
        """Judges from `step` on; `rows`: the recorded steps before it, where they are known.

        Findings that were going on there, or may go on, are found anew from their own rows.
        """
        assert self._rows is not None
        assert self._book is not None
        reach = self._steps_before(step, GAP_ROWS + DATED_BACK_ROWS + 1)
        since = reach[0] if len(reach) > GAP_ROWS + DATED_BACK_ROWS else 0
        touched = [entry for entry in self._book.entries() if entry.ending is None or entry.finding.last_step >= since]
        start = min([step, *(entry.finding.first_step for entry in touched)])
        if start < step:
            start = max([start, *self._steps_before(step, REDO_ROWS)[:1]])
        between = len(self._rows.steps(start, step - 1)) if start < step else 0
        first_row = rows - between if rows is not None else len(self._rows.steps(0, start - 1)) if start else 0
        context = self._steps_before(start, LOOKBACK)
        cursor = Cursor(step=(context[0] if context else start) - 1, rows=first_row - len(context))
        self._episodes, self._context, self._cursor = Episodes(), Context(), cursor
        if context:
            for piece in self._rows.pieces(to_step=start - 1, after=cursor):
                self._take(piece)
        self._cursor = replace(self._cursor, step=start - 1, rows=first_row)
        older = [entry for entry in touched if entry.finding.first_step < start]
        self._episodes.resume([_clipped(entry.finding, first_row) for entry in older])
        self._book.doubt([entry for entry in touched if entry not in older])

    def _steps_before(self, step: int, count: int) -> list[int]:
        """The last `count` recorded steps before `step`, or as many as there are."""
        assert self._rows is not None
        reach = 2 * count
        while True:
            found = [each for each, _ in self._rows.steps(max(0, step - reach), step - 1)] if step > 0 else []
            if len(found) >= count or reach >= step:
                return found[-count:]
            reach *= 4

    def _judge(self, to_step: int, budget_s: float) -> bool:
        """Reads and judges up to `to_step`; whether the time was not enough."""
        assert self._rows is not None
        deadline = self._clock() + budget_s
        if to_step <= self._cursor.step:
            return False
        cells = len(self._rows.ranks or ()) * len(self._rows.slots)
        rows = max(LOOKBACK // 4, min(PIECE_ROWS, PIECE_CELLS // max(cells, 1)))
        for piece in self._rows.pieces(to_step=to_step, after=self._cursor, piece_rows=rows):
            self._episodes.observe(self._take(piece))
            if self._clock() > deadline:
                return self._cursor.step < to_step
        return False

    def _take(self, piece: Window) -> Window:
        """The piece with its context; the cursor is behind it then."""
        window = self._context.follow(piece)
        self._cursor = Cursor(
            int(piece.steps[-1]), piece.first_row + piece.steps.size, piece.incarnation, piece.life_row
        )
        return window

    def _listen(self, run: RunNow, now_unix_ns: int) -> None:
        """Says once that nothing is heard of the run any more, if so."""
        silent_s = (now_unix_ns - self.heard_unix_ns) / 1e9
        if run.is_over(now_unix_ns) or silent_s < SILENT_S or (last := self._context.last) is None:
            return
        if not self._episodes.of((run_silent.RULE.name, "", None)):
            silent = replace(last, fresh=last.steps.size - 1, silent_s=silent_s)
            self._episodes.observe(silent, rules=[run_silent.RULE])

    def _write(self, now_unix_ns: int, *, ended: bool, settled: bool) -> list[Change]:
        assert self._book is not None
        judged = Judged(self._cursor.step, self._cursor.rows, dict(self._judged))
        changes = self._book.write(self._episodes, judged, ended=ended, settled=settled, now_unix_ns=now_unix_ns)
        self._episodes.forget(self._cursor.rows)
        return changes


class Watcher:
    """All runs of a database. One thread; `look` is called every few seconds."""

    def __init__(
        self,
        url: str,
        *,
        unix_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._writing = Transactions(open_engine(url))
        self._reading = open_engine(url, read_only=True)  # on SQLite the other one locks out the writer
        self._store = open_stats(self._reading)
        self._reader = Reader(url)
        self._unix_ns = unix_ns
        self._clock = clock
        self._runs: dict[int, RunWatch] = {}

    def close(self) -> None:
        """Closes the connections."""
        self._reader.close()
        self._store.close()
        self._reading.dispose()
        self._writing.close()

    def look(
        self, between: Callable[[], bool] = lambda: True, budget_s: float = RUN_BUDGET_S
    ) -> tuple[list[News], bool]:
        """Judges what is new in all runs; what changed, and whether there is more to do at once.

        `between` is called before each run; False ends the look. A run gets `budget_s`, and one piece at least. One
        that cannot be judged is logged and left out, the others go on.

        Raises: SQLAlchemy's errors, where the database is away.
        """
        news: list[News] = []
        unfinished = False
        for run in self._due():
            if not between():
                return news, unfinished
            now = self._unix_ns()
            try:
                changes, more = self._watch(run).advance(run, now, budget_s)
            except sa.exc.IntegrityError:
                self._runs.pop(run.id, None)  # deleted meanwhile
                continue
            except StorageError as error:  # statistics in a database of their own, which is away
                self._runs.pop(run.id, None)
                log.warning("a run cannot be diagnosed now", run=run.label, error=str(error))
                continue
            except Exception as error:
                self._runs.pop(run.id, None)
                if isinstance(error, sa.exc.DBAPIError) and is_transient(error):
                    raise
                log.exception("a run cannot be diagnosed", run=run.label)
                continue
            unfinished |= more
            if changes:
                recent = now - run.heard_unix_ns < 2 * SILENT_S * 1e9
                news.append(News(run.label, recent and not run.has_ended, recent, tuple(changes)))
        self._forget()
        return news, unfinished

    def steps(self) -> tuple[int, int]:
        """The steps that are committed of all processes of the runs that it looks after, and those judged."""
        source = schema.source.c
        query = sa.select(sa.func.sum(source.last_step)).where(source.run_id.in_(list(self._runs)))
        with self._reading.connect() as connection:
            committed = connection.execute(query).scalar() or 0
        return int(committed), sum(watch.judged_steps for watch in self._runs.values())

    def _watch(self, run: RunNow) -> RunWatch:
        known = self._runs.get(run.id)
        if known is None or known.created_unix_ns != run.created_unix_ns:  # SQLite gives ids of deleted runs again
            known = self._runs[run.id] = RunWatch(
                self._writing, self._reading, self._store, self._reader, run, self._clock
            )
        return known

    def _forget(self) -> None:
        now = self._unix_ns()
        for run_id, watch in list(self._runs.items()):
            if now - watch.heard_unix_ns > FORGET_S * 1e9:
                del self._runs[run_id]

    def _due(self) -> list[RunNow]:
        """Runs with something to judge, to close, or to be silent about; the one heard from last first."""
        source, run, judged, finding = schema.source.c, schema.run, schema.judged, schema.finding
        last_step, heard = sa.func.max(source.last_step), sa.func.max(source.last_seen_unix_ns)
        recent = heard > self._unix_ns() - int(FORGET_S * 1e9)
        unjudged = last_step > sa.func.coalesce(sa.func.max(judged.c.step), -1)
        is_open = sa.select(finding.c.id).where(finding.c.run_id == run.c.id, finding.c.closed_unix_ns.is_(None))
        has_open = sa.func.max(sa.case((is_open.exists(), 1), else_=0)) == 1
        query = (
            sa.select(run.c.id, run.c.project, run.c.name, run.c.created_unix_ns)
            .join(schema.source, source.run_id == run.c.id)
            .outerjoin(judged, judged.c.run_id == run.c.id)
            .group_by(run.c.id, run.c.project, run.c.name, run.c.created_unix_ns)
            .having(last_step.is_not(None), sa.or_(recent, unjudged, has_open))
            .order_by(heard.desc())
        )
        with self._reading.connect() as connection:
            due = connection.execute(query).all()
            lives = connection.execute(
                sa.select(schema.source).where(source.run_id.in_([row.id for row in due])).order_by(source.id)
            ).all()
        by_run: dict[int, list[SourceNow]] = {row.id: [] for row in due}
        for life in lives:
            step = -1 if life.last_step is None else life.last_step
            ended = life.outcome is not None
            by_run[life.run_id].append(
                SourceNow(life.id, life.rank, life.incarnation, step, life.last_seen_unix_ns, ended)
            )
        return [
            RunNow(row.id, run_label(row.project, row.name), row.created_unix_ns, tuple(by_run[row.id]))
            for row in due
            if by_run[row.id]
        ]


class Lease:
    """Of several collectors on one database one diagnoses; another takes over when it is gone for `seconds`."""

    def __init__(
        self, url: str, holder: str, seconds: float = LEASE_S, unix_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._writing = Transactions(open_engine(url))
        self._holder = holder
        self._seconds = seconds
        self._unix_ns = unix_ns
        self._renewed_ns = 0

    def hold(self) -> bool:
        """Takes or renews the lease; False: another has it."""
        now = self._unix_ns()
        if now < self._renewed_ns + int(self._seconds / 10 * 1e9):
            return True
        if held := self._writing.run(lambda connection: self._take(connection, now)):
            self._renewed_ns = now
        return held

    def _take(self, connection: sa.Connection, now: int) -> bool:
        lease = schema.lease
        values = {"holder": self._holder, "until_unix_ns": now + int(self._seconds * 1e9)}
        mine = sa.and_(lease.c.task == DIAGNOSIS, sa.or_(lease.c.holder == self._holder, lease.c.until_unix_ns <= now))
        if connection.execute(sa.update(lease).where(mine).values(values)).rowcount:
            return True
        if connection.execute(sa.select(lease.c.task).where(lease.c.task == DIAGNOSIS)).first():
            return False
        try:
            with connection.begin_nested():
                connection.execute(sa.insert(lease).values(task=DIAGNOSIS, **values))
        except sa.exc.IntegrityError:  # another was faster
            return False
        return True

    def release(self) -> None:
        """Lets another take over at once."""
        lease, self._renewed_ns = schema.lease, 0
        mine = sa.and_(lease.c.task == DIAGNOSIS, lease.c.holder == self._holder)
        with contextlib.suppress(sa.exc.DBAPIError):
            self._writing.run(
                lambda connection: connection.execute(sa.update(lease).where(mine).values(until_unix_ns=0))
            )
        self._writing.close()


def judged_ranks(ranks: Sequence[int], slots: int) -> tuple[int, ...]:
    """The ranks that fit into `CELLS`: all, or as many, spread evenly, the first and the last among them."""
    most = max(2, CELLS // (max(slots, 1) * (LOOKBACK + LOOKBACK // 4)))
    if len(ranks) <= most:
        return tuple(ranks)
    return tuple(sorted({ranks[round(i * (len(ranks) - 1) / (most - 1))] for i in range(most)}))


def _clipped(finding: Finding, rows: int) -> Finding:
    """The part of a finding before row `rows`, with the evidence of all of it."""
    again = max(0, finding.last_row + 1 - rows)
    return replace(finding, last_row=finding.last_row - again, rows=max(1, finding.rows - again * len(finding.ranks)))
