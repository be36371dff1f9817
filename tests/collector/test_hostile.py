"""Clients that are broken or mean: each hears what is wrong, keeps what it sent before, and disturbs nobody."""

from __future__ import annotations

import asyncio
import random
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8core.records import FIELDS
from fp8scope_collector.decode import RefusedError, decode_finish, decode_histograms, decode_open, decode_stats
from fp8scope_collector.limits import Limits
from fp8scope_collector.messages import Source
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.tokens import create
from fp8scope_protos.v1 import telemetry_pb2 as pb
from mutations import mutated

Connect = Callable[..., Any]
Start = Callable[..., Any]
STREAM = "/fp8scope.v1.Telemetry/Stream"
SENTENCES = {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}
IMPATIENT = [
    "-c",
    "import dataclasses, os; from fp8scope_collector import cli, limits; asked = cli.serve_config\n"
    "shorter = limits.Limits(open_s=float(os.environ['OPEN_S']))\n"
    "def impatient(**how): return dataclasses.replace(asked(**how), limits=shorter)\n"
    "cli.serve_config = impatient; cli.main()",
]


@pytest.fixture
def name() -> str:
    """A run of this test's own."""
    return f"run-{uuid.uuid4().hex[:8]}"


def answer_to(address: str, *messages: bytes) -> tuple[int, str, str]:
    """What is acknowledged, the status and the sentence for a stream of these bytes."""
    up_to_seq = 0
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.stream_stream(STREAM, response_deserializer=pb.ServerMessage.FromString)(iter(messages))
        try:
            for message in call:
                up_to_seq = max(up_to_seq, message.ack.up_to_seq)
        except grpc.RpcError as error:
            return up_to_seq, error.code().name, error.details()
    return up_to_seq, "OK", ""


def rows_of(engine: sa.Engine, run: str) -> int:
    sql = "SELECT count(*) FROM stats JOIN source s ON s.id = source_id JOIN run ON run.id = s.run_id WHERE name = :run"
    with engine.connect() as connection:
        return int(connection.execute(sa.text(sql), {"run": run}).scalar_one())


def resident_mib(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


# one at a time


def test_bytes_that_are_no_message_are_refused_and_what_came_before_stays(
    shared_collector: Any, wire: Any, name: str
) -> None:
    collector, engine = shared_collector
    messages = [pb.ClientMessage(open=wire.open(name)), pb.ClientMessage(stats=wire.stats(1, wire.columns(1)))]

    answers = [
        answer_to(collector.grpc, *(message.SerializeToString() for message in messages), b"\xff\xff\xff"),
        answer_to(collector.grpc, b"\xff\xff\xff"),
    ]

    for up_to_seq, (acknowledged, status, sentence) in zip((1, 0), answers, strict=True):
        assert (acknowledged, status) == (up_to_seq, "INVALID_ARGUMENT")
        assert sentence.startswith("what came is not a serialised ClientMessage: ")
    assert rows_of(engine, name) == 6
    assert "Traceback" not in collector.log.read_text()


def test_a_step_that_is_not_a_number_is_refused(shared_collector: Any, connect: Connect, wire: Any, name: str) -> None:
    collector, _ = shared_collector
    stream = connect(collector.grpc, wire.open(name))
    columns = wire.columns(1)
    columns["step"] = np.full(6, np.nan).view(np.uint64)

    stream.send(stats=wire.stats(1, columns))

    assert stream.refusal() == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "seq 1: step holds 9221120237041090560; expected at most 9007199254740992",
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("fewer", "opened with 6 slots, and says now 3 of which the first 6 are not the same"),
        ("others", "opened with 6 slots, and says now 6 of which the first 6 are not the same"),
        ("order", "opened with 6 slots, and says now 6 of which the first 6 are not the same"),
    ],
)
def test_a_catalogue_that_changes_is_refused_and_what_came_before_stays(
    shared_collector: Any, connect: Connect, wire: Any, name: str, change: str, sentence: str
) -> None:
    collector, engine = shared_collector
    opening = wire.open(name)
    stream = connect(collector.grpc, opening)
    stream.send(stats=wire.stats(1, wire.columns(1)))
    stream.wait_ack(1)
    changed = pb.Open.FromString(opening.SerializeToString())
    if change == "fewer":
        del changed.slots[3:]
    elif change == "others":
        changed.slots[2].layer = "another"
    else:
        changed.slots[0].layer, changed.slots[3].layer = changed.slots[3].layer, changed.slots[0].layer

    again = connect(collector.grpc, None)
    again.send(open=changed)
    code, said = again.refusal()

    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert sentence in said
    assert rows_of(engine, name) == 6


