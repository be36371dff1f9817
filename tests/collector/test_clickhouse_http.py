"""A chDB folder that a collector has is read by other processes, live: they need no settings and can change nothing."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import stat
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import clickhouse_connect
import pyarrow as pa
import pytest
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError
from clickhouse_connect.driver.httputil import get_pool_manager

from fp8scope_collector.decode import decode_open, decode_stats
from fp8scope_collector.limits import Limits
from fp8scope_collector.storage import clickhouse_http, clickhouse_process
from fp8scope_collector.storage.clickhouse import ClickHouseStats
from fp8scope_collector.storage.clickhouse_http import OFFER, USER, Offer, ReadService, find, holder
from fp8scope_collector.storage.engine import migrate, open_engine, open_stats
from fp8scope_collector.storage.history import FIRST_STEP, LAST_STEP, Span
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.readmodels import RunNotFound
from fp8scope_collector.storage.stats_store import StatsStore, StorageError
from fp8scope_collector.storage.writer import StatsWriter

ENDLESS = "SELECT count() FROM numbers(1000000000000) WHERE sipHash64(number) = 1"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/test.db?stats=chdb:///{tmp_path}/stats"


@pytest.fixture
def store(url: str) -> Iterator[StatsStore]:
    """One whose folder this process has, and lets others read."""
    engine = open_engine(url)
    migrate(engine)
    store = open_stats(engine)
    store.migrate()
    store.offer()
    yield store
    store.close()
    engine.dispose()


@pytest.fixture
def offer(store: StatsStore, tmp_path: Path) -> Offer:
    """What others find in that folder."""
    found = find(tmp_path / "stats", os.getpid())
    assert found
    return found


def client(offer: Offer, password: str | None = None, **settings: Any) -> Any:
    """clickhouse-connect's, as anybody would make it."""
    return clickhouse_connect.get_client(
        host="127.0.0.1",
        port=offer.port,
        username=USER,
        password=offer.password if password is None else password,
        pool_mgr=get_pool_manager(),
        query_retries=0,
        settings=settings,
    )


def steps(reader: Reader) -> list[int]:
    found: list[int] = pa.Table.from_batches(reader.rows(reader.run("run").id))["step"].unique().to_pylist()
    return found


def test_another_process_reads_rows_while_the_collector_ingests(
    url: str, start_collector: Callable[..., Any], connect: Callable[..., Any], wire: Any, monkeypatch: Any
) -> None:
    collector = start_collector(url)
    stream = connect(collector.grpc, wire.open())
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nothing is
    with contextlib.closing(Reader(url)) as reader:
        for seq in (1, 2, 3):
            stream.send(stats=wire.stats(seq, wire.columns(seq)))
            stream.wait_ack(seq)

            assert steps(reader) == [*range(1, seq + 1)]
            curve = reader.series(reader.run("run").id, 0, ["amax"])
            assert curve.step.tolist() == [*range(1, seq + 1)]
    assert collector.terminate() == 0


