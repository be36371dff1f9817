"""The sender delivers each record once, whatever the collector and the network do, and says what a person must know."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from fake_collector import Behaviour, FakeCollector
from fp8core.records import FIELDS
from fp8scope_agent.delivery import Delivery
from fp8scope_agent.encode import Encoder, StepHistograms, StepRows, finish_message
from fp8scope_agent.segments import FINISH, HISTOGRAMS, STATS, Record
from fp8scope_agent.sender import SpoolLockedError, WriterLifetime, deliver
from fp8scope_agent.spool import SOURCE_FILE, SpoolWriter, read_acked, waiting
from fp8scope_agent.status import DELIVERED, LEFT_OVER, SenderStatus, read_requests, read_status
from fp8scope_agent.stream import Timing
from fp8scope_protos.v1 import telemetry_pb2 as pb

QUICK = Timing(poll_s=0.01, heartbeat_s=0.1, opened_s=0.3, acked_s=0.5, turn_s=0.5, drain_s=0.5)
SLOTS = 3


class Spool:
    """A spool as a monitor would write it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        slots = [pb.Slot(slot=slot, layer="fc", role=slot + 1, format="E4M3FN") for slot in range(SLOTS)]
        message = pb.Open(run="run", world_size=1, incarnation=1, source_uuid=str(folder), slots=slots)
        (folder / SOURCE_FILE).write_bytes(message.SerializeToString())
        self.writer = SpoolWriter(folder, max_bytes=1 << 30, segment_bytes=2000)
        self.steps = 0
        self.seq = 0

    def add(self, steps: int = 1) -> None:
        encoder = Encoder()
        for _ in range(steps):
            columns = {field.name: np.full(SLOTS, self.steps, field.dtype) for field in FIELDS}
            rows = StepRows(np.arange(SLOTS), columns)
            self.seq += 1
            payload = encoder.stats(
                seq=self.seq, step=self.steps, taken_unix_ns=1, rows=rows, scalars={"loss": 0.5}, drops={}
            )
            self.writer.append(Record(self.seq, STATS, SLOTS, payload))
            self.steps += 1

    def add_histograms(self) -> None:
        counts = np.zeros((SLOTS, 256), np.int64)
        counts[:, 120:124] = np.arange(4) + self.steps
        self.seq += 1
        payload = Encoder().histograms(
            seq=self.seq,
            step=self.steps - 1,
            taken_unix_ns=1,
            histograms=StepHistograms(np.arange(SLOTS), counts),
            drops={},
        )
        self.writer.append(Record(self.seq, HISTOGRAMS, SLOTS, payload))

    def finish(self) -> None:
        self.seq += 1
        payload = finish_message(
            seq=self.seq, finished_unix_ns=1, failure=None, last_step=max(self.steps - 1, 0), drops={}
        )
        self.writer.append(Record(self.seq, FINISH, 0, payload))
        self.writer.close()

    @property
    def status(self) -> SenderStatus:
        return read_status(self.folder)

    def wait_for(self, condition: Callable[[SenderStatus], bool], timeout_s: float = 10.0) -> SenderStatus:
        deadline = time.monotonic() + timeout_s
        while not condition(self.status):
            assert time.monotonic() < deadline, self.status
            time.sleep(0.01)
        return self.status


class Life:
    """A sender's lifetime in the hands of the test."""

    def __init__(self) -> None:
        self.ended = False
        self.over = False

    def writer_ended(self) -> bool:
        return self.ended

    def expired(self, acked_seq: int) -> bool:
        return self.over


class Sending:
    """A sender in a thread."""

    def __init__(self, spool: Spool, *addresses: str, token: str | None = None, timing: Timing = QUICK) -> None:
        self.life = Life()
        self.result: int | None = None
        self._arguments = (spool.folder, addresses, token, timing)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        folder, addresses, token, timing = self._arguments
        self.result = deliver(folder, addresses=addresses, token=token, lifetime=self.life, timing=timing)

    def end(self, *, over: bool = False, timeout_s: float = 20.0) -> int | None:
        """Say that the writer has ended, or that time is `over`; the sender's exit status."""
        self.life.ended, self.life.over = True, over
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
        return self.result


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "source")


@pytest.fixture
def send(spool: Spool) -> Iterator[Callable[..., Sending]]:
    started: list[Sending] = []

    def start(*addresses: str, **arguments: object) -> Sending:
        started.append(Sending(spool, *addresses, **arguments))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for sending in started:
        sending.end(over=True)


def assert_everything_once(collector: FakeCollector, spool: Spool) -> None:
    source = collector.source
    assert sorted(source.rows) == [(step, slot) for step in range(spool.steps) for slot in range(SLOTS)]
    assert source.duplicate_rows == source.resent == 0
    assert len(source.scalars) == spool.steps