def test_a_catalogue_may_grow_at_its_end(shared_collector: Any, connect: Connect, wire: Any, name: str) -> None:
    """Libraries that make their layers on the first step are watched too."""
    collector, engine = shared_collector
    opening = wire.open(name, slots=3)
    connect(collector.grpc, opening).close()
    grown = wire.open(name, slots=6, source_uuid=opening.source_uuid)

    for _ in range(2):
        stream = connect(collector.grpc, grown)
    stream.send(stats=wire.stats(1, wire.columns(1)))
    stream.wait_ack(1)

    assert rows_of(engine, name) == 6


@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_is_off_by_days_loses_nothing_and_is_known(
    shared_collector: Any, connect: Connect, wire: Any, name: str, days: int
) -> None:
    collector, engine = shared_collector
    off = time.time_ns() + days * 86400 * 10**9
    stream = connect(collector.grpc, wire.open(name, sent_unix_ns=off, started_unix_ns=off))

    stream.send(stats=wire.stats(1, wire.columns(1), sent_unix_ns=off))
    stream.send(finish=wire.finish(2))
    stream.finish_sending()

    assert stream.up_to_seq == 2
    with engine.connect() as connection:
        sql = "SELECT clock_skew_ns FROM source s JOIN run ON run.id = s.run_id WHERE name = :run"
        skew = connection.execute(sa.text(sql), {"run": name}).scalar_one()
    assert abs(skew / 86400e9 - days) < 0.01


# limits of a token


@pytest.fixture
def limited(tmp_path: Path, start_collector: Start) -> Callable[..., tuple[Any, str]]:
    """A function: a collector that asks for tokens, and the secret of one with such limits."""

    def start(**limits: int) -> tuple[Any, str]:
        url = f"sqlite:///{tmp_path}/test.db"
        engine = open_engine(url)
        migrate(engine)
        everything: dict[str, Any] = {"project": None, "run": None, "expires_unix_ns": None, "now_unix_ns": 1}
        secret = create(engine, name="limited", scope="ingest", **everything, **limits)
        engine.dispose()
        return start_collector(url, "--auth", "tokens"), secret

    return start


def test_a_token_has_as_many_streams_as_it_may(limited: Any, connect: Connect, wire: Any) -> None:
    collector, secret = limited(max_streams=2)
    streams = [connect(collector.grpc, wire.open(rank=rank), token=secret) for rank in range(2)]

    third = connect(collector.grpc, None, token=secret)
    third.send(open=wire.open(rank=2))
    refused = third.refusal()
    streams[0].finish_sending()
    fourth = connect(collector.grpc, wire.open(rank=2), token=secret)

    assert refused == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "token 'limited' has 2 streams open here; it may have 2",
    )
    assert fourth.opened.incarnation == 1


def test_a_token_makes_as_many_runs_as_it_may(limited: Any, connect: Connect, wire: Any) -> None:
    collector, secret = limited(max_runs=2)
    for run in ("one", "two", "one"):
        connect(collector.grpc, wire.open(run), token=secret)

    third = connect(collector.grpc, None, token=secret)
    third.send(open=wire.open("three"))

    assert third.refusal() == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "run 'three' is new, and token limited has made 2 runs; it may make 2: delete one, or make a token that may "
        "make more",
    )
    assert connect(collector.grpc, wire.open("two"), token=secret).opened.incarnation >= 1
    assert "Traceback" not in collector.log.read_text()


def test_a_token_that_sends_too_much_waits_and_loses_nothing(limited: Any, connect: Connect, wire: Any) -> None:
    """60 rows a second: the first second's are free, so 120 rows more take two seconds, and others do not wait."""
    collector, secret = limited(max_rows_per_s=60)
    stream = connect(collector.grpc, wire.open(), token=secret)
    started = time.monotonic()

    for seq in range(1, 31):
        stream.send(stats=wire.stats(seq, wire.columns(seq)))
    stream.wait_ack(30)

    assert time.monotonic() - started > 1.9
    assert collector.metrics()[("fp8scope_throttled_batches_total",)] >= 15


# many at once