def test_rows_are_the_same_as_the_collector_itself_would_read(
    url: str, offer: Offer, tmp_path: Path, monkeypatch: Any, wire: Any
) -> None:
    """More of them than one block has, and none."""
    engine = open_engine(url)
    store, through = open_stats(engine), open_stats(engine)
    assert isinstance(through, ClickHouseStats)
    writer = StatsWriter(engine, store)
    source = writer.register(decode_open(wire.open(), Limits()), now_unix_ns=1)
    writer.commit([decode_stats(wire.stats(1, wire.columns(0, steps=20_000)), source, Limits())], now_unix_ns=1)
    spans = [Span(source.id, 1, FIRST_STEP, LAST_STEP)]
    with engine.connect() as connection:
        expected = pa.Table.from_batches(store.rows(connection, spans, ["amax", "numel", "sum_sq"]))
        monkeypatch.setattr("fp8scope_collector.storage.clickhouse_reach.holder", lambda folder: 1)
        monkeypatch.setattr("fp8scope_collector.storage.clickhouse_reach.find", lambda folder, pid: offer)

        found = pa.Table.from_batches(through.rows(connection, spans, ["amax", "numel", "sum_sq"]))
        none = [*through.rows(connection, spans, ["amax"], slots=[99])]
        last = through.last_steps(connection, source.id, 2)

    assert found.num_rows == 120_000
    assert found.equals(expected)
    assert sum(batch.num_rows for batch in none) == 0
    assert last == [19_999, 19_998]
    assert through.size_bytes() == store.size_bytes()
    for each in (store, through):
        each.close()
    engine.dispose()


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("INSERT INTO stats_by_step (step) VALUES (1)", "begins with something else"),
        ("ALTER TABLE stats_by_step DELETE WHERE 1", "begins with something else"),
        ("DROP TABLE stats_by_step", "begins with something else"),
        ("KILL QUERY WHERE 1", "begins with something else"),
        ("SYSTEM STOP MERGES", "begins with something else"),
        ("SET readonly = 0", "begins with something else"),
        ("/**/ DROP TABLE stats_by_step", "begins with something else"),
        ("WITH 1 AS one INSERT INTO stats_by_step (step) SELECT one", ""),
        ("SELECT 1; SYSTEM STOP MERGES", "one statement at a time"),
        ("SELECT 1 INTO OUTFILE '{folder}/out.csv' FORMAT CSV", "reaches for nothing"),
        ("SELECT 1 INTO/**/outfile '{folder}/out.csv' FORMAT CSV", "reaches for nothing"),
        ("SELECT file('/etc/passwd')", "reaches for nothing"),
        ("SELECT * FROM file('/etc/passwd', 'LineAsString')", "reaches for nothing"),
        ("SELECT * FROM '/etc/passwd'", ""),
        ("SELECT * FROM url('http://127.0.0.1:1/', 'CSV', 'a Int64')", "readonly mode"),
        ("SELECT * FROM remote('127.0.0.1:1', system.one)", "readonly mode"),
        ("SELECT * FROM Python(handle)", "reaches for nothing"),
        ("SELECT 1 SETTINGS max_memory_usage = 0", "'max_memory_usage' setting in readonly mode"),
        ("SELECT groupArray(number) FROM numbers(1000000000)", "memory limit exceeded"),
        ("SELECT number FROM numbers(100000000) FORMAT JSONEachRow", "Limit for result exceeded"),
        ("SELECT nothing FROM stats", "Unknown expression identifier"),
    ],
)
def test_a_query_can_only_read_and_take_so_much(offer: Offer, tmp_path: Path, statement: str, reason: str) -> None:
    before = sorted(tmp_path.iterdir())

    with pytest.raises(DatabaseError, match=r"(?s)Code: \d+\. DB::Exception.*" + reason):
        client(offer).raw_query(statement.format(folder=tmp_path))

    assert sorted(tmp_path.iterdir()) == before
    assert client(offer).query("SELECT count() FROM stats_by_step").result_rows == [(0,)]


def test_a_setting_in_the_address_is_refused_unless_it_is_what_is_set_already(offer: Offer) -> None:
    secret = base64.b64encode(f"{USER}:{offer.password}".encode()).decode()

    def ask(**said: str) -> tuple[int, str | None]:
        connection = http.client.HTTPConnection("127.0.0.1", offer.port)
        query = urllib.parse.urlencode({"query": "SELECT {one:Int8}", "param_one": "1", **said})
        connection.request("GET", f"/?{query}", headers={"Authorization": f"Basic {secret}"})
        answer = connection.getresponse()
        return answer.status, answer.headers["X-ClickHouse-Exception-Code"]

    assert ask() == (200, None)
    assert ask(max_threads="1", database="default") == (200, None)
    assert ask(max_memory_usage="0") == (500, "164")
    assert ask(readonly="0") == (500, "164")