def test_a_finished_spool_is_delivered_and_leaves_no_segment(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    spool.add(100)
    spool.finish()

    result = send(collector.address).end()

    assert result == DELIVERED
    assert_everything_once(collector, spool)
    assert collector.source.finish is not None
    assert list(spool.folder.glob("*.seg")) == []
    assert spool.status.acked_rows == 100 * SLOTS
    assert spool.status.finished


def test_records_are_sent_while_the_spool_is_being_written(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    sending = send(collector.address)
    for _ in range(5):
        spool.add(3)
        collector.wait_for(lambda source: source.up_to_seq == spool.seq)

    assert spool.wait_for(lambda status: status.acked_seq == spool.seq).connected
    assert sending.result is None


def test_a_source_that_crashed_is_delivered_to_its_end_without_a_finish(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    spool.add(7)

    result = send(collector.address).end()

    assert result == DELIVERED
    assert_everything_once(collector, spool)
    assert collector.source.finish is None
    assert not spool.status.finished


def test_commits_whose_acknowledgement_was_lost_are_not_stored_twice(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    collector.behaviour = Behaviour(drop_stream_after=3)
    spool.add(40)
    spool.finish()
    sending = send(collector.address)
    collector.wait_for(lambda source: source.opens > 5)
    collector.behaviour = Behaviour()

    assert sending.end() == DELIVERED
    assert_everything_once(collector, spool)
    assert spool.status.acked_rows == 40 * SLOTS


def test_a_collector_that_dies_and_comes_back_gets_every_row_once(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    sending = send(collector.address)
    for _ in range(3):
        spool.add(20)
        collector.wait_for(lambda source: source.up_to_seq > 0)
        collector.die()
        spool.add(20)
        collector.start()
    spool.finish()

    assert sending.end() == DELIVERED
    assert_everything_once(collector, spool)


def test_a_sender_that_was_killed_is_resumed_by_the_next(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    spool.add(30)
    send(collector.address).end(over=True)
    spool.add(30)
    (spool.folder / "acked").unlink(missing_ok=True)
    spool.finish()

    assert send(collector.address).end() == DELIVERED
    assert_everything_once(collector, spool)


def test_no_more_records_are_under_way_than_the_window_allows(spool: Spool) -> None:
    spool.add(9)
    delivery = Delivery(spool.folder, dropped_rows={})
    delivery.resume(0)
    delivery.set_window(3)

    first = [delivery.take() for _ in range(4)]
    delivery.acknowledge(2)
    second = [delivery.take() for _ in range(3)]

    assert [record and record.seq for record in first] == [1, 2, 3, None]
    assert [record and record.seq for record in second] == [4, 5, None]


def test_the_window_is_the_one_that_the_collector_says(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    collector.behaviour = Behaviour(window=1, commit_s=0.001)
    spool.add(20)
    spool.finish()

    assert send(collector.address).end() == DELIVERED
    assert_everything_once(collector, spool)


def test_who_has_more_to_send_says_so_and_waits_for_its_turn(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    collector.behaviour = Behaviour(turns=0)
    spool.add(9)
    spool.finish()
    sending = send(collector.address, timing=replace(QUICK, turn_s=10))
    sending.life.ended = True
    seen = []
    for turns in (2, 5, 10):
        heartbeats = collector.wait_for(lambda source: source.heartbeats > 0).heartbeats
        collector.wait_for(lambda source, after=heartbeats: source.heartbeats > after + 3)
        seen.append((collector.source.up_to_seq, sending.result))
        collector.behaviour = Behaviour(turns=turns)
        collector.wait_for(lambda source, turns=turns: source.up_to_seq == turns)

    assert sending.end() == DELIVERED
    assert seen == [(0, None), (2, None), (5, None)]
    assert_everything_once(collector, spool)
    assert collector.source.more == [True] * 10 + [False]
    assert collector.source.opens == 1


def test_a_collector_that_gives_no_turn_and_says_nothing_is_left(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    hung = FakeCollector(behaviour=Behaviour(turns=1))
    spool.add(5)
    try:
        send(hung.address, collector.address)
        collector.wait_for(lambda source: source.up_to_seq == 5)

        assert "no turn to send" in spool.status.problems["silent"]
        assert hung.source.up_to_seq == 1
    finally:
        hung.die()


def test_a_hung_collector_is_left_for_another_address(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    hung = FakeCollector(behaviour=Behaviour(hang=True))
    spool.add(5)
    try:
        sending = send(hung.address, collector.address)
        collector.wait_for(lambda source: len(source.rows) == 5 * SLOTS)

        assert "hangs" in spool.status.problems["silent"]
        assert sending.end() == DELIVERED
    finally:
        hung.die()


def test_a_collector_that_acknowledges_nothing_is_left(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    collector.behaviour = Behaviour(hang_after_open=True)
    spool.add(5)
    send(collector.address)

    status = spool.wait_for(lambda status: "silent" in status.problems)

    assert "no acknowledgement" in status.problems["silent"]
    assert status.acked_rows == 0


def test_an_absent_collector_is_a_sentence_and_then_no_problem(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    collector.die()
    spool.add(5)
    sending = send(collector.address)
    sentence = spool.wait_for(lambda status: bool(status.problems)).problems["unavailable"]
    collector.start()
    spool.finish()

    assert sending.end() == DELIVERED
    assert_everything_once(collector, spool)
    assert collector.address in sentence
    assert "fp8scope serve" in sentence
    assert str(spool.folder) in sentence


def test_an_unknown_host_is_named(spool: Spool, send: Callable[..., Sending]) -> None:
    spool.add(1)
    send("no-such-host.invalid:4327")

    sentence = spool.wait_for(lambda status: bool(status.problems), 30).problems["unknown_host"]

    assert "no-such-host.invalid:4327" in sentence


def test_a_wrong_token_is_one_problem_with_its_way_out(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    collector.behaviour = Behaviour(token="right")
    spool.add(5)
    spool.finish()
    wrong = send(collector.address, token="wrong")
    sentence = spool.wait_for(lambda status: bool(status.problems)).problems["unauthenticated"]
    wrong.end(over=True)

    assert wrong.result == LEFT_OVER
    assert "FP8SCOPE_TOKEN" in sentence
    assert "wrong" not in sentence.replace(str(spool.folder), "")
    assert send(collector.address, token="right").end() == DELIVERED
    assert_everything_once(collector, spool)


@pytest.mark.parametrize("bad", [1, 5, 12])
def test_a_refused_record_is_set_aside_and_the_others_arrive(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending], bad: int
) -> None:
    collector.behaviour = Behaviour(refuse=lambda batch: "rows has 3; expected 4" if batch.seq == bad else None)
    spool.add(12)
    spool.finish()

    result = send(collector.address).end()

    source = collector.source
    assert result == DELIVERED
    assert {step for step, _ in source.rows} == set(range(12)) - {bad - 1}
    assert source.duplicate_rows == 0
    assert source.finish is not None
    assert spool.status.dropped_rows == {"refused": SLOTS}
    assert "expected 4" in spool.status.problems["refused"]
    assert pb.ClientMessage.FromString((spool.folder / f"refused-{bad}.pb").read_bytes()).stats.seq == bad


def test_histograms_and_rows_are_delivered_in_one_sequence(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    collector.behaviour = Behaviour(drop_stream_after=7)
    sending = send(collector.address)
    for _ in range(20):
        spool.add()
        spool.add_histograms()
    spool.finish()

    assert sending.end() == DELIVERED
    source = collector.source
    assert sorted(source.rows) == sorted(source.histograms)
    assert len(source.rows) == 20 * SLOTS
    assert source.duplicate_rows == source.resent == 0
    assert source.histograms[9, 1][119:125].tolist() == [0, 10, 11, 12, 13, 0]
    assert spool.status.acked_rows == 20 * SLOTS
    assert list(spool.folder.glob("*.seg")) == list(spool.folder.glob("*.hist")) == []


def test_an_older_collector_gets_no_histograms_and_a_sentence_says_so(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    collector.behaviour = Behaviour(takes_histograms=False, drop_stream_after=3)
    for _ in range(4):
        spool.add()
        spool.add_histograms()
    sending = send(collector.address)
    spool.wait_for(lambda status: "not_taken" in status.problems)
    spool.finish()

    assert sending.end() == DELIVERED
    assert_everything_once(collector, spool)
    assert spool.status.dropped_rows == {"not_taken_histograms": 4 * SLOTS}
    assert "older than this agent" in spool.status.problems["not_taken"]


def test_what_the_collector_asks_for_is_laid_in_the_spool_once(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    first = pb.Request(id=7, layers=["*.fc"], take_histograms=pb.TakeHistograms(count=2))
    unknown = pb.Request(id=8)
    collector.behaviour = Behaviour(requests=[first, unknown, first])
    spool.add(3)
    spool.finish()

    assert send(collector.address).end() == DELIVERED
    assert read_requests(spool.folder) == [first, unknown]


def test_the_drops_of_the_sender_reach_the_collector(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    collector.behaviour = Behaviour(refuse=lambda batch: "no" if batch.seq == 2 else None)
    spool.add(4)
    send(collector.address)

    source = collector.wait_for(lambda source: "refused" in source.drops)

    assert source.drops == {"refused": SLOTS}


def test_a_record_over_a_limit_is_tried_again_before_it_is_set_aside(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8scope_agent.sender._LONGEST_BACK_OFF_S", 0.01)
    tries: list[int] = []

    def refuse(batch: pb.StatsBatch) -> str | None:
        tries.append(batch.seq)
        limited = (batch.seq == 2 and tries.count(2) < 4) or batch.seq == 3
        return "too many rows a second" if limited else None

    collector.behaviour = Behaviour(refuse=refuse, refuse_code=grpc.StatusCode.RESOURCE_EXHAUSTED)
    spool.add(4)
    spool.finish()

    assert send(collector.address).end() == DELIVERED
    assert {step for step, _ in collector.source.rows} == {0, 1, 3}
    assert spool.status.dropped_rows == {"refused": SLOTS}


def test_a_run_that_contradicts_what_is_stored_keeps_its_spool(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    collector.behaviour = Behaviour(refuse_open=(grpc.StatusCode.FAILED_PRECONDITION, "slot 3 is blocks.1.fc input"))
    spool.add(2)
    sending = send(collector.address)

    sentence = spool.wait_for(lambda status: bool(status.problems)).problems["failed_precondition"]

    assert sending.end(over=True) == LEFT_OVER
    assert "slot 3 is blocks.1.fc input" in sentence
    assert "another run name" in sentence
    assert waiting(spool.folder).records == 2


def test_a_draining_collector_hands_over_to_the_next(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    leaving = FakeCollector(behaviour=Behaviour(draining=True))
    leaving.sources = collector.sources  # one database behind both
    spool.add(30)
    spool.finish()
    try:
        assert send(leaving.address, collector.address).end() == DELIVERED
    finally:
        leaving.die()

    assert_everything_once(collector, spool)
    assert spool.status.problems == {}


def test_an_idle_sender_sends_heartbeats(spool: Spool, collector: FakeCollector, send: Callable[..., Sending]) -> None:
    send(collector.address)

    assert collector.wait_for(lambda source: source.heartbeats >= 3).rows == {}


def test_a_spool_has_one_sender(spool: Spool, collector: FakeCollector, send: Callable[..., Sending]) -> None:
    send(collector.address)
    spool.wait_for(lambda status: status.connected)

    with pytest.raises(SpoolLockedError, match="another sender"):
        deliver(spool.folder, addresses=(collector.address,), token=None, lifetime=Life())


def test_back_off_ends_when_the_writer_ends(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8scope_agent.sender._FIRST_BACK_OFF_S", 3600.0)
    monkeypatch.setattr("fp8scope_agent.sender._LONGEST_BACK_OFF_S", 3600.0)
    collector.die()
    spool.add(3)
    sending = send(collector.address)
    spool.wait_for(lambda status: bool(status.problems))
    collector.start()
    spool.finish()

    assert sending.end() == DELIVERED


def test_a_sender_without_a_writer_lives_for_its_linger_and_no_longer(tmp_path: Path) -> None:
    now = [0.0]
    life = WriterLifetime(tmp_path, parent=1, linger_s=30, clock=lambda: now[0])

    seen = []
    for now[0] in (0.0, 29.9, 30.1):
        seen.append(life.expired(0))

    assert life.writer_ended()
    assert seen == [False, False, True]


def test_damage_is_counted_and_the_rest_is_delivered(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    spool.add(3)
    (segment,) = spool.folder.glob("*.seg")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    spool.finish()

    assert send(collector.address).end() == DELIVERED
    assert {step for step, _ in collector.source.rows} == {0, 2}
    assert spool.status.dropped_rows == {"spool_damaged": SLOTS}


def test_the_position_on_disk_is_never_ahead_of_the_collector(
    spool: Spool, collector: FakeCollector, send: Callable[..., Sending]
) -> None:
    collector.behaviour = Behaviour(commit_s=0.002)
    spool.add(150)
    spool.finish()
    sending = send(collector.address)
    ahead = []
    while sending.result is None and len(ahead) < 5000:
        acked = read_acked(spool.folder).seq
        if acked:
            ahead.append(acked > collector.source.up_to_seq)
        sending.life.ended = True
        time.sleep(0.002)

    assert sending.end() == DELIVERED
    assert not any(ahead)


def test_the_sender_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, fp8scope_agent.sender; print([m for m in ('torch', 'numpy', 'fp8core') if m in sys.modules])"

    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert out.stdout.strip() == "[]"


def test_the_trainer_imports_no_grpc() -> None:
    code = "import sys, fp8scope_agent as f; f.attach; print([m for m in ('grpc',) if m in sys.modules])"

    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert out.stdout.strip() == "[]"
