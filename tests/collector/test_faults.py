"""Databases that are full, locked, gone, restarted or in a deadlock: the collector waits, tells, and loses nothing.

The long forms last a minute each; the short ones the least that the collector notices.
"""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fp8scope_collector.storage.engine import migrate, open_engine

Connect = Callable[..., Any]
Start = Callable[..., Any]
UP, RETRIES = ("fp8scope_database_up",), ("fp8scope_database_retries_total",)
SLOTS = 60
long = pytest.mark.slow
BRIEF = [  # a collector whose patience with a lock is half a second, so that a short lock shows
    "-c",
    "from fp8scope_collector.storage import engine; engine.BUSY_TIMEOUT_S = 0.5;"
    "from fp8scope_collector.cli import main; main()",
]


class Load:
    """An agent that keeps its window of batches under way, whatever happens, until `finish`."""

    def __init__(self, collector: Any, connect: Connect, wire: Any) -> None:
        self.collector = collector
        self._stream = connect(collector.grpc, wire.open("load", slots=SLOTS), timeout_s=300)
        self._wire = wire
        self._stop = threading.Event()
        self.sent = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def acknowledged(self) -> int:
        return int(self._stream.up_to_seq)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._send_to(self.acknowledged + 8)
            self._stream.receive()
        self._stream.wait_ack(self.sent)

    def _send_to(self, seq: int) -> None:
        while self.sent < seq:
            self.sent += 1
            self._stream.send(stats=self._wire.stats(self.sent, self._wire.columns(self.sent, slots=SLOTS)))

    def wait_for(self, more: int) -> None:
        """Returns when so many batches more are acknowledged."""
        goal = self.acknowledged + more
        until(lambda: self.acknowledged >= goal, "no batch is acknowledged", timeout_s=60)

    def finish(self) -> int:
        """All batches that were sent, when they are acknowledged."""
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.sent


def endure(load: Load, hurt: Callable[[], Any], relieve: Callable[[], Any], seconds: float) -> None:
    """`hurt`s the database under load for so long: agents wait, /metrics and /healthz tell, and all goes on then."""
    load.wait_for(10)
    before = load.collector.metrics()
    assert (before[UP], before[RETRIES]) == (1, 0)

    hurt()
    until(lambda: load.collector.metrics()[UP] == 0, "/metrics does not tell")
    health, stuck_at = load.collector.health(), load.acknowledged
    time.sleep(seconds)
    assert load.acknowledged <= stuck_at + 1, "what is not stored is acknowledged"
    assert load.collector.metrics()[("fp8scope_queue_bytes",)] > 0
    relieve()
    until(lambda: load.collector.metrics()[UP] == 1, "it does not resume")
    load.wait_for(10)

    assert health == (503, "the database does not take what is written\n")
    assert load.collector.health() == (200, "ok\n")
    assert load.collector.metrics()[RETRIES] >= 1
    events = [event["event"] for event in load.collector.events()]
    assert events.count("database does not take what is written; waiting for it") >= 1
    assert "Traceback" not in load.collector.log.read_text()


def check(url: str, batches: int) -> None:
    """Each batch is there once, with the values that were sent."""
    engine = open_engine(url, read_only=True)
    with engine.connect() as connection:
        rows = connection.execute(
            sa.text("SELECT step, count(*), count(DISTINCT slot), max(amax) FROM stats GROUP BY step ORDER BY step")
        ).all()
        assert connection.execute(sa.text("SELECT up_to_seq, rows FROM source")).one() == (batches, batches * SLOTS)
        if engine.dialect.name == "sqlite":
            assert connection.execute(sa.text("PRAGMA integrity_check")).scalar_one() == "ok"
    engine.dispose()
    assert [tuple(row) for row in rows] == [(seq, SLOTS, SLOTS, seq * 64 + SLOTS - 1) for seq in range(1, batches + 1)]


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/test.db"


@pytest.mark.parametrize("seconds", [0.5, pytest.param(60, marks=long)])
def test_a_locked_sqlite_database_delays(
    start_collector: Start, connect: Connect, wire: Any, tmp_path: Path, sqlite_url: str, seconds: float
) -> None:
    load = Load(start_collector(sqlite_url, program=BRIEF), connect, wire)
    with closing(sqlite3.connect(tmp_path / "test.db", isolation_level=None, check_same_thread=False)) as other:
        endure(load, lambda: other.execute("BEGIN EXCLUSIVE"), lambda: other.execute("ROLLBACK"), seconds)

    check(sqlite_url, load.finish())


