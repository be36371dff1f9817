"""How many rows a second a collector acknowledges: real gRPC, client processes, each database with full durability.

Each stream has a connection of its own and sends batches of one step of 560 layers (1,680 rows), compressed as agents
do: at most `window` of them unacknowledged, and each in its turn, as the collector says. Clients, server and database
share the machine's cores. Agents would be on other machines, so a client is one event loop for all its
streams, and streams of one kind send the same bytes, made once: 512 with threads cost more than the collector did.
Latency is from before a batch is handed to gRPC until its acknowledgement is read. A saturated stream also waits for
its turn, with nothing sent; how often one comes is what the rate leaves to each stream.

What is measured replaces its line in bench/results/ingest.json; ingest.md is made from that, and docs/scaling.md by
bench/scaling.py. One line takes its seconds and 15 to 30 more.

    python bench/ingest.py [--engines sqlite postgresql clickhouse] [--seconds 6] [--streams 1 8] [--peers]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import numpy as np
import zstandard

from engines import ENGINES, database
from fp8core.records import FIELDS
from fp8scope_agent.encode import ZSTD_LEVEL
from fp8scope_collector.storage.reader import Reader
from fp8scope_protos.v1 import telemetry_pb2 as pb
from ingest_peers import compared
from measured import machine

Meanwhile: TypeAlias = Callable[[str], contextlib.AbstractContextManager[object]]
ROWS = 1680
ROLES = (pb.ROLE_INPUT, pb.ROLE_WEIGHT, pb.ROLE_GRAD_OUTPUT)
WARM_UP_S = 3.0
CLIENTS = 2
KINDS = 4  # of streams, each with messages of its own: eight streams share none
KEPT = 128  # messages of a kind
METHOD = f"/{pb.DESCRIPTOR.services_by_name['Telemetry'].full_name}/Stream"
RESULTS = Path(__file__).parent / "results" / "ingest.json"
NAMES = {"sqlite": "SQLite (synchronous=FULL)", "postgresql": "PostgreSQL", "clickhouse": "ClickHouse (chDB)"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES, help="databases")
    arguments.add_argument("--seconds", type=float, default=6, help="measured time of each line")
    arguments.add_argument("--streams", type=int, nargs="*", default=[1, 8], help="agents; one line for each number")
    arguments.add_argument("--client", nargs=3, metavar=("ADDRESS", "FIRST", "RANKS"), help=argparse.SUPPRESS)
    arguments.add_argument("--peers", action="store_true", help="other tools too, in this run")
    options = arguments.parse_args()
    if options.client:
        address, first, ranks = options.client
        print(json.dumps(run_client(address, range(int(first), int(ranks), CLIENTS), options.seconds)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"lines": {}, "peers": []}
    fastest = 0.0
    for engine in options.engines:
        for streams in options.streams:
            line = measure(engine, streams, options.seconds)
            fastest = max(fastest, line["rows_per_s"])
            results["lines"][f"{engine} {streams}"] = line
            print(row_of(line))
    if options.peers or not results["peers"]:
        results["peers"] = compared(options.seconds, fastest)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
    """bench/results/ingest.md."""
    lines = sorted(results["lines"].values(), key=lambda line: (ENGINES.index(line["engine"]), line["streams"]))
    text = [
        "# Rows acknowledged by one collector",
        "",
        f"Batches of {ROWS:,} rows, {CLIENTS} client processes; clients, collector, database and a reader that asks",
        "the dashboard's questions once a second share the cores: `bench/ingest.py`.",
        "",
        "| database | streams | rows/s | first, last 10 s | send to acknowledgement, median | p99 "
        "| peak memory: collector, diagnosis | processor time a row: collector, clients "
        "| bytes a row on disk | measured |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(row_of, lines),
        "",
        "The same rows through other tools, beside the fastest of the last run (`bench/ingest_peers.py`):",
        "",
        *results["peers"],
    ]
    return "\n".join(text) + "\n"


def row_of(line: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"| {NAMES[line['engine']]} | {line['streams']} | {line['rows_per_s']:,.0f} "
        f"| {line.get('first_rows_per_s', 0):,.0f}, {line.get('last_rows_per_s', 0):,.0f} "
        f"| {line['median_ms']:,.0f} ms | {line['p99_ms']:,.0f} ms "
        f"| {line['peak_mib']:,.0f}, {line['diagnosis_mib']:,.0f} MiB "
        f"| {processor_of(line)} | {line['bytes_per_row']:.0f} "
        f"| {line['seconds']:g} s on {line['machine']}, {line['month']} |"
    )


def processor_of(line: dict[str, Any]) -> str:
    """What a row cost, of a line that says it."""
    if "collector_us_per_row" not in line:
        return ""
    return f"{line['collector_us_per_row']:.1f}, {line['clients_us_per_row']:.1f} µs"


def measure(engine: str, streams: int, seconds: float, meanwhile: Meanwhile | None = None) -> dict[str, Any]:
    """One line's numbers; `meanwhile` gets the database's URL and is left when the clients have ended."""
    with database(engine) as target:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "fp8scope_collector", "serve", "--db", target.url),
                *("--grpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert server.stdout
        try:
            found = re.search(r"grpc (\S+),", server.stdout.readline())
            assert found, "the collector did not start"
            clients = [
                subprocess.Popen(
                    [
                        *(sys.executable, __file__, "--seconds", str(seconds)),
                        *("--client", found[1], str(client), str(streams)),
                    ],
                    stdout=subprocess.PIPE,
                )
                for client in range(min(CLIENTS, streams))
            ]
            with (meanwhile or asking)(target.url), watching(server.pid) as used:
                results = [json.loads(client.communicate()[0]) for client in clients]
            peak = peak_mib(server.pid)
            beside = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
            diagnosis = sum(peak_mib(int(process)) for process in beside)
        finally:
            server.terminate()
            server.wait()
            server.stdout.close()
        rows = sum(result["rows"] for result in results)
        stored = sum(result["all_rows"] for result in results)
        latencies = np.concatenate([result["latencies_s"] for result in results])
        at = np.concatenate([result["acknowledged_s"] for result in results])
        edge = min(10.0, seconds / 2)
        noted_s, used_s = np.array(used).T
        of_server = [np.interp(result["measured_s"], noted_s, used_s) for result in results]
        return {
            "engine": engine,
            "streams": streams,
            "rows_per_s": round(rows / seconds),
            "first_rows_per_s": round(int((at < edge).sum()) * ROWS / edge),
            "last_rows_per_s": round(int((at >= seconds - edge).sum()) * ROWS / edge),
            "median_ms": round(float(np.median(latencies)) * 1e3, 1),
            "p99_ms": round(float(np.quantile(latencies, 0.99)) * 1e3, 1),
            "collector_us_per_row": round(1e6 * float(np.mean([end - start for start, end in of_server])) / rows, 2),
            "clients_us_per_row": round(1e6 * sum(result["processor_s"] for result in results) / rows, 2),
            "peak_mib": peak,
            "diagnosis_mib": diagnosis,
            "bytes_per_row": round(target.size_bytes() / stored, 1),
            "seconds": seconds,
            "machine": machine(),
            "month": f"{datetime.now():%B %Y}",
        }


def peak_mib(process: int) -> int:
    """The most memory that the process had resident."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found
    return round(int(found[1]) / 1024)


