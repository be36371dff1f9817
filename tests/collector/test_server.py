"""A real collector, spoken to over gRPC: the life of a stream, back-pressure, draining."""

from __future__ import annotations

import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sqlalchemy as sa
import zstandard
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fp8scope_collector.storage.engine import open_engine
from fp8scope_protos.v1 import telemetry_pb2 as pb

Connect = Callable[..., Any]
Start = Callable[..., Any]


@pytest.fixture
def run() -> str:
    """A run of this test's own."""
    return f"run-{uuid.uuid4().hex[:8]}"


def test_the_first_answer_says_where_to_resume_and_how_much_may_be_under_way(
    shared_collector: Any, connect: Connect, wire: Any, run: str
) -> None:
    collector, _ = shared_collector
    stream = connect(collector.grpc, None)

    stream.send(open=wire.open(run, incarnation=3))
    answer = stream.receive()

    assert (answer.opened.incarnation, answer.opened.up_to_seq, answer.window) == (3, 0, 8)
    assert answer.opened.server_version == "0.1.0"


def test_what_is_acknowledged_is_in_the_database(shared_collector: Any, connect: Connect, wire: Any, run: str) -> None:
    collector, engine = shared_collector
    stream = connect(collector.grpc, wire.open(run, project="team"))

    for seq in range(1, 6):
        stream.send(stats=wire.stats(seq, wire.columns(seq)))
        stream.wait_ack(seq)
        assert _rows(engine, run) == 6 * seq


def test_a_reconnect_resumes_and_a_resend_changes_nothing(
    shared_collector: Any, connect: Connect, wire: Any, run: str
) -> None:
    collector, engine = shared_collector
    opening = wire.open(run)
    first = connect(collector.grpc, opening)
    for seq in range(1, 4):
        first.send(stats=wire.stats(seq, wire.columns(seq)))
    first.wait_ack(3)
    first.close()

    second = connect(collector.grpc, opening)
    assert second.opened.up_to_seq == 3
    for seq in range(1, 6):
        second.send(stats=wire.stats(seq, wire.columns(seq)))
    second.wait_ack(5)

    assert _rows(engine, run) == 30
    assert _source(engine, run) == (5, 30, 5)


def test_a_new_stream_may_come_while_the_old_one_s_batches_are_queued(
    shared_collector: Any, connect: Connect, wire: Any, run: str
) -> None:
    """Both streams of the source send the same batches at the same time: an agent whose connection flaps."""
    collector, engine = shared_collector
    opening = wire.open(run)
    streams = [connect(collector.grpc, opening) for _ in range(3)]

    for seq in range(1, 30):
        for stream in streams:
            stream.send(stats=wire.stats(seq, wire.columns(seq)))
    for stream in streams:
        stream.wait_ack(29)

    assert _rows(engine, run) == 29 * 6
    assert _source(engine, run) == (29, 29 * 6, 29)


def test_gaps_in_the_numbers_are_fine(shared_collector: Any, connect: Connect, wire: Any, run: str) -> None:
    collector, engine = shared_collector
    stream = connect(collector.grpc, wire.open(run))

    for seq in (5, 9, 1000):
        stream.send(stats=wire.stats(seq, wire.columns(seq)))
    stream.wait_ack(1000)

    assert _rows(engine, run) == 18


def test_histograms_are_numbered_with_the_batches(shared_collector: Any, connect: Connect, wire: Any, run: str) -> None:
    collector, engine = shared_collector
    stream = connect(collector.grpc, wire.open(run))
    assert stream.opened.takes_histograms
    packed = pb.HistogramColumns(
        step=np.array([2, 2], "<u8").tobytes(),
        slot=np.array([0, 5], "<u4").tobytes(),
        first_bin=np.array([120, 0], "u1").tobytes(),
        bins=np.array([3, 0], "<u2").tobytes(),
        counts=np.array([7, 0, 9], "<u8").tobytes(),
    ).SerializeToString()
    histograms = pb.HistogramBatch(
        seq=3,
        sent_unix_ns=1,
        rows=2,
        compression=pb.COMPRESSION_ZSTD,
        columns_bytes=len(packed),
        columns_crc32=zlib.crc32(packed),
        columns=zstandard.compress(packed, 1),
    )

    stream.send(stats=wire.stats(2, wire.columns(2)))
    stream.send(histograms=histograms)
    stream.send(stats=wire.stats(4, wire.columns(4)))
    stream.wait_ack(4)

    assert _rows(engine, run) == 12
    assert _source(engine, run)[0] == 4