@pytest.mark.parametrize("seconds", [0.5, pytest.param(60, marks=long)])
def test_a_file_that_may_not_grow_delays(
    start_collector: Start, connect: Connect, wire: Any, tmp_path: Path, sqlite_url: str, seconds: float
) -> None:
    """A quota, by the kernel's limit on the size of a file."""
    collector = start_collector(sqlite_url)
    load = Load(collector, connect, wire)
    unlimited = resource.prlimit(collector.process.pid, resource.RLIMIT_FSIZE)

    def full() -> None:
        largest = max(path.stat().st_size for path in tmp_path.glob("test.db*"))
        resource.prlimit(collector.process.pid, resource.RLIMIT_FSIZE, (largest, unlimited[1]))

    def room() -> None:
        resource.prlimit(collector.process.pid, resource.RLIMIT_FSIZE, unlimited)

    endure(load, full, room, seconds)

    check(sqlite_url, load.finish())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small disk; the test beside this one needs none")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this system mounts nothing for us")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("seconds", [0.5, pytest.param(60, marks=long)])
def test_a_full_disk_delays(
    start_collector: Start, connect: Connect, wire: Any, small_disk: Path, seconds: float
) -> None:
    url = f"sqlite:///{small_disk}/test.db"
    load = Load(start_collector(url), connect, wire)
    ballast = small_disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

    endure(load, fill, ballast.unlink, seconds)

    check(url, load.finish())


def test_a_full_disk_at_the_start_is_a_sentence(small_disk: Path, run: Callable[..., Any]) -> None:
    (small_disk / "ballast").write_bytes(bytes(8 << 20))

    said = run("serve", "--db", f"sqlite:///{small_disk}/test.db", "--grpc", "127.0.0.1:0", fails=True)

    assert "Traceback" not in said.stderr
    assert "disk" in said.stderr.splitlines()[-1]


@pytest.fixture
def postgres_that_stops(postgres_server: Any, postgres_url: str) -> Iterator[str]:
    """The URL of a database whose server the test may stop; it runs again afterwards."""
    yield postgres_url
    postgres_server.start()


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=long)])
def test_a_postgresql_that_is_gone_delays(
    start_collector: Start,
    connect: Connect,
    wire: Any,
    postgres_server: Any,
    postgres_that_stops: str,
    seconds: float,
) -> None:
    load = Load(start_collector(postgres_that_stops), connect, wire)

    endure(load, postgres_server.stop, postgres_server.start, seconds)

    check(postgres_that_stops, load.finish())


def test_a_postgresql_that_crashes_and_is_back_at_once_loses_nothing(
    start_collector: Start, connect: Connect, wire: Any, postgres_server: Any, postgres_that_stops: str
) -> None:
    """An immediate shutdown, three times: what was under way is rolled back there, and committed again here."""
    load = Load(start_collector(postgres_that_stops), connect, wire)
    for _ in range(3):
        load.wait_for(10)
        postgres_server.stop()
        postgres_server.start()
    load.wait_for(10)

    check(postgres_that_stops, load.finish())


def test_a_deadlock_is_repeated(
    start_collector: Start, connect: Connect, wire: Any, postgres_url: str, postgres_server: Any
) -> None:
    """Somebody holds `scalar` and wants the source that the collector has locked; PostgreSQL cuts one of the two."""
    engine = open_engine(postgres_url)
    migrate(engine)
    engine.dispose()
    collector = start_collector(postgres_url)
    stream = connect(collector.grpc, wire.open("load"))
    database = sa.make_url(postgres_url).database
    with postgres_server.connect(database) as admin:
        admin.execute(f"ALTER DATABASE {database} SET deadlock_timeout = '50ms'")
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fp8scope'")
    deadlocks = 0
    for seq in range(1, 11):
        with postgres_server.connect(database) as other:
            other.execute("SET deadlock_timeout = '10s'")  # so that it is the collector that is cut
            other.execute("BEGIN")
            other.execute("LOCK TABLE drop_total IN ACCESS EXCLUSIVE MODE")
            stream.send(stats=wire.stats(seq, wire.columns(seq), drops=[{"reason": "ring_full", "rows": seq}]))
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'drop_total'::regclass"
            until(lambda: other.execute(waiting).fetchone()[0] > 0, "the collector does not come to the table")  # noqa: B023
            other.execute("SELECT id FROM source FOR UPDATE")
            other.execute("ROLLBACK")
        stream.wait_ack(seq)
        deadlocks = collector.metrics()[RETRIES]

    assert deadlocks >= 10
    assert "deadlock detected" in collector.log.read_text()
    with postgres_server.connect(database) as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT step) FROM stats").fetchone() == (60, 10)
        assert connection.execute("SELECT rows FROM drop_total").fetchone() == (10,)


def until(condition: Callable[[], bool], otherwise: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)