def run_client(address: str, ranks: range, seconds: float) -> dict[str, object]:
    """Sends over a stream for each rank until time is up; what was acknowledged within the measured time."""
    gc.disable()  # hundreds of channels are looked through at each full collection: seconds of a core, all told
    return asyncio.run(all_streams(address, ranks, seconds))


async def all_streams(address: str, ranks: range, seconds: float) -> dict[str, object]:
    """Every stream has a connection of its own, as agents have."""
    window, messages = Window(seconds, len(ranks)), Messages()
    done = await asyncio.gather(*(converse(address, window, messages, *each) for each in enumerate(ranks)))
    latencies, times, totals = zip(*done, strict=True)
    return {
        "rows": sum(map(len, latencies)) * ROWS,
        "all_rows": sum(totals) * ROWS,
        "latencies_s": [*itertools.chain(*latencies)],
        "acknowledged_s": [*itertools.chain(*times)],
        "measured_s": (window.start, window.end),  # CLOCK_MONOTONIC: the machine's
        "processor_s": window.processor_s,
    }


class Messages:
    """What the streams send, as bytes. Streams of one kind share them: other machines would have made theirs."""

    def __init__(self) -> None:
        self._columns = [first_columns(kind) for kind in range(KINDS)]
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        self._made: dict[tuple[int, int], bytes] = {}

    def of(self, stream: int, seq: int) -> bytes:
        """The stream's batch number `seq`."""
        key = (stream % KINDS, seq)
        if key not in self._made:
            stats = batch(seq, self._columns[key[0]], self._compressor)
            self._made[key] = pb.ClientMessage(stats=stats, more=True).SerializeToString()
            self._made.pop((key[0], seq - KEPT), None)
        return self._made[key]


class Window:
    """The measured time: it begins some seconds after all streams are open."""

    def __init__(self, seconds: float, streams: int) -> None:
        self._seconds = seconds
        self._closed = streams
        self.start = self.end = float("inf")
        self.processor_s = 0.0

    def opened(self) -> None:
        """One stream more is open."""
        self._closed -= 1
        if self._closed == 0:
            self.start = time.perf_counter() + WARM_UP_S
            self.end = self.start + self._seconds
            loop = asyncio.get_running_loop()
            loop.call_later(WARM_UP_S, self._account, -1)
            loop.call_later(WARM_UP_S + self._seconds, self._account, +1)

    def _account(self, sign: int) -> None:
        self.processor_s += sign * time.process_time()