def test_nothing_is_compiled_for_a_query_of_the_collector_or_of_another(store: Any, offer: Offer) -> None:
    compiled = "'compile_expressions', 'compile_aggregate_expressions', 'compile_sort_description'"
    values = f"SELECT value FROM system.settings WHERE name IN ({compiled})"

    with store._database.client() as own:
        assert own.query(values).result_rows == [("0",)] * 3
    assert client(offer).query(values).result_rows == [("0",)] * 3


def test_who_has_not_read_the_file_is_not_let_in(offer: Offer, tmp_path: Path) -> None:
    left = tmp_path / "stats" / OFFER
    assert stat.S_IMODE(left.stat().st_mode) == 0o600

    with pytest.raises(DatabaseError, match="the password is not the one that this collector left") as refused:
        client(offer, password="guessed")
    assert refused.value.code == 516

    connection = http.client.HTTPConnection("127.0.0.1", offer.port)
    connection.request("POST", "/", body="SELECT 1")
    assert connection.getresponse().status == 403


def test_of_too_many_queries_one_waits_and_is_told_and_each_ends_when_its_time_is_up(
    offer: Offer, monkeypatch: Any
) -> None:
    monkeypatch.setattr(clickhouse_http, "WAIT_S", 0.1)
    asking = [client(offer) for _ in range(clickhouse_http.QUERIES + 1)]
    monkeypatch.setitem(clickhouse_http.LIMITS, "max_execution_time", 3)

    with ThreadPoolExecutor(len(asking)) as others:
        ended = [each.exception() for each in [others.submit(one.query, ENDLESS) for one in asking]]

    codes = sorted(int(error.code or 0) for error in ended if isinstance(error, DatabaseError))
    assert codes == [159] * clickhouse_http.QUERIES + [202], ended
    assert client(offer).query("SELECT 1").result_rows == [(1,)]


def test_a_reader_goes_on_when_the_collector_was_killed_and_when_another_starts(
    url: str,
    tmp_path: Path,
    start_collector: Callable[..., Any],
    connect: Callable[..., Any],
    wire: Any,
    run: Callable[..., Any],
    free_port: Callable[[], int],
) -> None:
    collector, opening = start_collector(url), wire.open()
    stream = connect(collector.grpc, opening)
    stream.send(stats=wire.stats(1, wire.columns(1)))
    stream.wait_ack(1)
    with contextlib.closing(Reader(url)) as reader:
        assert steps(reader) == [1]
        collector.process.kill()
        collector.process.wait()
        assert (tmp_path / "stats" / OFFER).exists(), "nobody was there to remove it"

        assert steps(reader) == [1], "the folder is nobody's, and a process was started to read it"
        reading = holder(tmp_path / "stats")
        assert reading not in (None, os.getpid())
        assert steps(reader) == [1]
        assert holder(tmp_path / "stats") == reading, "which stays for what will be asked next"

        examined = run("doctor", "--db", url, "--grpc", f"127.0.0.1:{free_port()}", fails=True).stdout
        assert re.search(r"ok: statistics in .*/stats can be read \(.* KiB\); no collector has the folder\n", examined)
        assert f"are free below '{tmp_path}/stats'" in examined
        with asking_all_the_while(reader):
            again = start_collector(url)
        stream = connect(again.grpc, opening)
        stream.send(stats=wire.stats(2, wire.columns(2)))
        stream.wait_ack(2)
        assert steps(reader) == [1, 2]
        assert again.terminate() == 0
    assert not (tmp_path / "stats" / OFFER).exists()


@contextlib.contextmanager
def asking_all_the_while(reader: Reader) -> Iterator[None]:
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            with contextlib.suppress(StorageError):  # the collector starts
                steps(reader)

    with ThreadPoolExecutor() as other:
        asking = other.submit(ask)
        try:
            yield
        finally:
            stop.set()
        asking.result()


