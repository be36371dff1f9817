"""The queue and its thread: back-pressure, grouping, and what happens while the database is away."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fp8scope_collector import ingest as ingest_module
from fp8scope_collector import turns as turns_module
from fp8scope_collector.decode import decode_open, decode_stats
from fp8scope_collector.ingest import Ingest
from fp8scope_collector.limits import Limits
from fp8scope_collector.messages import Batch, Opening, Source
from fp8scope_collector.metrics import Metrics
from fp8scope_collector.storage.findings import FindingsNow
from fp8scope_collector.storage.overview import RunState
from fp8scope_collector.storage.stats_store import Pace
from fp8scope_collector.storage.writer import Committed, Seen
from fp8scope_collector.turns import Lane


class FakeWriter:
    """Keeps what is committed in a list; waits while `open` is clear, and fails with the `errors` given to it first."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.errors: list[Exception] = []
        self.poison: set[int] = set()
        self.groups: list[list[int]] = []
        self.prepared: list[list[int]] = []
        self.waits = False  # for a store, with time to look ahead
        self.seen: dict[int, Seen] = {}
        self.deleted = False
        self.row_s = 0.0  # how long a row takes
        self.busy = False  # with a group
        self.slices = 0  # of rows to catch up with
        self.calls: list[str] = []

    def register(self, opening: Opening, *, now_unix_ns: int) -> Source:
        self._wait()
        self.calls.append("register")
        return _source()

    def prepare(self, group: Sequence[Batch]) -> None:
        self.prepared.append([batch.seq for batch in group])

    def commit(self, group: Sequence[Batch], *, now_unix_ns: int, meanwhile: Callable[[], None]) -> Committed:
        self.busy = True
        if self.waits:
            self.open.wait(20)
            meanwhile()
        self._wait()
        if bad := [batch.seq for batch in group if batch.seq in self.poison]:
            raise sqlite3.IntegrityError(f"{bad}")
        time.sleep(self.row_s * sum(batch.rows for batch in group))
        self.groups.append([batch.seq for batch in group])
        self.calls.append("commit")
        return Committed((True,) * len(group), {} if self.deleted else {1: max(batch.seq for batch in group)})

    def touch(self, seen: dict[int, Seen]) -> None:
        self._wait()
        self.seen |= seen

    def roll_up(self, *, everything: bool) -> None:
        """Nothing is in memory."""

    def catch_up(self, *, now_unix_ns: int) -> bool:
        if self.slices:
            time.sleep(0.002)
            self.slices -= 1
            self.calls.append("catch up")
        return self.slices > 0

    def findings(self, per_run: int) -> FindingsNow:
        return FindingsNow((), (), 0)

    def overview(self, limit: int) -> tuple[list[RunState], int, int]:
        return [], 1, 0

    def _wait(self) -> None:
        self.open.wait(20)
        if self.errors:
            raise self.errors.pop(0)

    @property
    def committed(self) -> list[int]:
        return [seq for group in self.groups for seq in group]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(ingest_module, "LONGEST_PAUSE_S", 0.02)


