"""A collector to talk to, on each database, and an agent's half of the conversation."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sqlalchemy as sa
import structlog
import zstandard
from prometheus_client.parser import text_string_to_metric_families

from fp8core.records import FIELDS
from fp8scope_collector.cli import main
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.reader import Reader
from fp8scope_protos.v1 import telemetry_pb2 as pb
from fp8scope_protos.v1 import telemetry_pb2_grpc as pb_grpc
from random_runs import NOW

READY = re.compile(r"grpc (\S+), metrics (https?://\S+)/metrics, database (.+)")
ROLES = (pb.ROLE_INPUT, pb.ROLE_WEIGHT, pb.ROLE_GRAD_OUTPUT)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database of this test's own: an empty file to be, or an empty PostgreSQL database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    """That database with its tables."""
    engine = open_engine(database_url)
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def reader(engine: sa.Engine) -> Iterator[Reader]:
    """Reads from it, at the moment `NOW`."""
    reader = Reader(engine.url.render_as_string(hide_password=False), clock=lambda: NOW)
    yield reader
    reader.close()


class Wire:
    """Builds the messages that an agent would send."""

    @staticmethod
    def open(
        run: str = "run",
        *,
        slots: int | list[pb.Slot] = 6,
        rank: int = 0,
        source_uuid: str | None = None,
        incarnation: int = 1,
        **fields: Any,
    ) -> pb.Open:
        """An opening of one rank; slot i is role i % 3 of layer i // 3."""
        catalogue = (
            slots
            if isinstance(slots, list)
            else [
                pb.Slot(
                    slot=i,
                    layer=f"blocks.{i // 3}.fc",
                    role=ROLES[i % 3],
                    format="E5M2" if i % 3 == 2 else "E4M3FN",
                    recipe="AmaxScaling()",
                    module_class="Fp8Linear",
                    in_features=16,
                    out_features=32,
                )
                for i in range(slots)
            ]
        )
        return pb.Open(
            **{
                "run": run,
                "rank": rank,
                "world_size": 8,
                "incarnation": incarnation,
                "source_uuid": str(uuid.uuid4()) if source_uuid is None else source_uuid,
                "started_unix_ns": 1,
                "sent_unix_ns": time.time_ns(),
                "agent_version": "0.1.0",
                "slots": catalogue,
                **fields,
            }
        )

    @staticmethod
    def columns(step: int, *, slots: int = 6, steps: int = 1) -> dict[str, np.ndarray]:
        """Columns of `steps` steps from `step` on: every value follows from its step, slot and field."""
        step_column = np.repeat(np.arange(step, step + steps, dtype=np.uint64), slots)
        slot_column = np.tile(np.arange(slots, dtype=np.uint32), steps)
        key = step_column * 64 + slot_column
        columns = {"step": step_column, "slot": slot_column}
        for index, field in enumerate(FIELDS):
            columns[field.name] = (key + index).astype(field.dtype)
        return columns

    @staticmethod
    def stats(seq: int, values: dict[str, np.ndarray], /, *, zstd: bool = True, **fields: Any) -> pb.StatsBatch:
        """A batch of the columns `values`; `fields` replace what would be sent."""
        packed = pb.StatsColumns(**{name: column.tobytes() for name, column in values.items()}).SerializeToString()
        return pb.StatsBatch(
            **{
                "seq": seq,
                "sent_unix_ns": time.time_ns(),
                "rows": len(values["step"]) if values else 0,
                "compression": pb.COMPRESSION_ZSTD if zstd else pb.COMPRESSION_NONE,
                "columns_bytes": len(packed),
                "columns_crc32": zlib.crc32(packed),
                "columns": zstandard.compress(packed, 1) if zstd else packed,
                **fields,
            }
        )

    @staticmethod
    def histograms(seq: int, rows: list[tuple[int, int, int, list[int]]], /, **fields: Any) -> pb.HistogramBatch:
        """A batch of histograms, each (step, slot, first bin, counts); `fields` replace what would be sent."""
        step, slot, first_bin, counts = zip(*rows, strict=True)
        columns = {
            "step": np.array(step, "<u8"),
            "slot": np.array(slot, "<u4"),
            "first_bin": np.array(first_bin, "u1"),
            "bins": np.array([len(own) for own in counts], "<u2"),
            "counts": np.array([count for own in counts for count in own], "<u8"),
        }
        packed = pb.HistogramColumns(**{name: c.tobytes() for name, c in columns.items()}).SerializeToString()
        return pb.HistogramBatch(
            **{
                "seq": seq,
                "sent_unix_ns": time.time_ns(),
                "rows": len(rows),
                "compression": pb.COMPRESSION_ZSTD,
                "columns_bytes": len(packed),
                "columns_crc32": zlib.crc32(packed),
                "columns": zstandard.compress(packed, 1),
                **fields,
            }
        )

    @staticmethod
    def finish(seq: int, outcome: int = pb.OUTCOME_FINISHED, **fields: Any) -> pb.Finish:
        """The end of a source."""
        return pb.Finish(seq=seq, finished_unix_ns=time.time_ns(), outcome=outcome, **fields)