@pytest.mark.parametrize("count", [200, pytest.param(1_000, marks=pytest.mark.slow)])
def test_streams_that_say_nothing_cost_little_end_and_disturb_nobody(
    start_collector: Start, connect: Connect, wire: Any, tmp_path: Path, count: int, capsys: Any, monkeypatch: Any
) -> None:
    url = f"sqlite:///{tmp_path}/test.db"
    monkeypatch.setenv("OPEN_S", "2.5" if count < 500 else "10")
    collector = start_collector(url, program=IMPATIENT)
    good = connect(collector.grpc, wire.open("good"))
    seq = 0

    def send_some() -> None:
        nonlocal seq
        for _ in range(20):
            seq += 1
            good.send(stats=wire.stats(seq, wire.columns(seq)))
        good.wait_ack(seq)

    async def be_silent() -> Counter[str]:
        channels = [
            grpc.aio.insecure_channel(collector.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(max(1, count // 90))
        ]
        calls = [channels[i % len(channels)].stream_stream(STREAM)() for i in range(count)]
        while collector.metrics()[("fp8scope_open_streams",)] < count:
            await asyncio.sleep(0.1)
        resident.append(resident_mib(collector.process.pid))
        await asyncio.to_thread(send_some)
        codes = Counter([(await call.code()).name for call in calls])
        for channel in channels:
            await channel.close()
        return codes

    send_some()
    resident = [resident_mib(collector.process.pid)]
    rounds = 2 if count < 500 else 5
    codes = [asyncio.run(be_silent()) for _ in range(rounds)]
    send_some()
    resident.append(resident_mib(collector.process.pid))

    assert codes == [Counter({"DEADLINE_EXCEEDED": count})] * rounds
    assert collector.metrics()[("fp8scope_open_streams",)] == 1
    with capsys.disabled():
        print(f"\n{count} silent streams, {rounds} times: {' '.join(f'{mib:.0f}' for mib in resident)} MiB")
    assert resident[-2] - resident[-3] < 10, "each round reuses what those before took"
    assert "Traceback" not in collector.log.read_text()


# fuzz


SOURCE = Source(1, 1, "run", 0, 1, 0, False, np.arange(6), np.zeros(6, np.int8), np.full(6, 8.8))
LIMITS = Limits(rows=1000, scalars=20, columns_bytes=100_000, slots=50)
_number = st.one_of(st.integers(0, 3), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1]))
_large = st.one_of(st.integers(0, 3), st.sampled_from([2**53, 2**63 - 1, 2**63, 2**64 - 1]))
_signed = st.one_of(st.integers(-3, 3), st.sampled_from([-(2**63), 2**63 - 1]))
_text = st.text(st.characters(codec="utf-8"), max_size=12)
_drops = st.lists(st.builds(pb.Drop, reason=_text, rows=_large), max_size=3)
_columns = st.builds(
    lambda columns: pb.StatsColumns(**columns).SerializeToString(),
    st.dictionaries(
        st.sampled_from(["step", "slot", *(field.name for field in FIELDS)]),
        st.sampled_from([b"", bytes(8), bytes(16), b"\xff" * 8]),
    ),
)
_stats = st.builds(
    pb.StatsBatch,
    seq=_large,
    rows=_number,
    compression=st.integers(0, 3),
    columns_bytes=_number,
    columns_crc32=st.sampled_from([0, 0xFFFFFFFF]),
    columns=_columns,
    scalars=st.lists(st.builds(pb.Scalar, step=_large, name=_text, value=st.floats()), max_size=3),
    drops=_drops,
)
_finish = st.builds(
    pb.Finish, seq=_large, finished_unix_ns=_signed, outcome=st.integers(0, 4), message=_text, drops=_drops
)
_slots = st.builds(
    pb.Slot,
    slot=_number,
    layer=_text,
    role=st.integers(0, 5),
    format=st.sampled_from(["E4M3FN", "E5M2", "", "x"]),
    recipe=_text,
    margin=st.integers(-(2**31), 2**31 - 1),
    in_features=_number,
)
_open = st.builds(
    pb.Open,
    run=_text,
    project=_text,
    rank=_number,
    world_size=_number,
    incarnation=_number,
    source_uuid=_text,
    started_unix_ns=_signed,
    sent_unix_ns=_signed,
    slots=st.lists(_slots, max_size=3),
    config_json=st.one_of(_text, st.sampled_from(["{}", "[" * 5000, '{"a":NaN}', '{"a":1e999}'])),
    environment=st.dictionaries(_text, _text, max_size=2),
    tags=st.lists(_text, max_size=2),
    notes=_text,
)
_histograms = st.builds(
    pb.HistogramBatch, seq=_large, rows=_number, columns=_columns, columns_bytes=_number, drops=_drops
)


def _decoded_or_refused(message: Any) -> None:
    """Nothing but a RefusedError may come out."""
    try:
        if isinstance(message, pb.Open):
            decode_open(message, LIMITS)
        elif isinstance(message, pb.StatsBatch):
            decode_stats(message, SOURCE, LIMITS)
        elif isinstance(message, pb.HistogramBatch):
            decode_histograms(message, SOURCE, LIMITS)
        else:
            decode_finish(message, SOURCE, LIMITS)
    except RefusedError as error:
        refused = error
    else:
        return
    assert refused.code.name in SENTENCES
    assert len(str(refused)) > 10


_any_message = st.one_of(_stats, _finish, _open, _histograms)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(message=_any_message)
def test_whatever_a_message_holds_it_is_decoded_or_refused(message: Any) -> None:
    _decoded_or_refused(message)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(message=_any_message)
def test_whatever_twenty_thousand_messages_hold_they_are_decoded_or_refused(message: Any) -> None:
    _decoded_or_refused(message)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("messages", [1_200, pytest.param(80_000, marks=pytest.mark.slow)])
def test_damaged_bytes_end_their_own_stream_with_a_sentence_and_nothing_else(
    start_collector: Start, connect: Connect, wire: Any, tmp_path: Path, messages: int, capsys: Any
) -> None:
    """Half of the streams open well and go wrong then, half open wrongly; one stream beside them sends good batches."""
    url = f"sqlite:///{tmp_path}/test.db"
    collector = start_collector(url)
    good = connect(collector.grpc, wire.open("good"), timeout_s=1500)
    seq = 0
    whole = [
        pb.ClientMessage(open=wire.open("fuzz", tags=["a"], notes="b", config_json='{"c": 1}')),
        pb.ClientMessage(stats=wire.stats(1, wire.columns(1), scalars=[pb.Scalar(step=1, name="loss", value=1.0)])),
        pb.ClientMessage(stats=wire.stats(2, wire.columns(2), zstd=False)),
        pb.ClientMessage(finish=wire.finish(3, drops=[pb.Drop(reason="ring_full", rows=1)])),
        pb.ClientMessage(heartbeat=pb.Heartbeat(sent_unix_ns=1)),
    ]
    pieces = [message.SerializeToString() for message in whole]
    chance = random.Random(7)
    resident: list[float] = []

    async def one(call_stream: Any, damaged: bytes, opened: bool) -> str:
        opening = pb.ClientMessage(open=wire.open("fuzz", source_uuid=f"u{chance.randrange(50)}")).SerializeToString()
        call = call_stream()
        try:
            for data in [opening, damaged] if opened else [damaged]:
                await call.write(data)
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass
        return str((await call.code()).name)

    async def all_of_them() -> Counter[str]:
        nonlocal seq
        codes: Counter[str] = Counter()
        channel = grpc.aio.insecure_channel(collector.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
        call_stream = channel.stream_stream(STREAM)
        for start in range(0, messages, 50):
            group = [mutated(chance, chance.choice(pieces), pieces) for _ in range(min(50, messages - start))]
            codes.update(await asyncio.gather(*(one(call_stream, data, i % 2 == 0) for i, data in enumerate(group))))
            seq += 1
            good.send(stats=wire.stats(seq, wire.columns(seq)))
            await asyncio.to_thread(good.wait_ack, seq)
            if start // 50 in (messages // 100, messages // 50 - 1):
                resident.append(resident_mib(collector.process.pid))
        await channel.close()
        return codes

    codes = asyncio.run(all_of_them())

    with capsys.disabled():
        print(f"\n{messages} damaged messages: {dict(codes)}, {resident[0]:.0f} MiB half way, {resident[-1]:.0f} then")
    assert set(codes) <= SENTENCES | {"OK"}
    assert codes["INVALID_ARGUMENT"] > messages // 5
    assert resident[-1] - resident[0] < 20
    assert collector.process.poll() is None
    assert "Traceback" not in collector.log.read_text()
    engine = open_engine(url, read_only=True)
    assert rows_of(engine, "good") == 6 * seq
    engine.dispose()
