"""A collector with real behaviour, kept in memory: one gRPC server, commits before it acknowledges.

It stores what a collector would store, keyed as a database would key it, so that a row that came twice or never shows.
It can be told to hang, to be slow, to refuse, to drain and to die.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field

import grpc
import numpy as np
import zstandard

from fp8core.records import FIELDS
from fp8scope_protos.v1 import telemetry_pb2 as pb
from fp8scope_protos.v1 import telemetry_pb2_grpc

_DTYPES = {"float32": "<f4", "float64": "<f8", "uint64": "<u8"}


@dataclass
class Source:
    """What is stored of one source."""

    open: pb.Open
    up_to_seq: int = 0
    rows: dict[tuple[int, int], dict[str, float]] = field(default_factory=dict)  # by (step, slot)
    duplicate_rows: int = 0
    scalars: dict[tuple[str, int], float] = field(default_factory=dict)  # by (name, step)
    extras: dict[tuple[str, int, int], float] = field(default_factory=dict)  # by (name, step, slot)
    histograms: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # by (step, slot), 256 counts
    drops: dict[str, int] = field(default_factory=dict)
    finish: pb.Finish | None = None
    opens: int = 0
    heartbeats: int = 0
    more: list[bool] = field(default_factory=list)  # what Open and each durable message said of the next
    resent: int = 0


@dataclass
class Behaviour:
    """How the server behaves from now on."""

    token: str | None = None
    hang: bool = False  # reads nothing, answers nothing
    hang_after_open: bool = False  # accepts Open, acknowledges nothing
    commit_s: float = 0.0  # a slow database
    drop_stream_after: int | None = None  # ends the stream after so many commits, before the acknowledgement
    refuse: Callable[[pb.StatsBatch], str | None] = lambda batch: None  # why a batch is malformed
    refuse_code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
    refuse_open: tuple[grpc.StatusCode, str] | None = None
    draining: bool = False
    takes_histograms: bool = True
    requests: Sequence[pb.Request] = ()  # come with every acknowledgement
    window: int = 8
    turns: int | None = None  # durable messages that a stream may send, said again when there are more; None: any


class FakeCollector(telemetry_pb2_grpc.TelemetryServicer):
    def __init__(self, port: int = 0, *, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.sources: dict[str, Source] = {}
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._port = port
        self._server: grpc.Server | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def source(self) -> Source:
        (only,) = self.sources.values()
        return only

    def start(self) -> None:
        self._released.clear()
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        telemetry_pb2_grpc.add_TelemetryServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self._server.start()

    def die(self) -> None:
        """Go away at once, streams and all; what is committed stays, as in a database."""
        self._released.set()
        if self._server is not None:
            self._server.stop(grace=None).wait(5)
        self._server = None

    def wait_for(self, condition: Callable[[Source], bool], timeout_s: float = 20.0) -> Source:
        """Wait until the only source satisfies `condition`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self._lock:
                if len(self.sources) == 1 and condition(self.source):
                    return self.source
            time.sleep(0.01)
        raise AssertionError(f"it did not come within {timeout_s} s; stored: {self.sources}")

    def Stream(  # noqa: N802
        self, request_iterator: Iterator[pb.ClientMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerMessage]:
        behaviour = self.behaviour
        if behaviour.hang:
            self._released.wait(30)
            return
        if behaviour.token is not None:
            metadata = dict(context.invocation_metadata())
            if metadata.get("authorization") != f"Bearer {behaviour.token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is unknown")
        opening = next(request_iterator)
        first = opening.open
        if behaviour.refuse_open is not None:
            context.abort(*behaviour.refuse_open)
        with self._lock:
            source = self.sources.setdefault(first.source_uuid, Source(first))
            source.opens += 1
            source.more.append(opening.more)
            opened = pb.Opened(
                incarnation=first.incarnation,
                up_to_seq=source.up_to_seq,
                takes_histograms=behaviour.takes_histograms,
            )
        turns = behaviour.turns
        yield pb.ServerMessage(opened=opened, window=behaviour.window, turns=turns)
        commits = 0
        for message in request_iterator:
            if self.behaviour.hang_after_open:
                self._released.wait(30)
                return
            body = message.WhichOneof("body")
            if body == "heartbeat":
                with self._lock:
                    source.heartbeats += 1
                    source.drops.update({drop.reason: drop.rows for drop in message.heartbeat.drops})
                if self.behaviour.turns != turns:
                    turns = self.behaviour.turns
                    yield pb.ServerMessage(turns=turns)
                continue
            if body == "stats":
                why = self.behaviour.refuse(message.stats)
                if why is not None:
                    context.abort(self.behaviour.refuse_code, why)
            time.sleep(self.behaviour.commit_s)
            with self._lock:
                source.more.append(message.more)
                self._commit(source, message)
            commits += 1
            if commits == self.behaviour.drop_stream_after:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
            yield pb.ServerMessage(
                ack=pb.Ack(up_to_seq=source.up_to_seq),
                draining=self.behaviour.draining,
                requests=self.behaviour.requests,
            )
            if self.behaviour.draining:
                return

    def _commit(self, source: Source, message: pb.ClientMessage) -> None:
        body = message.WhichOneof("body")
        assert body in ("stats", "histograms", "finish"), body
        seq = getattr(message, body).seq
        if seq <= source.up_to_seq:
            source.resent += 1
            return
        source.up_to_seq = seq
        if body == "finish":
            assert source.finish is None
            source.finish = message.finish
            source.drops.update({drop.reason: drop.rows for drop in message.finish.drops})
            return
        if body == "histograms":
            assert self.behaviour.takes_histograms
            source.drops.update({drop.reason: drop.rows for drop in message.histograms.drops})
            for key, counts in decode_histograms(message.histograms).items():
                assert key not in source.histograms
                source.histograms[key] = counts
            return
        batch = message.stats
        source.drops.update({drop.reason: drop.rows for drop in batch.drops})
        for scalar in batch.scalars:
            assert (scalar.name, scalar.step) not in source.scalars
            source.scalars[scalar.name, scalar.step] = scalar.value
        for extra in batch.extras:
            assert (extra.name, extra.step, extra.slot) not in source.extras
            source.extras[extra.name, extra.step, extra.slot] = extra.value
        columns = decode_columns(batch)
        for index in range(batch.rows):
            key = int(columns["step"][index]), int(columns["slot"][index])
            source.duplicate_rows += key in source.rows
            source.rows[key] = {name: columns[name][index] for name in columns if name not in ("step", "slot")}