def test_a_refused_batch_leaves_the_earlier_ones_committed_and_acknowledged(
    shared_collector: Any, connect: Connect, wire: Any, run: str
) -> None:
    collector, engine = shared_collector
    stream = connect(collector.grpc, wire.open(run))

    for seq in (1, 2, 3):
        stream.send(stats=wire.stats(seq, wire.columns(seq)))
    stream.send(stats=wire.stats(4, wire.columns(4), columns_crc32=1))
    stream.send(stats=wire.stats(5, wire.columns(5)))
    code, sentence = stream.refusal()

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence.startswith("seq 4: columns has CRC-32")
    assert stream.up_to_seq == 3
    assert _rows(engine, run) == 18


@pytest.mark.parametrize(
    ("bodies", "code", "sentence"),
    [
        (["heartbeat"], "INVALID_ARGUMENT", "the first message is heartbeat; expected open"),
        ([""], "INVALID_ARGUMENT", "the first message is None; expected open"),
        (
            ["open", "open"],
            "INVALID_ARGUMENT",
            "open came a second time; expected stats, histograms, finish or heartbeat",
        ),
        (["open", ""], "INVALID_ARGUMENT", "the message is empty; expected stats, histograms, finish or heartbeat"),
        (["open", "2", "2"], "INVALID_ARGUMENT", "seq 2: came after seq 2; expected a greater number"),
        (["open", "finish 3", "4"], "FAILED_PRECONDITION", "seq 4: the source has finished; expected no more of it"),
    ],
)
def test_a_stream_that_breaks_the_rules_is_told_which(
    shared_collector: Any, connect: Connect, wire: Any, run: str, bodies: list[str], code: str, sentence: str
) -> None:
    collector, _ = shared_collector
    stream = connect(collector.grpc, None)

    for body in bodies:
        kind, _, seq = body.partition(" ")
        if kind == "open":
            stream.send(open=wire.open(run))
        elif kind == "heartbeat":
            stream.send(heartbeat=pb.Heartbeat())
        elif kind == "finish":
            stream.send(finish=wire.finish(int(seq)))
        elif kind:
            stream.send(stats=wire.stats(int(kind), wire.columns(1)))
        else:
            stream.send()

    assert stream.refusal() == (grpc.StatusCode[code], sentence)


def test_a_contradiction_is_a_failed_precondition(shared_collector: Any, connect: Connect, wire: Any, run: str) -> None:
    collector, _ = shared_collector
    connect(collector.grpc, wire.open(run))
    other = wire.open(run, rank=1)
    other.slots[0].out_features = 1

    stream = connect(collector.grpc, None)
    stream.send(open=other)
    code, sentence = stream.refusal()

    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "give another model another run name" in sentence


