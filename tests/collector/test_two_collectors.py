"""Two collectors on one PostgreSQL, agents that know both: one is killed, or cut off, and every row is there once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fp8scope_agent.segments import FINISH, STATS, Record
from fp8scope_agent.spool import SOURCE_FILE, SpoolWriter
from fp8scope_collector.storage.engine import open_engine
from fp8scope_protos.v1 import telemetry_pb2 as pb
from lossy_link import LossyLink, namespaces, unavailable

RANKS = 3
SLOTS = 12
STEPS_A_SECOND = 10


class Training(threading.Thread):
    """Ranks that record ten steps a second into their spools; a real sender for each brings it to the collectors."""

    def __init__(self, folder: Path, wire: Any, addresses: str, inside: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self.steps = 0
        self._ended = threading.Event()
        self._wire = wire
        self._writers = []
        self.senders = []
        for rank in range(RANKS):
            own = folder / f"rank-{rank}"
            own.mkdir()
            (own / SOURCE_FILE).write_bytes(wire.open(rank=rank, slots=SLOTS).SerializeToString())
            self._writers.append(SpoolWriter(own, max_bytes=1 << 30))
            self.senders.append(self._send(own, addresses, inside))

    def _send(self, spool: Path, addresses: str, inside: Sequence[str]) -> subprocess.Popen[str]:
        module = [sys.executable, "-m", "fp8scope_agent.sender", str(spool)]
        options = ["--collector", addresses, "--parent", str(os.getpid()), "--linger-s", "60"]
        return subprocess.Popen(
            [*inside, *module, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self) -> None:
        while not self._ended.wait(1 / STEPS_A_SECOND):
            self.steps += 1
            stats = self._wire.stats(self.steps, self._wire.columns(self.steps, slots=SLOTS))
            payload = pb.ClientMessage(stats=stats).SerializeToString()
            for writer in self._writers:
                writer.append(Record(self.steps, STATS, SLOTS, payload))
        ending = pb.ClientMessage(finish=self._wire.finish(self.steps + 1)).SerializeToString()
        for writer in self._writers:
            writer.append(Record(self.steps + 1, FINISH, 0, ending))
            writer.close()

    def finish(self) -> None:
        """Ends the training and waits until the senders have delivered everything."""
        self._ended.set()
        self.join()
        for sender in self.senders:
            said = sender.communicate(timeout=90)[0]
            assert sender.returncode == 0, said

    def kill(self) -> None:
        self._ended.set()
        for sender in self.senders:
            if sender.poll() is None:
                sender.kill()
                sender.communicate()


class Watch(threading.Thread):
    """Looks at the database twenty times a second: for how long did a rank's rows not grow while it trained?"""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._engine = open_engine(url, read_only=True)
        self._ended = threading.Event()
        self._moved: dict[int, tuple[int, float]] = {}
        self.longest_gap_s = 0.0

    def run(self) -> None:
        with self._engine.connect() as connection:
            while not self._ended.wait(0.05):
                now = time.monotonic()
                for rank, seq in connection.execute(sa.text("SELECT rank, up_to_seq FROM source")):
                    before, since = self._moved.setdefault(rank, (seq, now))
                    if before:
                        self.longest_gap_s = max(self.longest_gap_s, now - since)
                    if seq > before:
                        self._moved[rank] = seq, now
                connection.rollback()

    def all_have(self, seq: int) -> bool:
        return len(self._moved) == RANKS and min(seq for seq, _ in self._moved.values()) >= seq

    def end(self) -> float:
        if not self._ended.is_set():
            self._ended.set()
            self.join()
            self._engine.dispose()
        return self.longest_gap_s