def decode_columns(batch: pb.StatsBatch) -> dict[str, np.ndarray]:
    """The columns of a batch, checked as a collector would."""
    message = pb.StatsColumns.FromString(decompress(batch))
    columns = {"step": np.frombuffer(message.step, "<u8"), "slot": np.frombuffer(message.slot, "<u4")}
    for entry in FIELDS:
        if data := getattr(message, entry.name):  # else the column is absent
            columns[entry.name] = np.frombuffer(data, _DTYPES[entry.dtype])
    assert {len(column) for column in columns.values()} == {batch.rows}
    return columns


def decode_histograms(batch: pb.HistogramBatch) -> dict[tuple[int, int], np.ndarray]:
    """The histograms of a batch by (step, slot), 256 counts each, checked as a collector would."""
    message = pb.HistogramColumns.FromString(decompress(batch))
    step, slot = np.frombuffer(message.step, "<u8"), np.frombuffer(message.slot, "<u4")
    first, bins = np.frombuffer(message.first_bin, "u1"), np.frombuffer(message.bins, "<u2").astype(int)
    counts = np.frombuffer(message.counts, "<u8")
    assert {len(step), len(slot), len(first), len(bins)} == {batch.rows}
    assert len(counts) == bins.sum()
    ends = bins.cumsum()
    full = np.zeros((batch.rows, 256), np.uint64)
    for index in range(batch.rows):
        assert first[index] + bins[index] <= 256
        trimmed = counts[ends[index] - bins[index] : ends[index]]
        assert not len(trimmed) or (trimmed[0] and trimmed[-1])
        full[index, first[index] : first[index] + bins[index]] = trimmed
    return {(int(step[index]), int(slot[index])): full[index] for index in range(batch.rows)}


def decompress(batch: pb.StatsBatch | pb.HistogramBatch) -> bytes:
    """The serialised columns of a batch."""
    data = batch.columns
    if batch.compression == pb.COMPRESSION_ZSTD:
        data = zstandard.ZstdDecompressor().decompress(data, max_output_size=batch.columns_bytes)
    else:
        assert batch.compression == pb.COMPRESSION_NONE
    assert len(data) == batch.columns_bytes
    assert zlib.crc32(data) == batch.columns_crc32
    return data