def test_a_message_over_the_limit_is_refused(shared_collector: Any, connect: Connect, wire: Any, run: str) -> None:
    collector, _ = shared_collector
    stream = connect(collector.grpc, wire.open(run))

    stream.send(stats=pb.StatsBatch(seq=1, columns=bytes(17 << 20)))

    assert stream.refusal()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_finish_is_acknowledged_and_the_stream_ends_in_peace(
    shared_collector: Any, connect: Connect, wire: Any, run: str
) -> None:
    collector, engine = shared_collector
    opening = wire.open(run)
    stream = connect(collector.grpc, opening)

    stream.send(stats=wire.stats(1, wire.columns(1)))
    stream.send(finish=wire.finish(2, drops=[pb.Drop(reason="spool_full", rows=4)]))
    stream.finish_sending()

    assert stream.up_to_seq == 2
    assert stream.call.code() is grpc.StatusCode.OK
    with engine.connect() as connection:
        found = connection.exec_driver_sql(
            "SELECT outcome, d.reason, d.rows FROM source s JOIN run ON run.id = s.run_id"
            " JOIN drop_total d ON d.source_id = s.id WHERE run.name = ?",
            (run,),
        ).one()
    assert tuple(found) == ("finished", "spool_full", 4)
    late = connect(collector.grpc, opening)
    late.send(finish=wire.finish(2))
    late.send(stats=wire.stats(3, wire.columns(3)))
    assert late.refusal()[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_the_health_service_answers(shared_collector: Any) -> None:
    collector, _ = shared_collector
    with grpc.insecure_channel(collector.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "fp8scope.v1.Telemetry"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert collector.health() == (200, "ok\n")


def test_sigterm_drains_and_acknowledges_what_was_read(
    start_collector: Start, connect: Connect, wire: Any, database_url: str
) -> None:
    """Clients send without end; after the signal each gets `draining`, its acknowledgements and a clean end."""
    collector = start_collector(database_url)
    streams = [connect(collector.grpc, wire.open(rank=rank)) for rank in range(3)]

    def converse(stream: Any) -> None:
        seq = 0
        while not stream.draining:
            while seq - stream.up_to_seq < 8:
                seq += 1
                stream.send(stats=wire.stats(seq, wire.columns(seq)))
            stream.receive()
        stream.finish_sending()

    clients = [threading.Thread(target=converse, args=(stream,)) for stream in streams]
    for client in clients:
        client.start()
    while min(stream.up_to_seq for stream in streams) < 20:
        time.sleep(0.01)
    started = time.monotonic()
    exit_code = collector.terminate()
    took_s = time.monotonic() - started
    for client in clients:
        client.join(10)

    assert exit_code == 0
    assert took_s < 8, took_s  # well under 1 s where nothing else runs
    assert [stream.call.code() for stream in streams] == [grpc.StatusCode.OK] * 3
    engine = open_engine(database_url, read_only=True)
    with engine.connect() as connection:
        marks = dict(connection.exec_driver_sql("SELECT rank, up_to_seq FROM source").all())
        stored = "SELECT rank, count(*) FROM stats JOIN source s ON s.id = source_id GROUP BY rank"
        rows = dict(connection.exec_driver_sql(stored).all())
    engine.dispose()
    assert marks == {rank: stream.up_to_seq for rank, stream in enumerate(streams)}, "committed = acknowledged"
    assert rows == {rank: 6 * seq for rank, seq in marks.items()}
    assert "Traceback" not in collector.log.read_text()


def test_a_collector_without_streams_ends_at_once(start_collector: Start, tmp_path: Path) -> None:
    collector = start_collector(f"sqlite:///{tmp_path}/test.db")

    started = time.monotonic()

    assert collector.terminate() == 0
    assert time.monotonic() - started < 8, "well under 1 s where nothing else runs"


def test_a_client_that_vanishes_disturbs_nobody(shared_collector: Any, connect: Connect, wire: Any, run: str) -> None:
    collector, _ = shared_collector
    for rank in range(4):
        vanishing = connect(collector.grpc, wire.open(run, rank=rank))
        for seq in range(1, 20):
            vanishing.send(stats=wire.stats(seq, wire.columns(seq)))
        vanishing.close()

    stream = connect(collector.grpc, wire.open(run, rank=5))
    stream.send(stats=wire.stats(1, wire.columns(1)))
    stream.wait_ack(1)

    assert "Traceback" not in collector.log.read_text()


def test_two_collectors_share_one_database(
    start_collector: Start, connect: Connect, wire: Any, database_url: str
) -> None:
    """Each source sends every batch to both collectors, as agents do whose acknowledgements get lost."""
    collectors = [start_collector(database_url) for _ in range(2)]
    openings = [wire.open(rank=rank) for rank in range(3)]
    streams = [connect(collector.grpc, opening) for collector in collectors for opening in openings]

    for seq in range(1, 25):
        batch = wire.stats(seq, wire.columns(seq))
        for stream in streams:
            stream.send(stats=batch)
    for stream in streams:
        stream.wait_ack(24)

    engine = open_engine(database_url, read_only=True)
    with engine.connect() as connection:
        sources = connection.execute(sa.text("SELECT up_to_seq, rows FROM source")).all()
        total = connection.execute(sa.text("SELECT count(*) FROM stats")).scalar_one()
    engine.dispose()
    assert [tuple(row) for row in sources] == [(24, 144)] * 3
    assert total == 3 * 144
    expected = {"committed": 72, "duplicate": 72, "refused": 0}
    deadline = time.monotonic() + 10  # what is acknowledged is counted a moment later
    while (found := _outcomes(collectors, expected)) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == expected


def _outcomes(collectors: list[Any], names: Iterable[str]) -> dict[str, float]:
    every = [collector.metrics() for collector in collectors]
    return {name: sum(m["fp8scope_ingest_batches_total", f"outcome={name}"] for m in every) for name in names}


def _rows(engine: sa.Engine, run: str) -> int:
    sql = "SELECT count(*) FROM stats JOIN source s ON s.id = source_id JOIN run ON run.id = s.run_id WHERE name = ?"
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(sql, (run,)).scalar_one())


def _source(engine: sa.Engine, run: str) -> tuple[int, int, int]:
    sql = "SELECT up_to_seq, rows, last_step FROM source JOIN run ON run.id = run_id WHERE name = ?"
    with engine.connect() as connection:
        up_to_seq, rows, last_step = connection.exec_driver_sql(sql, (run,)).one()
    return up_to_seq, rows, last_step