@pytest.fixture
def train(tmp_path: Path, wire: Any, postgres_url: str) -> Iterator[Callable[..., tuple[Training, Watch]]]:
    """A function: starts a training whose senders run `inside` and know `addresses`, and somebody who watches."""
    with contextlib.ExitStack() as stack:

        def start(*addresses: str, inside: Sequence[str] = ()) -> tuple[Training, Watch]:
            training = Training(tmp_path, wire, ",".join(addresses), inside)
            stack.callback(training.kill)
            training.start()
            watch = Watch(postgres_url)
            stack.callback(watch.end)
            watch.start()
            _until(lambda: watch.all_have(1))
            return training, watch

        yield start


def test_a_killed_collector_leaves_its_agents_to_the_other(
    start_collector: Callable[..., Any], train: Callable[..., Any], postgres_url: str
) -> None:
    one, other = start_collector(postgres_url), start_collector(postgres_url)
    training, watch = train(one.grpc, other.grpc)
    _until(lambda: one.metrics()[("fp8scope_open_streams",)] == RANKS)

    one.process.kill()
    killed_at = training.steps
    _until(lambda: watch.all_have(killed_at + 3 * STEPS_A_SECOND))

    gap_s = watch.end()
    training.finish()
    print(f"longest gap in the rows of a rank: {gap_s:.2f} s, collector killed")
    assert other.metrics()[("fp8scope_open_streams",)] == 0
    _all_rows_once(postgres_url, training.steps)


@pytest.mark.parametrize("partition_s", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_partition_on_a_bad_network_costs_seconds_and_no_row(
    start_collector: Callable[..., Any],
    train: Callable[..., Any],
    postgres_url: str,
    postgres_socket_url: Callable[[str], str],
    partition_s: int,
) -> None:
    """100 ms late each way, 5 % lost. The collector that is cut off keeps its database, and what was sent to it."""
    if why := unavailable():
        (pytest.fail if os.environ.get("FP8SCOPE_REQUIRE_ALL") == "1" else pytest.skip)(why)
    url = postgres_socket_url(postgres_url)
    with namespaces(3) as (trainer, here, there), contextlib.ExitStack() as stack:
        links = []
        addresses = []
        for number, namespace in enumerate([here, there], start=1):
            network = f"10.77.{number}"
            links.append(LossyLink(trainer, namespace, network, delay_s=0.1, loss=0.05, seed=number))
            stack.callback(links[-1].close)
            listen = ("--grpc", f"{network}.2:0", "--insecure")
            addresses.append(start_collector(url, *listen, inside=namespace.inside).grpc)
        training, watch = train(*addresses, inside=trainer.inside)
        _until(lambda: watch.all_have(STEPS_A_SECOND))

        cut_at, had = time.monotonic(), training.steps
        links[0].cut = True
        _until(lambda: watch.all_have(had + STEPS_A_SECOND))  # nobody waits for the partition to end
        time.sleep(max(0, cut_at + partition_s - time.monotonic()))
        links[0].cut = False
        healed_at = training.steps
        _until(lambda: watch.all_have(healed_at + STEPS_A_SECOND))

        gap_s = watch.end()
        training.finish()
        training.kill()
        print(f"longest gap in the rows of a rank: {gap_s:.2f} s, partition of {partition_s} s")
        assert links[1].carried > 100, "the other collector took over"
        assert all(link.lost / (link.lost + link.carried) > 0.02 for link in links)
    _all_rows_once(postgres_url, training.steps)


def _all_rows_once(url: str, steps: int) -> None:
    engine = open_engine(url, read_only=True)
    with engine.connect() as connection:
        sql = "SELECT count(*), count(DISTINCT (source_id, step, slot)), min(step), max(step) FROM stats"
        rows = RANKS * SLOTS * steps
        assert tuple(connection.execute(sa.text(sql)).one()) == (rows, rows, 1, steps)
        sql = "SELECT count(*), min(rows), max(rows), min(outcome) FROM source"
        assert tuple(connection.execute(sa.text(sql)).one()) == (RANKS, SLOTS * steps, SLOTS * steps, "finished")
    engine.dispose()


def _until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