def test_a_collector_ends_in_time_although_a_query_runs(
    url: str, tmp_path: Path, start_collector: Callable[..., Any]
) -> None:
    collector = start_collector(url)
    found = find(tmp_path / "stats", collector.process.pid)
    assert found
    asking, streaming = client(found), client(found)
    with ThreadPoolExecutor() as other:
        running = other.submit(asking.query, ENDLESS)
        stream = streaming.raw_stream("SELECT number FROM numbers(1000000000000)", fmt="Native")  # nobody reads it on
        stream.read(1)
        time.sleep(0.5)

        assert not running.done()
        assert collector.terminate() == 0

        assert isinstance(running.exception(timeout=10), ClickHouseError)


def test_a_folder_is_let_go_although_a_reader_has_stopped_reading(
    store: StatsStore, offer: Offer, tmp_path: Path, monkeypatch: Any
) -> None:
    """Its query is stopped, but the thread that answers waits for it to take what is there."""
    monkeypatch.setattr(clickhouse_http, "DRAIN_S", 0.2)
    stream = client(offer).raw_stream("SELECT number FROM numbers(1000000000000)", fmt="Native")
    stream.read(1)
    time.sleep(0.3)  # until nothing more fits between the two

    store.close()

    assert holder(tmp_path / "stats") is None


def test_commands_that_read_do_and_those_that_change_say_that_the_collector_has_to_be_stopped(
    url: str,
    tmp_path: Path,
    start_collector: Callable[..., Any],
    connect: Callable[..., Any],
    wire: Any,
    run: Callable[..., Any],
) -> None:
    collector = start_collector(url)
    stream = connect(collector.grpc, wire.open())
    stream.send(stats=wire.stats(1, wire.columns(1, steps=40)))
    stream.send(finish=wire.finish(2))
    stream.wait_ack(2)

    run("export", "run", "--db", url, "--out", str(tmp_path / "run.csv"), "--format", "csv")
    run("migrate", "--db", url)
    run("backup", str(tmp_path / "copy.db"), "--db", url)
    where = ["--grpc", collector.grpc, "--metrics", collector.http.removeprefix("http://")]
    examined = run("doctor", "--db", url, *where).stdout
    deleting = run("delete", "run", "--db", url, fails=True).stderr
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 1 + 240

    assert re.search(rf"/stats can be read \(.* KiB\), through process {collector.process.pid}, which has", examined)
    assert examined.endswith("nothing is wrong\n")
    said = f"the collector in process {collector.process.pid} has it. Stop it first"
    assert said in " ".join(deleting.split())
    with contextlib.closing(Reader(url)) as reader:
        assert len(steps(reader)) == 40
        assert collector.terminate() == 0
        assert len(steps(reader)) == 40, "in a process that was started to read it"
        command = [sys.executable, "-m", "fp8scope_collector", "delete", "run", "--db", url]
        subprocess.run(command, check=True, timeout=120)  # not in this process: it would keep the folder
        with pytest.raises(RunNotFound):
            steps(reader)


def test_reading_leaves_nothing_behind_in_the_process_that_reads(
    url: str, store: StatsStore, tmp_path: Path, wire: Any
) -> None:
    write(url, store, wire, 1)
    store.close()
    program = f"""
import gc, os, sys, time
from pathlib import Path
from fp8scope_collector.storage.clickhouse_http import find, holder
from fp8scope_collector.storage.engine import open_engine, open_stats
from fp8scope_collector.storage.reader import Reader

folder = Path({str(tmp_path / "stats")!r})
gc.disable()
for leaves in (True, True, False, False, False):
    reader = Reader({url!r})
    assert [batch.num_rows for batch in reader.rows(reader.run("run").id)] == [6]
    offer = find(folder, holder(folder))
    while leaves and holder(folder) == offer.pid:
        offer.tell_to_leave()
    reader.close()
    engine = open_engine({url!r})
    store = open_stats(engine)
    assert store.size_bytes() > 0
    store.close()
    engine.dispose()
    print(len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), "chdb" in sys.modules)
print(time.monotonic())
"""
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    returned_s = time.monotonic()

    *lines, ended_s = said.stdout.splitlines()
    first, *others = [line.split() for line in lines]
    assert returned_s - float(ended_s) < clickhouse_process.UNUSED_S / 2, "its standard error is nobody else's"
    assert len(others) == 4
    assert {descriptors for descriptors, _, _ in others} == {first[0]}
    assert all(int(threads) <= int(first[1]) + 1 for _, threads, _ in others), "one that waits for a child"
    assert {chdb for _, _, chdb in (first, *others)} == {"False"}


