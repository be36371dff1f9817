"""kill -9 under load, and a database that goes away: what was acknowledged is there, once."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
import sqlalchemy as sa

from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import open_engine, open_stats
from fp8scope_collector.storage.history import FIRST_STEP, LAST_STEP, Span
from fp8scope_collector.storage.stats_store import row_schema
from fp8scope_protos.v1 import telemetry_pb2 as pb
from rollup_reference import compare

RANKS = 3
SLOTS = 60


class Agent(threading.Thread):
    """One rank that sends batches 1, 2, 3 ... as an agent does, over as many collectors as it takes."""

    def __init__(self, rank: int, connect: Callable[..., Any], wire: Any) -> None:
        super().__init__(daemon=True)
        self.opening: pb.Open = wire.open(rank=rank, slots=SLOTS)
        self.address = ""
        self.up_to_seq = 0
        self.last_seq: int | None = None  # the end, once it is decided
        self._connect = connect
        self._wire = wire

    def run(self) -> None:
        while self.last_seq is None or self.up_to_seq < self.last_seq:
            try:
                self._send()
            except (grpc.RpcError, StopIteration):
                time.sleep(0.05)

    def wait_for(self, seq: int) -> None:
        """Returns when so much is acknowledged."""
        _until(lambda: self.up_to_seq >= seq)

    def _send(self) -> None:
        stream = self._connect(self.address, self.opening)
        assert stream.opened.up_to_seq >= self.up_to_seq, "an acknowledged batch is not committed"
        sent = stream.opened.up_to_seq
        while self.last_seq is None or self.up_to_seq < self.last_seq:
            while sent - stream.up_to_seq < 8 and (self.last_seq is None or sent < self.last_seq):
                sent += 1
                stream.send(stats=self._wire.stats(sent, self._wire.columns(sent, slots=SLOTS)))
            stream.receive()
            self.up_to_seq = max(self.up_to_seq, stream.up_to_seq)


@pytest.fixture(params=["sqlite", "postgresql", "chdb"])
def stats_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database of this test's own, on each engine for statistics."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    stats = f"?stats=chdb:///{tmp_path}/stats" if request.param == "chdb" else ""
    return f"sqlite:///{tmp_path}/test.db{stats}"


@pytest.mark.parametrize("seed", [1])
def test_kill_9_loses_no_acknowledged_row_and_doubles_none(
    start_collector: Callable[..., Any], connect: Callable[..., Any], wire: Any, stats_url: str, seed: int
) -> None:
    _kill_under_load(start_collector, connect, wire, stats_url, seed, 3, [])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))  # a hundred on each database
def test_kill_9_many_times(
    start_collector: Callable[..., Any],
    connect: Callable[..., Any],
    wire: Any,
    stats_url: str,
    seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    restarts_s: list[float] = []
    _kill_under_load(start_collector, connect, wire, stats_url, seed, 10, restarts_s)
    with capsys.disabled():
        print(f"\n{len(restarts_s)} starts: median {statistics.median(restarts_s):.2f} s, max {max(restarts_s):.2f} s")


def _kill_under_load(
    start_collector: Callable[..., Any],
    connect: Callable[..., Any],
    wire: Any,
    url: str,
    seed: int,
    kills: int,
    restarts_s: list[float],
) -> None:
    """Kills at random moments: mostly while it commits, now and then while it still starts."""
    chance = random.Random(seed)
    agents = [Agent(rank, connect, wire) for rank in range(RANKS)]
    for life in range(kills):
        if life % 5 == 4:
            starting = subprocess.Popen(
                [sys.executable, "-m", "fp8scope_collector", "serve", "--db", url, "--grpc", "127.0.0.1:0"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(chance.uniform(0, 2))
            starting.kill()
            starting.wait()
        started = time.monotonic()
        collector = start_collector(url)
        restarts_s.append(time.monotonic() - started)
        for agent in agents:
            agent.address = collector.grpc
            if life == 0:
                agent.start()
        for agent in agents:
            agent.wait_for(agent.up_to_seq + 3)
        time.sleep(chance.uniform(0, 0.2))
        collector.process.kill()
        collector.process.wait()
        acknowledged = [agent.up_to_seq for agent in agents]
        _check(url, [range(1, seq + 1) for seq in acknowledged], exactly=False)
        _check_rollups(url)

    collector = start_collector(url)
    for agent in agents:
        agent.address = collector.grpc
        agent.last_seq = agent.up_to_seq + 20
    for agent in agents:
        agent.join(30)
        assert not agent.is_alive(), "not everything was acknowledged in the end"
    if "stats=" not in url:
        _until(lambda: _check_rollups(url) > 1)  # a collector catches up with what its dead predecessors left
    assert collector.terminate() == 0
    _check(url, [range(1, (agent.last_seq or 0) + 1) for agent in agents], exactly=True)


def _check(url: str, expected: list[range], *, exactly: bool) -> None:
    """All steps of each rank are stored with all their slots and the values that were sent."""
    engine = open_engine(url, read_only=True)
    store = open_stats(engine)
    source = schema.source.c
    with engine.connect() as connection:
        query = sa.select(source.id, source.rank, source.up_to_seq, source.rows)
        marks = {row.rank: row for row in connection.execute(query)}
        own: dict[int, pa.Table] = {}
        for rank, mark in marks.items():
            span = Span(mark.id, 1, FIRST_STEP, LAST_STEP)
            batches = list(store.rows(connection, [span], ["amax"]))
            own[rank] = pa.Table.from_batches(batches, row_schema(["amax"]))
    store.close()
    engine.dispose()
    for rank, steps in enumerate(expected):
        step, slot, amax = (own[rank][name].to_numpy() for name in ("step", "slot", "amax"))
        found = np.unique(step)
        assert set(steps) <= set(found.tolist()), f"rank {rank} lost steps {set(steps) - set(found.tolist())}"
        assert len(found) == found.max() == len(step) // SLOTS
        np.testing.assert_array_equal(step, np.repeat(found, SLOTS))
        np.testing.assert_array_equal(slot, np.tile(np.arange(SLOTS), len(found)))
        np.testing.assert_array_equal(amax, step * 64 + slot)
        mark = marks[rank]
        assert mark.rows == SLOTS * mark.up_to_seq
        if exactly:
            assert found.tolist() == list(steps)
        if exactly or "stats=" not in url:
            assert mark.up_to_seq == found.max(), "watermark and rows are committed together"


def _check_rollups(url: str) -> int:
    """Rollups are those of the raw rows that they say they hold; the step below which they hold every rank's."""
    if "stats=" in url:  # whose raw rows belong to another process
        return 0
    engine = open_engine(url, read_only=True)
    compare(engine)
    with engine.connect() as connection:
        rolled = connection.scalar(sa.select(sa.func.min(schema.coverage.c.rolled_step)))
    engine.dispose()
    return int(rolled or 0)