@pytest.fixture(scope="session")
def wire() -> type[Wire]:
    """Builders of messages."""
    return Wire


class Stream:
    """An agent's half of a stream, call by call."""

    def __init__(
        self,
        address: str,
        opening: pb.Open | None,
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = 60,
    ) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        metadata = [("authorization", f"Bearer {token}")] if token else []
        self._outgoing: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
        self.call = pb_grpc.TelemetryStub(self._channel).Stream(
            iter(self._outgoing.get, None), timeout=timeout_s, metadata=metadata
        )
        self.up_to_seq = 0
        self.draining = False
        if opening is not None:
            self.send(open=opening)
            self.opened = self.receive().opened
            self.up_to_seq = self.opened.up_to_seq

    def send(self, **body: Any) -> None:
        """Sends `ClientMessage(**body)`."""
        self._outgoing.put(pb.ClientMessage(**body))

    def receive(self) -> pb.ServerMessage:
        """The next message; raises grpc.RpcError where the stream was refused, StopIteration where it ended."""
        message = next(self.call)
        self.up_to_seq = max(self.up_to_seq, message.ack.up_to_seq)
        self.draining = self.draining or message.draining
        return message

    def wait_ack(self, seq: int) -> None:
        """Returns when everything up to `seq` is acknowledged."""
        while self.up_to_seq < seq:
            self.receive()

    def refusal(self) -> tuple[grpc.StatusCode, str]:
        """Reads on until the server refuses; its status and sentence."""
        try:
            while True:
                self.receive()
        except StopIteration:
            return grpc.StatusCode.OK, ""
        except grpc.RpcError as error:
            return error.code(), error.details()

    def finish_sending(self) -> None:
        """Closes this half and reads to the end."""
        self._outgoing.put(None)
        for message in self.call:
            self.up_to_seq = max(self.up_to_seq, message.ack.up_to_seq)

    def close(self) -> None:
        """Hangs up."""
        self._outgoing.put(None)
        self.call.cancel()
        self._channel.close()


@pytest.fixture
def connect() -> Iterator[Callable[[str, pb.Open | None], Stream]]:
    """A function: a stream to an address, opened with the given message (None: nothing is sent yet)."""
    with contextlib.ExitStack() as stack:

        def open_stream(address: str, opening: pb.Open | None, **access: Any) -> Stream:
            stream = Stream(address, opening, **access)
            stack.callback(stream.close)
            return stream

        yield open_stream


@dataclass
class Collector:
    """A running `fp8scope serve`."""

    process: subprocess.Popen[str]
    grpc: str
    http: str
    log: Path

    def metrics(self) -> dict[tuple[str, ...], float]:
        """The samples of /metrics by (name, label=value ...)."""
        with urllib.request.urlopen(f"{self.http}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {
            (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def health(self) -> tuple[int, str]:
        """Status and text of /healthz."""
        try:
            with urllib.request.urlopen(f"{self.http}/healthz", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def terminate(self, timeout_s: float = 10) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def events(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def _start(
    url: str,
    log: Path,
    *arguments: object,
    program: Sequence[str] = ("-m", "fp8scope_collector"),
    inside: Sequence[str] = (),
) -> Collector:
    with log.open("a") as errors:
        process = subprocess.Popen(
            [
                *(*inside, sys.executable, *program, "serve", "--db", url),
                *("--grpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0", *map(str, arguments)),
            ],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout
    line = process.stdout.readline()
    found = READY.search(line)
    assert found, f"not ready: {line!r} {log.read_text()}"
    return Collector(process, found[1], found[2], log)


@pytest.fixture
def start_collector(tmp_path: Path) -> Iterator[Callable[..., Collector]]:
    """A function: a collector on the database `url`, ended with the test; `inside` goes before its command."""
    started: list[Collector] = []

    def start(url: str, *arguments: object, **how: Any) -> Collector:
        started.append(_start(url, tmp_path / f"collector-{len(started)}.log", *arguments, **how))
        return started[-1]

    yield start
    for collector in started:
        if collector.process.poll() is None:
            collector.process.kill()
            collector.process.wait()
        assert collector.process.stdout
        collector.process.stdout.close()


@pytest.fixture(scope="module")
def shared_collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Collector, sa.Engine]]:
    """One collector on SQLite for all tests of a file that need no other, and its database; each test has own runs."""
    folder = tmp_path_factory.mktemp("shared")
    collector = _start(f"sqlite:///{folder}/test.db", folder / "log")
    engine = open_engine(f"sqlite:///{folder}/test.db", read_only=True)
    yield collector, engine
    engine.dispose()
    collector.process.kill()
    collector.process.wait()
    assert collector.process.stdout
    collector.process.stdout.close()


@dataclass
class Said:
    """What a command printed."""

    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., Said]:
    """A function: runs the command in this process; its exit code is 0, or 1 if it `fails`."""

    def call(*arguments: str, fails: bool = False) -> Said:
        monkeypatch.setattr(sys, "argv", ["fp8scope", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        structlog.reset_defaults()
        out, err = capfdbinary.readouterr()
        assert ended.value.code == (1 if fails else 0), err
        return Said(out.decode(), err.decode())

    return call
