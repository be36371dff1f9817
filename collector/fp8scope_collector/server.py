"""The collector as a process: a gRPC server for agents, an HTTP server for Prometheus, one writer behind both.

`serve` is the wiring and the order of starting and stopping. `TelemetryService` is one stream's life: open, read what
the queue has room for, acknowledge what is committed. Before a stream is refused for a malformed message everything
that it sent earlier is committed and acknowledged, so the first message without an acknowledgement is the bad one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fp8scope_collector.auth import Gate
from fp8scope_collector.config import ConfigError, ServeConfig
from fp8scope_collector.decode import (
    Catalogues,
    RefusedError,
    decode_drops,
    decode_finish,
    decode_histograms,
    decode_open,
    decode_stats,
)
from fp8scope_collector.diagnosis.companion import Companion
from fp8scope_collector.exposition import Guard, MetricsServer
from fp8scope_collector.ingest import Ingest
from fp8scope_collector.keeper import Keeper
from fp8scope_collector.limits import Limits
from fp8scope_collector.memory import forget_start, keep_one_heap, share_heap_with_arrow
from fp8scope_collector.messages import Batch, Opening, Sender, Source
from fp8scope_collector.metrics import Metrics
from fp8scope_collector.storage.engine import display_url, migrate, open_engine, open_stats
from fp8scope_collector.storage.registry import ContradictionError, TooManyRunsError
from fp8scope_collector.storage.tokens import Token, read_all
from fp8scope_collector.storage.writer import StatsWriter
from fp8scope_collector.tls import Certificate
from fp8scope_collector.turns import Lane
from fp8scope_protos.v1 import telemetry_pb2 as pb
from fp8scope_protos.v1 import telemetry_pb2_grpc as pb_grpc

STREAMS_END_S = 2.5  # from a signal until streams are cut
ALIVE_S = 0.5  # how often a stream that waits for the database hears that somebody is there
IN_LINE_S = 1.5  # and one that has nothing under way and waits for its turn: there may be hundreds
SWITCH_S = 0.0005  # for Python's 5 ms the writer waited for the interpreter after each array, while streams decoded
WRITER_ENDS_S = 1.0  # from then until what the database did not take is given up; agents send it again

VERSION = version("fp8scope-collector")
Context: TypeAlias = "grpc.aio.ServicerContext[pb.ClientMessage, pb.ServerMessage]"
log = structlog.get_logger()


async def serve(config: ServeConfig, announce: Callable[[str], None]) -> None:
    """Runs a collector until SIGTERM or SIGINT; `announce` gets one line when agents may come.

    Raises:
        StorageError: the database cannot be used.
        ConfigError: an address is taken, or the certificate cannot be used.
    """
    sys.setswitchinterval(SWITCH_S)
    keep_one_heap()
    share_heap_with_arrow()
    certificate = Certificate(config.tls) if config.tls else None
    with contextlib.ExitStack() as closing:
        engine = open_engine(config.db)
        closing.callback(engine.dispose)
        migrate(engine)
        store = open_stats(engine)
        closing.callback(store.close)
        store.migrate()
        store.offer()
        metrics = Metrics(VERSION)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        closing.callback(Keeper(engine, store, config.retention_s).close)
        ingest = Ingest(StatsWriter(engine, store), metrics, config.limits, store.pace)
        companion = None
        try:
            gate = _open_gate(config, ingest, closing)
            http = _listen_http(config, metrics, stop, gate, certificate)
            closing.callback(http.close)
            service = TelemetryService(
                ingest, metrics, config.limits, store.pace.window, gate if config.tokens else None
            )
            server, serving, port = await _listen_grpc(config, service, certificate)
            grpc_address = f"{str(config.grpc).rpartition(':')[0]}:{port}"
            scheme = "https" if config.guard_metrics else "http"
            http_address = f"{scheme}://{str(config.metrics).rpartition(':')[0]}:{http.port}"
            announce(
                f"fp8scope collector: grpc {grpc_address}, metrics {http_address}/metrics, "
                f"database {display_url(engine.url)}"
            )
            log.info("serving", tls=certificate is not None, tokens=config.tokens, diagnosis=bool(config.diagnosis))
            if config.diagnosis:
                companion = Companion(config.diagnosis)
            forget_start()
            await stop.wait()
            log.info("draining", streams=service.open_streams)
            if companion:
                companion.end()
            await serving.enter_graceful_shutdown()
            service.drain()
            await server.stop(grace=STREAMS_END_S)
        finally:
            if companion:
                await companion.close()
            if not await ingest.close(WRITER_ENDS_S):
                log.warning("the database did not take everything; agents will send it again")


def _open_gate(config: ServeConfig, ingest: Ingest, closing: contextlib.ExitStack) -> Gate | None:
    """What checks tokens, where somebody has to show one; it reads them on a connection that cannot write."""
    if not config.tokens and not config.guard_metrics:
        return None
    engine = open_engine(config.db, read_only=True)
    closing.callback(engine.dispose)
    gate = Gate(lambda: read_all(engine), ingest.token_used)
    closing.callback(gate.close)
    return gate


def _listen_http(
    config: ServeConfig, metrics: Metrics, stop: asyncio.Event, gate: Gate | None, certificate: Certificate | None
) -> MetricsServer:
    def unready() -> str:
        if stop.is_set():
            return "draining"
        return "" if metrics.database_up else "the database does not take what is written"

    guard = None
    if config.guard_metrics:
        assert gate
        assert certificate
        guard = Guard(certificate.http_context, gate.check_reader)
    try:
        return MetricsServer(config.metrics.host, config.metrics.port, metrics, unready, guard)
    except OSError as error:
        raise ConfigError(f"cannot listen on --metrics {config.metrics}: {error.strerror or error}") from None


async def _listen_grpc(
    config: ServeConfig, service: TelemetryService, certificate: Certificate | None
) -> tuple[grpc.aio.Server, health.aio.HealthServicer, int]:
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", config.limits.message_bytes),
            ("grpc.so_reuseport", 0),  # two collectors on one port would share its agents unnoticed
            ("grpc.keepalive_time_ms", 30_000),  # a host that vanished ends its streams within a minute
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),  # what agents may ping
            ("grpc.keepalive_permit_without_calls", 1),
        ]
    )
    pb_grpc.add_TelemetryServicer_to_server(service, server)  # type: ignore[no-untyped-call]  # generated
    serving = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(serving, server)
    try:
        if certificate:
            port = server.add_secure_port(str(config.grpc), certificate.grpc_credentials())
        else:
            port = server.add_insecure_port(str(config.grpc))
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on --grpc {config.grpc}: the address is taken or not of this machine"
        ) from None
    await server.start()
    for name in ("", pb.DESCRIPTOR.services_by_name["Telemetry"].full_name):
        await serving.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server, serving, port


class TelemetryService(pb_grpc.TelemetryServicer):
    """Streams of agents. With a `gate` each has to show a token that may send its run."""

    def __init__(self, ingest: Ingest, metrics: Metrics, limits: Limits, window: int, gate: Gate | None) -> None:
        self._ingest = ingest
        self._metrics = metrics
        self._limits = limits
        self._window = window
        self._gate = gate
        self._catalogues = Catalogues()
        self._lanes: set[Lane] = set()
        self._draining = False

    @property
    def open_streams(self) -> int:
        """Streams that have a source."""
        return len(self._lanes)

    def drain(self) -> None:
        """Stops reading from all streams; each ends when what it is owed is acknowledged."""
        self._draining = True
        for lane in self._lanes:
            lane.changed.set()

    async def Stream(self, request_iterator: object, context: Context) -> None:  # noqa: N802  # the RPC's name
        """One source's stream, until the client ends it or the collector drains."""
        self._metrics.observe_streams(+1)
        try:
            if self._metrics.open_streams > self._limits.streams:
                raise RefusedError(
                    f"the collector has {self._limits.streams} streams open, the most that it takes; try again later",
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                )
            token = await self._gate.identify(_authorization(context)) if self._gate else None
            with self._gate.count(token) if self._gate and token else contextlib.nullcontext():
                if opened := await self._open(context, token):
                    await self._converse(context, *opened, token)
        except RefusedError as refused:
            log.warning("refused", peer=context.peer(), code=refused.code.name, reason=str(refused))
            await context.abort(refused.code, str(refused))
        finally:
            self._metrics.observe_streams(-1)

    async def _open(self, context: Context, token: Token | None) -> tuple[Source, bool] | None:
        """Reads `Open` and registers the source, if `token` may send it: that, and whether the client has more to send.

        None where the client leaves before.
        """
        if (first := await self._read_open(context)) is None:
            return None
        opening, more = first
        sender = Sender(f"peer {context.peer()}")
        if self._gate and token:
            self._gate.admit(token, opening)
            sender = Sender(f"token {token.name}", token.id, token.max_runs)
        try:
            return await self._ingest.register(dataclasses.replace(opening, sender=sender)), more
        except ContradictionError as error:
            raise RefusedError(str(error), grpc.StatusCode.FAILED_PRECONDITION) from None
        except TooManyRunsError as error:
            raise RefusedError(str(error), grpc.StatusCode.RESOURCE_EXHAUSTED) from None

    async def _read_open(self, context: Context) -> tuple[Opening, bool] | None:
        """The first message, checked, and its `more`. Of what came nothing stays: hundreds wait to be registered."""
        try:
            async with asyncio.timeout(self._limits.open_s):
                message = await _next(context)
        except TimeoutError:
            raise RefusedError(
                f"nothing came for {self._limits.open_s:g} s; expected open as the first message",
                grpc.StatusCode.DEADLINE_EXCEEDED,
            ) from None
        if message is None:
            return None
        if message.WhichOneof("body") != "open":
            raise RefusedError(f"the first message is {message.WhichOneof('body')}; expected open")
        return decode_open(message.open, self._limits, self._catalogues), message.more

    async def _converse(self, context: Context, source: Source, more: bool, token: Token | None) -> None:
        """Reads in a task of its own; here acknowledgements leave as commits come in."""
        opened = pb.Opened(
            incarnation=source.incarnation,
            up_to_seq=source.up_to_seq,
            server_version=VERSION,
            takes_histograms=True,
        )
        await context.write(pb.ServerMessage(opened=opened, window=self._window, turns=0))
        lane = Lane(source)
        self._lanes.add(lane)
        self._ingest.turns.join(lane, len(source.run_slot), more=more)
        whose = {"token": token.name} if token else {}
        log.info(
            "opened",
            run=source.run,
            rank=source.rank,
            incarnation=source.incarnation,
            up_to_seq=source.up_to_seq,
            **whose,
        )
        reading = asyncio.create_task(self._read(context, lane, token))
        reading.add_done_callback(lambda _: lane.changed.set())
        try:
            with self._gate.watch(token, lane) if self._gate and token else contextlib.nullcontext():
                await self._acknowledge(context, lane, reading)
        finally:
            self._lanes.discard(lane)
            self._ingest.turns.leave(lane)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, RefusedError):
                await reading
            log.info("closed", run=source.run, rank=source.rank, up_to_seq=lane.up_to_seq)

    async def _acknowledge(self, context: Context, lane: Lane, reading: asyncio.Task[None]) -> None:
        acknowledged, turns = lane.source.up_to_seq, 0
        told, said_s = False, time.monotonic()
        while True:
            if self._draining and not told:
                reading.cancel()
                await context.write(pb.ServerMessage(draining=True))
                told = True
            if lane.up_to_seq > acknowledged or lane.turns > turns:
                acknowledged, turns = lane.up_to_seq, lane.turns
                await context.write(pb.ServerMessage(ack=pb.Ack(up_to_seq=acknowledged), turns=turns))
                said_s = time.monotonic()
            if lane.failure:
                raise lane.failure
            if reading.done() and not lane.owed and lane.up_to_seq == acknowledged:
                break
            try:
                async with asyncio.timeout(ALIVE_S):
                    await lane.changed.wait()
            except TimeoutError:
                # the database is slow, or many streams are before it: the agent need not look for another collector
                in_line = self._ingest.turns.waits(lane) and time.monotonic() - said_s >= IN_LINE_S
                if in_line or lane.owed or lane.waits:
                    await context.write(pb.ServerMessage(ack=pb.Ack(up_to_seq=acknowledged)))
                    said_s = time.monotonic()
            lane.changed.clear()
        if not reading.cancelled():
            reading.result()  # raises what was wrong with the last message

    async def _read(self, context: Context, lane: Lane, token: Token | None) -> None:
        """Queues what the client sends, until it is done. Waits, not reading, while the queue is full or its token's
        rows are used up.
        """
        last_seq, finished = 0, lane.source.finished
        while (message := await _next(context)) is not None:
            if lane.failure:  # also where the client takes no acknowledgements, and `_acknowledge` cannot end
                return
            kind = message.WhichOneof("body")
            if kind == "heartbeat":
                self._ingest.sign_of_life(lane.source, decode_drops(message.heartbeat.drops, self._limits))
                continue
            wire_bytes = message.ByteSize()
            try:
                batch = self._decode(message, kind, lane.source)
                if batch.seq <= last_seq:
                    raise RefusedError(f"seq {batch.seq}: came after seq {last_seq}; expected a greater number")
                if finished and batch.seq > lane.up_to_seq:
                    raise RefusedError(
                        f"seq {batch.seq}: the source has finished; expected no more of it",
                        grpc.StatusCode.FAILED_PRECONDITION,
                    )
            except RefusedError:
                self._metrics.observe_batch("refused", wire_bytes=wire_bytes)
                raise
            last_seq, finished = batch.seq, finished or batch.ending is not None
            lane.waits = True
            if self._gate and token and await self._gate.pace(token, batch.rows):
                self._metrics.observe_throttled()
            await self._ingest.put(batch, wire_bytes, lane, more=message.more)
            lane.waits = False
            del message, batch  # they would lie here until the next comes: of each stream

    def _decode(self, message: pb.ClientMessage, kind: str | None, source: Source) -> Batch:
        if kind == "stats":
            return decode_stats(message.stats, source, self._limits)
        if kind == "histograms":
            return decode_histograms(message.histograms, source, self._limits)
        if kind == "finish":
            return decode_finish(message.finish, source, self._limits)
        if kind == "open":
            raise RefusedError("open came a second time; expected stats, histograms, finish or heartbeat")
        raise RefusedError("the message is empty; expected stats, histograms, finish or heartbeat")


def _authorization(context: Context) -> list[str]:
    """The values that the client sent as `authorization`."""
    return [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]


async def _next(context: Context) -> pb.ClientMessage | None:
    """The client's next message, or None when it sends no more.

    Raises:
        RefusedError: what came is no message.
    """
    try:
        message: object = await context.read()
    except DecodeError as error:
        raise RefusedError(f"what came is not a serialised ClientMessage: {error}") from None
    return message if isinstance(message, pb.ClientMessage) else None