def test_connections_that_postgresql_cuts_lose_nothing(
    start_collector: Callable[..., Any], connect: Callable[..., Any], wire: Any, postgres_url: str
) -> None:
    collector = start_collector(postgres_url)
    stream = connect(collector.grpc, wire.open())
    admin = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    cut = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fp8scope'")

    for seq in range(1, 61):
        stream.send(stats=wire.stats(seq, wire.columns(seq)))
        if seq % 10 == 0:
            with admin.connect() as connection:
                connection.execute(cut)
    stream.wait_ack(60)

    with admin.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM stats")).scalar_one() == 360
    admin.dispose()


def test_a_database_that_is_gone_holds_the_agents_and_says_so(
    start_collector: Callable[..., Any], connect: Callable[..., Any], wire: Any, postgres_url: str
) -> None:
    """A table vanishes and comes back: batches wait, /metrics and /healthz tell, then all is stored."""
    collector = start_collector(postgres_url)
    stream = connect(collector.grpc, wire.open())
    admin = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text("ALTER TABLE stats RENAME TO hidden"))

    for seq in range(1, 6):
        stream.send(stats=wire.stats(seq, wire.columns(seq)))
    _until(lambda: collector.metrics()[("fp8scope_database_up",)] == 0)

    assert collector.health() == (503, "the database does not take what is written\n")
    assert collector.metrics()[("fp8scope_queue_bytes",)] > 0
    assert stream.receive().ack.up_to_seq == 0, "again and again: somebody is there"
    with admin.connect() as connection:
        connection.execute(sa.text("ALTER TABLE hidden RENAME TO stats"))
    stream.wait_ack(5)
    assert collector.metrics()[("fp8scope_database_up",)] == 1
    assert collector.metrics()[("fp8scope_queue_bytes",)] == 0
    assert collector.health() == (200, "ok\n")
    said = [event["event"] for event in collector.events() if "database" in event["event"]]
    assert said == ["database does not take what is written; waiting for it", "database is back"]
    admin.dispose()


def test_a_collector_whose_database_is_gone_ends_in_time_and_acknowledges_nothing(
    start_collector: Callable[..., Any], connect: Callable[..., Any], wire: Any, postgres_url: str
) -> None:
    collector = start_collector(postgres_url)
    stream = connect(collector.grpc, wire.open())
    admin = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text("ALTER TABLE stats RENAME TO hidden"))
    admin.dispose()
    for seq in range(1, 6):
        stream.send(stats=wire.stats(seq, wire.columns(seq)))
    _until(lambda: collector.metrics()[("fp8scope_database_up",)] == 0)

    started = time.monotonic()
    exit_code = collector.terminate()

    assert exit_code == 0
    assert time.monotonic() - started < 8, "4 s where nothing else runs"
    assert stream.refusal()[0] is not grpc.StatusCode.OK
    assert stream.up_to_seq == 0
    assert "the database did not take everything; agents will send it again" in collector.log.read_text()
    assert "Traceback" not in collector.log.read_text()


def _until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