def test_a_process_that_is_read_from_stays_as_long_as_it_is_used(
    url: str, store: StatsStore, tmp_path: Path, wire: Any
) -> None:
    folder = tmp_path / "stats"
    write(url, store, wire, 1)
    store.close()
    program = "from fp8scope_collector.storage import clickhouse_process as it; it.UNUSED_S = 1.5; it.main()"
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True) as reading:
        assert reading.stdout
        assert reading.stdout.readline() == "ready\n"
        found = find(folder, reading.pid)
        assert found
        asking = client(found)
        for _ in range(20):
            assert asking.query("SELECT count() FROM stats").result_rows == [(6,)]
            time.sleep(0.2)
        assert asking.query("SELECT getSetting('max_threads')").result_rows == [(2,)], "no ingest is beside it"
        assert reading.wait(timeout=20) == 0
    assert holder(folder) is None
    assert not (folder / OFFER).exists()


def test_who_has_just_read_the_offer_of_a_process_that_wants_to_leave_is_answered_and_it_stays(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clickhouse_process, "UNUSED_S", 0.0)
    folder = tmp_path / "stats"
    with contextlib.closing(open_stats(open_engine(url))) as store:
        store.migrate()
        service = ReadService(folder, gives_way=True)
        asking = client(find(folder, os.getpid()) or pytest.fail("no offer"))
        withdraw = service.withdraw

        def withdraw_and_be_asked() -> None:
            withdraw()
            assert not (folder / OFFER).exists()
            assert asking.query("SELECT 1").result_rows == [(1,)]

        with monkeypatch.context() as patched:
            patched.setattr(service, "withdraw", withdraw_and_be_asked)
            assert not clickhouse_process._is_left(service)
        assert (folder / OFFER).exists()
        stream = asking.raw_stream("SELECT number FROM numbers(1000000000000)", fmt="Native")
        stream.read(1)
        time.sleep(0.1)
        assert service.used_since(time.monotonic()), "one that runs"
        stream.close()
        while service.used_since(time.monotonic()):
            time.sleep(0.01)
        assert clickhouse_process._is_left(service)
        assert not (folder / OFFER).exists()
        service.close()


@pytest.mark.parametrize(("password", "status"), [(None, 500), ("guessed", 403)])
def test_a_collector_does_not_leave_when_it_is_told_to(offer: Offer, password: str | None, status: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", offer.port, timeout=10)
    credentials = base64.b64encode(f"{USER}:{password or offer.password}".encode()).decode()
    connection.request("POST", "/leave", headers={"Authorization": f"Basic {credentials}"})

    assert connection.getresponse().status == status
    connection.close()
    assert client(offer).query("SELECT 1").result_rows == [(1,)]


def write(url: str, store: StatsStore, wire: Any, seq: int) -> None:
    """One batch of a run called `run`, committed."""
    engine = open_engine(url)
    writer = StatsWriter(engine, store)
    source = writer.register(decode_open(wire.open(), Limits()), now_unix_ns=1)
    writer.commit([decode_stats(wire.stats(seq, wire.columns(seq)), source, Limits())], now_unix_ns=1)
    engine.dispose()


def test_two_collectors_on_one_folder_are_told_apart(
    url: str, start_collector: Callable[..., Any], tmp_path: Path
) -> None:
    collector = start_collector(url)
    store = open_stats(open_engine(url))

    with pytest.raises(StorageError, match=f"cannot be changed: .* the collector in process {collector.process.pid}"):
        store.migrate()