async def converse(
    address: str, window: Window, messages: Messages, number: int, rank: int
) -> tuple[list[float], list[float], int]:
    """One agent: latencies of the batches acknowledged in the measured time, when that was, and how many in all."""
    latencies: list[float] = []
    times: list[float] = []
    sent_at: list[float] = []
    acknowledged = allowed = most_under_way = 0
    writing = True
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stream: Any = channel.stream_stream(METHOD, response_deserializer=pb.ServerMessage.FromString)()
        await stream.write(pb.ClientMessage(open=opening(rank), more=True).SerializeToString())
        while isinstance(message := await stream.read(), pb.ServerMessage):
            now = time.perf_counter()
            if message.window:
                most_under_way = message.window
                window.opened()
            while acknowledged < message.ack.up_to_seq:
                if window.start <= now < window.end:
                    latencies.append(now - sent_at[acknowledged])
                    times.append(now - window.start)
                acknowledged += 1
            allowed = max(allowed, message.turns)
            while now < window.end and len(sent_at) < min(allowed, acknowledged + most_under_way):
                sent_at.append(time.perf_counter())
                await stream.write(messages.of(number, len(sent_at)))
            if writing and now >= window.end:
                writing = False
                await stream.done_writing()
    return latencies, times, acknowledged


@contextlib.contextmanager
def watching(process: int) -> Iterator[list[tuple[float, float]]]:
    """When the process had used how many seconds of processor time, noted all the while."""
    ticks, stop = os.sysconf("SC_CLK_TCK"), threading.Event()
    used: list[tuple[float, float]] = []

    def watch() -> None:
        while not stop.wait(0.25):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            used.append((time.perf_counter(), (int(fields[11]) + int(fields[12])) / ticks))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield used
    finally:
        stop.set()
        watcher.join()


@contextlib.contextmanager
def asking(url: str) -> Iterator[None]:
    """The dashboard's questions once a second, meanwhile."""
    stop = threading.Event()

    def ask() -> None:
        reader = Reader(url)
        while not stop.wait(1):
            for run in reader.runs():
                reader.heatmap(run.id, "overflow")
                reader.top(run.id, last_steps=1000, limit=20)
                reader.series(run.id, 0, ["amax", "scale_exp2", "headroom"])

    with ThreadPoolExecutor(1) as asker:
        asked = asker.submit(ask)
        try:
            yield
        finally:
            stop.set()
        asked.result()  # without a reader the figures are none


def opening(rank: int) -> pb.Open:
    """One rank's; two with the same would be lives of one, of which the newer one's steps count."""
    slots = [
        pb.Slot(slot=i, layer=f"blocks.{i // 3}.fc", role=ROLES[i % 3], format="E4M3FN", recipe="AmaxScaling()")
        for i in range(ROWS)
    ]
    return pb.Open(
        run="bench",
        rank=rank,
        world_size=16_384,
        incarnation=1,
        source_uuid=str(uuid.uuid4()),
        slots=slots,
        agent_version="bench",
    )


def first_columns(kind: int = 0) -> dict[str, np.ndarray]:
    """Columns of one step with values like those of a training run: noisy floats, mostly small counts."""
    chance = np.random.default_rng([os.getpid(), kind])
    columns: dict[str, np.ndarray] = {"slot": np.arange(ROWS, dtype="<u4")}
    for field in FIELDS:
        if field.dtype == "uint64":
            columns[field.name] = chance.poisson(3, ROWS).astype("<u8")
        else:
            columns[field.name] = chance.lognormal(size=ROWS).astype(f"<f{np.dtype(field.dtype).itemsize}")
    return columns


def moved(column: np.ndarray, seq: int) -> np.ndarray:
    """The column as step `seq` has it."""
    values = np.roll(column, seq)
    return values * column.dtype.type(1 + seq % 997 / 997) if column.dtype.kind == "f" else values


def batch(
    seq: int, columns: dict[str, np.ndarray], compressor: zstandard.ZstdCompressor, roll: int | None = None
) -> pb.StatsBatch:
    """A batch of one step; values move on by `roll` slots from the columns given, by default to others in each step.

    By default floats are scaled, too: as in training their mantissas are noise that no database finds again.
    """
    packed = pb.StatsColumns(
        step=np.full(ROWS, seq, "<u8").tobytes(),
        slot=columns["slot"].tobytes(),
        **{
            name: (moved(column, seq) if roll is None else np.roll(column, roll)).tobytes()
            for name, column in columns.items()
            if name != "slot"
        },
    ).SerializeToString()
    return pb.StatsBatch(
        seq=seq,
        rows=ROWS,
        compression=pb.COMPRESSION_ZSTD,
        columns_bytes=len(packed),
        columns_crc32=zlib.crc32(packed),
        columns=compressor.compress(packed),
    )


if __name__ == "__main__":
    main()