def test_put_waits_while_the_queue_is_full_and_nothing_is_lost(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        lane = Lane(_source())
        batches = [_batch(wire, seq) for seq in range(1, 41)]
        writer.open.clear()

        putting = asyncio.create_task(_put_all(ingest, lane, batches))
        await _until(lambda: lane.owed > 0)
        await asyncio.sleep(0.1)
        stuck_at = lane.owed

        assert stuck_at == 10, "room for ten batches"
        assert not putting.done()
        writer.open.set()
        await asyncio.wait_for(putting, 10)
        await _until(lambda: lane.owed == 0)
        assert writer.committed == list(range(1, 41))
        assert lane.up_to_seq == 40

    _run(scenario, queue_bytes=10 * _batch(wire, 1).size_bytes)


def test_a_batch_larger_than_the_queue_passes_when_it_is_empty(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        lane = Lane(_source())

        await asyncio.wait_for(_put_all(ingest, lane, [_batch(wire, seq) for seq in (1, 2, 3)]), 10)
        await _until(lambda: lane.owed == 0)

        assert writer.groups == [[1], [2], [3]]

    _run(scenario, queue_bytes=1)


def test_what_waits_is_committed_as_one_group_up_to_the_limit_of_rows(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        lane = Lane(_source())
        writer.open.clear()
        await _put_all(ingest, lane, [_batch(wire, 1)])
        await _until(lambda: writer.busy)  # the thread has taken the first alone

        await _put_all(ingest, lane, [_batch(wire, seq) for seq in range(2, 8)])
        writer.open.set()
        await _until(lambda: lane.owed == 0)

        assert writer.groups == [[1], [2, 3, 4, 5], [6, 7]]

    _run(scenario, Pace(group_rows=4 * 6, under_way_s=1e9))


def test_a_slow_database_gets_smaller_groups_and_lets_less_be_under_way(
    wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "MEMORY_S", 0.05)

    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        lane = Lane(_source())
        writer.row_s = 0.001
        await _put_all(ingest, lane, [_batch(wire, seq) for seq in range(1, 101)])
        await _until(lambda: lane.owed == 0)

        newcomer = Lane(_source())
        ingest.turns.join(newcomer, 6, more=True)

        sizes = [6 * len(group) for group in writer.groups]
        assert max(sizes) > 100, "at first, as nothing is known"
        assert 42 <= max(sizes[-5:-1]) <= 75, "half of what it takes in the time that is set"
        assert 84 <= 6 * newcomer.turns <= 156

    _run(scenario, Pace(group_rows=120, rows_under_way=240, under_way_s=0.15, window=100))


@pytest.mark.parametrize("pause_s", [0.0, 0.1])
def test_rest_between_groups_does_not_make_a_database_look_slow(
    wire: Any, pause_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "MEMORY_S", 0.01)

    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        lane = Lane(_source())
        writer.row_s = 0.001
        for seq in range(1, 11):
            await _put_all(ingest, lane, [_batch(wire, seq)])
            await _until(lambda: lane.owed == 0)
            await asyncio.sleep(0.05)

        newcomer = Lane(_source())
        ingest.turns.join(newcomer, 6, more=True)

        assert 6 * newcomer.turns >= 200, "it takes 400 rows in the time that is set, and a little less of so few"

    _run(scenario, Pace(group_rows=100, rows_under_way=400, under_way_s=0.4, window=100, pause_s=pause_s))


def test_a_database_that_is_away_delays_and_loses_nothing(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        lane = Lane(_source())
        up: list[bool] = []
        original = metrics.observe_database_up
        metrics.observe_database_up = lambda is_up: (up.append(is_up), original(is_up))[1]  # type: ignore[method-assign]
        writer.errors = [sqlite3.OperationalError("database is locked") for _ in range(4)]

        await _put_all(ingest, lane, [_batch(wire, seq) for seq in (1, 2, 3)])
        await _until(lambda: lane.owed == 0)

        assert writer.committed == [1, 2, 3]
        assert up[:5] == [False, False, False, False, True]
        assert metrics.database_up

    _run(scenario)


def test_a_batch_that_cannot_be_stored_does_not_hold_up_the_others(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        bad, good = Lane(_source()), Lane(_source())
        writer.poison = {2}
        writer.open.clear()

        await _put_all(ingest, good, [_batch(wire, 1)])
        await _put_all(ingest, bad, [_batch(wire, 2)])
        await _put_all(ingest, good, [_batch(wire, 3)])
        writer.open.set()
        await _until(lambda: good.owed == bad.owed == 0)

        assert writer.committed == [1, 3]
        assert good.failure is None
        assert str(bad.failure) == "seq 2: not storable; see the collector's log"

    _run(scenario)


def test_a_deleted_source_ends_its_stream(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        lane = Lane(_source())
        writer.deleted = True

        await _put_all(ingest, lane, [_batch(wire, 1)])
        await _until(lambda: lane.owed == 0)

        assert lane.failure is not None
        assert lane.failure.code.name == "UNAVAILABLE"

    _run(scenario)


def test_registrations_whose_clients_left_are_forgotten(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        opening = decode_open(wire.open(), Limits())
        writer.open.clear()

        for _ in range(20):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ingest.register(opening), 0.005)

        assert len(ingest._registrations) <= 2
        writer.open.set()
        assert (await asyncio.wait_for(ingest.register(opening), 10)).id == 1

    _run(scenario)


def test_signs_of_life_are_written_with_the_housekeeping(wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "HOUSEKEEPING_S", 0.05)

    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        ingest.sign_of_life(_source(), {"ring_full": 1})
        ingest.sign_of_life(_source(), {"ring_full": 2})

        await _until(lambda: bool(writer.seen))

        assert writer.seen[1].drops == {"ring_full": 2}

    _run(scenario)


def test_who_opens_or_sends_is_served_between_two_slices_of_what_a_predecessor_left(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        await _until(lambda: "catch up" in writer.calls)

        before = len(writer.calls)
        await ingest.register(decode_open(wire.open(), Limits()))
        lane = Lane(_source())
        await _put_all(ingest, lane, [_batch(wire, 1)])
        await _until(lambda: lane.owed == 0)

        assert writer.slices > 0
        assert writer.calls[before:].index("register") <= 2
        await _until(lambda: writer.slices == 0)

    _run(scenario, slices=500)


def test_a_busy_collector_goes_on_catching_up(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        lane = Lane(_source())

        await _put_all(ingest, lane, [_batch(wire, seq) for seq in range(1, 2001)])
        await _until(lambda: lane.owed == 0)

        last = len(writer.calls) - writer.calls[::-1].index("commit")
        assert writer.calls[writer.calls.index("commit") : last].count("catch up") >= 3

    _run(scenario, Pace(group_rows=6), slices=500, queue_bytes=10 * _batch(wire, 1).size_bytes)


def test_close_writes_what_is_queued(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        lane = Lane(_source())
        writer.errors = [sqlite3.OperationalError("database is locked")]
        await _put_all(ingest, lane, [_batch(wire, seq) for seq in (1, 2, 3)])

        assert await ingest.close(10)

        assert writer.committed == [1, 2, 3]

    _run(scenario)


def test_close_gives_up_on_a_database_that_stays_away(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        writer.errors = [sqlite3.OperationalError("disk full")] * 1000
        await _put_all(ingest, Lane(_source()), [_batch(wire, 1)])

        assert not await ingest.close(0.1)

        ingest._thread.join(5)
        assert not ingest._thread.is_alive()
        assert writer.committed == []

    _run(scenario)


def test_a_group_that_was_prepared_is_the_next_and_committed_once_though_the_one_before_fails(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        lane = Lane(_source())
        writer.waits = True
        writer.open.clear()
        await ingest.put(_batch(wire, 1), 1, lane)
        await _until(lambda: writer.busy)
        await _put_all(ingest, lane, [_batch(wire, seq) for seq in range(2, 7)])
        writer.errors = [sqlite3.OperationalError("database is locked")] * 3

        writer.open.set()
        await _until(lambda: lane.owed == 0)

        assert writer.prepared[0] == [2, 3]
        assert writer.groups[:2] == [[1], [2, 3]]
        assert writer.committed == [1, 2, 3, 4, 5, 6]
        assert lane.up_to_seq == 6

    _run(scenario, Pace(group_rows=12))


def test_what_was_prepared_is_written_before_the_thread_ends(wire: Any) -> None:
    async def scenario(ingest: Ingest, writer: FakeWriter, metrics: Metrics) -> None:
        lane = Lane(_source())
        writer.waits = True
        writer.open.clear()
        await _put_all(ingest, lane, [_batch(wire, seq) for seq in (1, 2)])
        closing = asyncio.create_task(ingest.close(10))
        await asyncio.sleep(0.05)

        writer.open.set()

        assert await closing
        assert writer.committed == [1, 2]

    _run(scenario, Pace(group_rows=6))


def _run(scenario: Any, pace: Pace = Pace(), slices: int = 0, **limits: int) -> None:  # noqa: B008  # frozen
    async def main() -> None:
        writer, metrics = FakeWriter(), Metrics("0")
        writer.slices = slices
        ingest = Ingest(writer, metrics, replace(Limits(), **limits), pace)  # type: ignore[arg-type]  # a fake
        try:
            await scenario(ingest, writer, metrics)
        finally:
            writer.open.set()
            await ingest.close(5)

    asyncio.run(main())


async def _put_all(ingest: Ingest, lane: Lane, batches: list[Batch]) -> None:
    for batch in batches:
        await ingest.put(batch, 1, lane)


async def _until(condition: Any) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), 10)


def _source() -> Source:
    roles = np.array([0, 1, 2, 0, 1, 2], np.int8)
    return Source(1, 1, "run", 0, 1, 0, False, np.arange(6), roles, np.full(6, 8.8))


def _batch(wire: Any, seq: int) -> Batch:
    return decode_stats(wire.stats(seq, wire.columns(1)), _source(), Limits())
