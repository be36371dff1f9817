"""Between the streams and the database: a queue bounded in bytes, and the one thread that empties it.

Streams live on the event loop and put batches here; the writer thread takes what is there, commits it as one
transaction (group commit), and only then each stream hears that it may acknowledge. A full queue makes `put` wait, and
a stream that waits reads nothing: back-pressure reaches the agent, whose spool holds the rest. While the database is
locked, full or gone the writer repeats the same transaction with growing pauses; nothing is lost meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
import structlog

from fp8scope_collector.decode import RefusedError
from fp8scope_collector.limits import Limits
from fp8scope_collector.messages import Batch, Opening, Source
from fp8scope_collector.metrics import FINDINGS_PER_RUN, MAX_RUNS, Metrics
from fp8scope_collector.storage.registry import ContradictionError, TooManyRunsError
from fp8scope_collector.storage.stats_store import Pace
from fp8scope_collector.storage.writer import Committed, Seen, StatsWriter, is_transient
from fp8scope_collector.turns import Allowance, Lane, Turns

HOUSEKEEPING_S = 5.0
CATCH_UP_SHARE = 0.25  # of the writer's time, while others wait for it
REGISTRATIONS_AT_ONCE = 8  # between two groups: a job of 512 ranks must not hold up the others when it starts
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0

log = structlog.get_logger()
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Put:
    batch: Batch
    wire_bytes: int
    lane: Lane


@dataclass(frozen=True, eq=False)
class _Register:
    opening: Opening
    answer: asyncio.Future[Source]


class _HaltedError(Exception):
    """The process ends although the database did not take everything."""


class Ingest:
    """The queue and its writer thread. All methods but the thread's own are called on the event loop."""

    def __init__(
        self,
        writer: StatsWriter,
        metrics: Metrics,
        limits: Limits,
        pace: Pace,
        unix_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._writer = writer
        self._metrics = metrics
        self._limits = limits
        self._pace = pace
        self._unix_ns = unix_ns
        self.turns = Turns(pace.rows_under_way, pace.window)
        self._loop = asyncio.get_running_loop()
        self._queued_bytes = 0  # the loop's own: what was put and not committed
        self._room = asyncio.Event()
        self._wake = threading.Condition()  # guards what follows
        self._registrations: list[_Register] = []
        self._puts: deque[_Put] = deque()
        self._next: list[_Put] = []  # the writer thread's own: taken and prepared while the group before is written
        self._seen: dict[int, Seen] = {}
        self._used_tokens: dict[int, int] = {}
        self._closing = False
        self._behind = True  # the writer thread's own, as the next three: there may be rows of a predecessor to roll up
        self._group_rows = pace.group_rows
        self._allowance = Allowance(pace.rows_under_way, pace.under_way_s)
        self._busy_since = time.monotonic()  # without a rest, and without what an earlier group took
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fp8scope-writer", daemon=True)
        self._thread.start()

    async def register(self, opening: Opening) -> Source:
        """The stored source of `opening`; waits as long as the database is away.

        Raises:
            ContradictionError: it contradicts what is stored.
            TooManyRunsError: it would be one more than its token may make.
        """
        answer: asyncio.Future[Source] = self._loop.create_future()
        with self._wake:
            waiting = [registration for registration in self._registrations if not registration.answer.cancelled()]
            self._registrations = [*waiting, _Register(opening, answer)]  # without those whose clients left meanwhile
            self._wake.notify()
        return await answer

    async def put(self, batch: Batch, wire_bytes: int, lane: Lane, *, more: bool = False) -> None:
        """Queues the batch as soon as there is room; `lane` hears of the commit. `more`: its client has another."""
        while self._queued_bytes and self._queued_bytes + batch.size_bytes > self._limits.queue_bytes:
            self._room.clear()
            await self._room.wait()
        self._queued_bytes += batch.size_bytes
        self._metrics.observe_queue(self._queued_bytes)
        lane.owed += 1
        self.turns.arrived(lane, batch.entries, more=more)
        with self._wake:
            self._puts.append(_Put(batch, wire_bytes, lane))
            self._wake.notify()

    def sign_of_life(self, source: Source, drops: dict[str, int]) -> None:
        """Notes that the source is alive; written with the next housekeeping."""
        with self._wake:
            self._seen[source.id] = Seen(self._unix_ns(), drops)

    def token_used(self, token_id: int, unix_ns: int) -> None:
        """Notes that the token is in use; written with the next housekeeping."""
        with self._wake:
            self._used_tokens[token_id] = unix_ns

    async def close(self, timeout_s: float) -> bool:
        """Writes what is queued and ends the thread; False if the database did not take it in time."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, timeout_s)
        finished = not self._thread.is_alive()
        self._halt.set()
        return finished

    # the writer thread

    def _run(self) -> None:
        try:
            housekeeping_due = catch_up_due = time.monotonic()
            while (work := self._take(0.0 if self._behind else housekeeping_due)) is not None:
                registrations, group = work
                for registration in registrations:
                    self._register(registration)
                if group:
                    self._commit(group)
                    if not registrations and sum(put.batch.rows for put in group) < self._pace.group_rows // 4:
                        self._halt.wait(self._pace.pause_s)
                        self._busy_since = time.monotonic()
                if time.monotonic() >= housekeeping_due:
                    self._housekeeping()
                    housekeeping_due = time.monotonic() + HOUSEKEEPING_S
                idle = not registrations and not group
                if self._behind and (idle or time.monotonic() >= catch_up_due):
                    started = time.monotonic()
                    self._catch_up()
                    catch_up_due = time.monotonic() + (time.monotonic() - started) * (1 / CATCH_UP_SHARE - 1)
            self._housekeeping()
        except _HaltedError:
            pass

    def _take(self, until: float) -> tuple[list[_Register], list[_Put]] | None:
        """What to do next, empty when `until` has come; None when closing and nothing is left."""
        with self._wake:
            while not self._registrations and not self._puts and not self._next:
                if self._closing:
                    return None
                woken = self._wake.wait(timeout=max(0.0, until - time.monotonic()))
                self._busy_since = time.monotonic()
                if not woken:
                    break
            registrations = self._registrations[:REGISTRATIONS_AT_ONCE]
            del self._registrations[:REGISTRATIONS_AT_ONCE]
            group, self._next = self._next or self._group(), []
            return registrations, group

    def _group(self) -> list[_Put]:
        """What is committed together, of what is in the queue; `_wake` is held."""
        group: list[_Put] = []
        rows = 0
        while self._puts and (not group or rows + self._puts[0].batch.rows <= self._group_rows):
            group.append(self._puts.popleft())
            rows += group[-1].batch.rows
        return group

    def _look_ahead(self) -> None:
        """Takes the next group, where most of one has come, and does what can be done before it is its turn."""
        with self._wake:
            if not self._next and sum(put.batch.rows for put in self._puts) >= self._group_rows // 2:
                self._next = self._group()
            upcoming = [put.batch for put in self._next]
        if upcoming:
            self._writer.prepare(upcoming)

    def _register(self, registration: _Register) -> None:
        try:
            source = self._persist(lambda: self._writer.register(registration.opening, now_unix_ns=self._unix_ns()))
        except _HaltedError:
            raise
        except (ContradictionError, TooManyRunsError) as error:
            self._on_loop(_set_exception, registration.answer, error)
        except Exception as error:
            log.exception("registration failed", run=registration.opening.run_label, rank=registration.opening.rank)
            self._on_loop(_set_exception, registration.answer, error)
        else:
            self._metrics.observe_source(source)
            self._on_loop(_set_result, registration.answer, source)

    def _commit(self, group: Sequence[_Put]) -> None:
        """Commits the group; where that is impossible for what it holds, finds out for which batch."""
        batches = [put.batch for put in group]
        try:
            committed = self._persist(lambda: self._timed_commit(batches))
        except _HaltedError:
            raise
        except Exception:
            if len(group) > 1:
                for put in group:
                    self._commit([put])
                return
            batch = batches[0]
            log.exception("batch failed", run=batch.source.run, rank=batch.source.rank, seq=batch.seq)
            self._metrics.observe_batch("refused", wire_bytes=group[0].wire_bytes)
            self._on_loop(
                self._settle, group, {}, RefusedError(f"seq {batch.seq}: not storable; see the collector's log")
            )
            return
        for put, fresh in reversed([*zip(group, committed.fresh, strict=True)]):  # older steps then cost little
            self._metrics.observe_batch("committed" if fresh else "duplicate", wire_bytes=put.wire_bytes)
            if fresh:
                self._metrics.observe_rows(put.batch)
        self._pace_by(sum(put.batch.entries for put in group))
        deleted = RefusedError("the source was deleted from the database; connect again", grpc.StatusCode.UNAVAILABLE)
        self._on_loop(self._settle, group, committed.up_to_seq, deleted)

    def _pace_by(self, entries: int) -> None:
        """Fits what may be under way, and the part of it that is one group, to how long so many took."""
        now = time.monotonic()
        rows = self._allowance.after(entries, now - self._busy_since)
        self._busy_since = now
        self._group_rows = self._pace.group_rows * rows // self._pace.rows_under_way
        self._on_loop(self.turns.allow, rows)

    def _timed_commit(self, batches: Sequence[Batch]) -> Committed:
        start = time.perf_counter()
        committed = self._writer.commit(batches, now_unix_ns=self._unix_ns(), meanwhile=self._look_ahead)
        self._metrics.observe_commit(time.perf_counter() - start)
        return committed

    def _housekeeping(self) -> None:
        """Writes signs of life, reads what /metrics says of runs; so an idle collector too notices its database."""
        with self._wake:
            seen, self._seen = self._seen, {}
            used, self._used_tokens = self._used_tokens, {}
        try:
            if seen:
                self._persist(lambda: self._writer.touch(seen))
            if used:
                self._persist(lambda: self._writer.touch_tokens(used))
            self._persist(lambda: self._writer.roll_up(everything=self._closing))
            self._behind = True  # perhaps: the next slice looks
            runs, *sizes = self._persist(lambda: self._writer.overview(MAX_RUNS))
            findings = self._persist(lambda: self._writer.findings(FINDINGS_PER_RUN))
        except _HaltedError:
            raise
        except Exception:
            log.exception("housekeeping failed")
        else:
            self._metrics.observe_database(runs, *sizes)
            self._metrics.observe_findings(findings)

    def _catch_up(self) -> None:
        """One slice of the rows that nobody has rolled up: a new collector serves its agents between two."""
        try:
            self._behind = self._persist(lambda: self._writer.catch_up(now_unix_ns=self._unix_ns()))
        except _HaltedError:
            raise
        except Exception:
            log.exception("catching up failed")
            self._behind = False

    def _persist(self, action: Callable[[], T]) -> T:
        """Repeats `action` until the database takes it, unless the fault is in what is written."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                result = action()
            except Exception as error:
                if not is_transient(error):
                    raise
                self._report_database(str(getattr(error, "orig", None) or error))
                if self._halt.wait(pause_s):
                    raise _HaltedError from error
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self._report_database(None)
                return result

    def _report_database(self, trouble: str | None) -> None:
        if trouble and self._metrics.database_up:
            log.error("database does not take what is written; waiting for it", error=" ".join(trouble.split()))
        elif not trouble and not self._metrics.database_up:
            log.info("database is back")
        self._metrics.observe_database_up(trouble is None)

    # back on the event loop

    def _on_loop(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to hear it
            return

    def _settle(self, group: Sequence[_Put], up_to_seq: Mapping[int, int], otherwise: RefusedError) -> None:
        """Tells the lanes how far their sources are committed; one that is not mentioned fails with `otherwise`."""
        for put in group:
            self._queued_bytes -= put.batch.size_bytes
            put.lane.owed -= 1
            committed = up_to_seq.get(put.lane.source.id)
            if committed is None:
                put.lane.failure = otherwise
            else:
                put.lane.up_to_seq = max(put.lane.up_to_seq, committed)
            put.lane.changed.set()
        self.turns.settled((put.lane, put.batch.entries) for put in group)
        self._metrics.observe_queue(self._queued_bytes)
        self._room.set()


def _set_result(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():  # cancelled: the client left
        answer.set_result(result)


def _set_exception(answer: asyncio.Future[Source], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
