"""How many rows a second a collector acknowledges: real gRPC, client processes, each database with full durability.

Each stream sends batches of one step of 560 layers (1,680 rows), zstd level 1, as agents do: at most `window` of them
unacknowledged, and each in its turn, as the collector says. Clients, server and database share the machine's cores.
Latency is from before a batch is handed to gRPC until its acknowledgement is read. A saturated stream also waits for
its turn, with nothing sent; how often one comes is what the rate leaves to each stream.

What is measured replaces its line in bench/results/ingest.json; ingest.md is made from that, and docs/scaling.md by
bench/scaling.py. One line takes its seconds and 15 to 30 more.

    python bench/ingest.py [--engines sqlite postgresql clickhouse] [--seconds 6] [--streams 1 8] [--peers]
"""

from __future__ import annotations

import argparse
import contextlib
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
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import numpy as np
import zstandard

from engines import ENGINES, database
from fp8core.records import FIELDS
from fp8scope_collector.storage.reader import Reader
from fp8scope_protos.v1 import telemetry_pb2 as pb
from fp8scope_protos.v1 import telemetry_pb2_grpc as pb_grpc
from ingest_peers import compared
from measured import machine

Meanwhile: TypeAlias = Callable[[str], contextlib.AbstractContextManager[object]]
ROWS = 1680
ROLES = (pb.ROLE_INPUT, pb.ROLE_WEIGHT, pb.ROLE_GRAD_OUTPUT)
WARM_UP_S = 3.0
CLIENTS = 2
RESULTS = Path(__file__).parent / "results" / "ingest.json"
NAMES = {"sqlite": "SQLite (synchronous=FULL)", "postgresql": "PostgreSQL", "clickhouse": "ClickHouse (chDB)"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES, help="databases")
    arguments.add_argument("--seconds", type=float, default=6, help="measured time of each line")
    arguments.add_argument("--streams", type=int, nargs="*", default=[1, 8], help="agents; one line for each number")
    arguments.add_argument("--client", nargs=2, metavar=("ADDRESS", "STREAMS"), help=argparse.SUPPRESS)
    arguments.add_argument("--peers", action="store_true", help="other tools too, in this run")
    options = arguments.parse_args()
    if options.client:
        print(json.dumps(run_client(options.client[0], int(options.client[1]), options.seconds)))
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
        f"Batches of {ROWS:,} rows, {CLIENTS} client processes; clients, collector, database and (not for ClickHouse)",
        "a reader that asks the dashboard's questions once a second share the cores: `bench/ingest.py`.",
        "",
        "| database | streams | rows/s | first, last 10 s | send to acknowledgement, median | p99 "
        "| collector's peak memory | bytes a row on disk | measured |",
        "|---|---|---|---|---|---|---|---|---|",
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
        f"| {line['median_ms']:,.0f} ms | {line['p99_ms']:,.0f} ms | {line['peak_mib']:,.0f} MiB "
        f"| {line['bytes_per_row']:.0f} "
        f"| {line['seconds']:g} s on {line['machine']}, {line['month']} |"
    )


def measure(engine: str, streams: int, seconds: float, meanwhile: Meanwhile | None = None) -> dict[str, Any]:
    """One line's numbers; `meanwhile` gets the database's URL and is left when the clients have ended."""
    meanwhile = meanwhile or (contextlib.nullcontext if engine == "clickhouse" else asking)  # chDB is one process's
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
            shares = [len(range(client, streams, CLIENTS)) for client in range(min(CLIENTS, streams))]
            clients = [
                subprocess.Popen(
                    [sys.executable, __file__, "--seconds", str(seconds), "--client", found[1], str(share)],
                    stdout=subprocess.PIPE,
                )
                for share in shares
            ]
            with meanwhile(target.url):
                results = [json.loads(client.communicate()[0]) for client in clients]
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())
            assert peak
        finally:
            server.terminate()
            server.wait()
            server.stdout.close()
        rows = sum(result["rows"] for result in results)
        stored = sum(result["all_rows"] for result in results)
        latencies = np.concatenate([result["latencies_s"] for result in results])
        at = np.concatenate([result["acknowledged_s"] for result in results])
        edge = min(10.0, seconds / 2)
        return {
            "engine": engine,
            "streams": streams,
            "rows_per_s": round(rows / seconds),
            "first_rows_per_s": round(int((at < edge).sum()) * ROWS / edge),
            "last_rows_per_s": round(int((at >= seconds - edge).sum()) * ROWS / edge),
            "median_ms": round(float(np.median(latencies)) * 1e3, 1),
            "p99_ms": round(float(np.quantile(latencies, 0.99)) * 1e3, 1),
            "peak_mib": round(int(peak[1]) / 1024),
            "bytes_per_row": round(target.size_bytes() / stored, 1),
            "seconds": seconds,
            "machine": machine(),
            "month": f"{datetime.now():%B %Y}",
        }


def run_client(address: str, streams: int, seconds: float) -> dict[str, object]:
    """Sends over `streams` streams until time is up; what was acknowledged within the measured time."""
    latencies: list[float] = []
    times: list[float] = []
    totals: list[int] = []
    window = Window(seconds, streams)

    def send() -> None:
        own, at, acknowledged = converse(address, window)
        latencies.extend(own)
        times.extend(at)
        totals.append(acknowledged)

    threads = [threading.Thread(target=send) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "rows": len(latencies) * ROWS,
        "all_rows": sum(totals) * ROWS,
        "latencies_s": latencies,
        "acknowledged_s": times,
    }


class Window:
    """The measured time: it begins some seconds after all streams are open."""

    def __init__(self, seconds: float, streams: int) -> None:
        self._seconds = seconds
        self._closed = streams
        self._lock = threading.Lock()
        self.start = self.end = float("inf")

    def opened(self) -> None:
        """One stream more is open."""
        with self._lock:
            self._closed -= 1
            if self._closed == 0:
                self.start = time.perf_counter() + WARM_UP_S
                self.end = self.start + self._seconds


def converse(address: str, window: Window) -> tuple[list[float], list[float], int]:
    """One agent: latencies of the batches acknowledged in the measured time, when that was, and how many in all."""
    ready = threading.Semaphore(0)
    sent_at: list[float] = []

    def requests() -> Iterator[pb.ClientMessage]:
        yield pb.ClientMessage(open=opening(), more=True)
        compressor = zstandard.ZstdCompressor(level=1)
        columns = first_columns()
        while ready.acquire() and time.perf_counter() < window.end:
            sent_at.append(time.perf_counter())
            yield pb.ClientMessage(stats=batch(len(sent_at), columns, compressor), more=True)

    latencies: list[float] = []
    times: list[float] = []
    acknowledged = allowed = may_be_sent = most_under_way = 0
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = pb_grpc.TelemetryStub(channel)  # type: ignore[no-untyped-call]  # generated
        for message in stub.Stream(requests()):
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
            if more := min(allowed, acknowledged + most_under_way) - may_be_sent:
                may_be_sent += more
                ready.release(more)
            if now > window.end:
                ready.release()  # it may wait for a turn
    return latencies, times, acknowledged


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

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield
    finally:
        stop.set()
        asker.join()


def opening() -> pb.Open:
    slots = [
        pb.Slot(slot=i, layer=f"blocks.{i // 3}.fc", role=ROLES[i % 3], format="E4M3FN", recipe="AmaxScaling()")
        for i in range(ROWS)
    ]
    source = uuid.uuid4()
    return pb.Open(
        run="bench",
        rank=source.int % 2**19,
        world_size=2**19,
        incarnation=1,
        source_uuid=str(source),
        slots=slots,
        agent_version="bench",
    )


def first_columns() -> dict[str, np.ndarray]:
    """Columns of one step with values like those of a training run: noisy floats, mostly small counts."""
    chance = np.random.default_rng(os.getpid())
    columns: dict[str, np.ndarray] = {"slot": np.arange(ROWS, dtype="<u4")}
    for field in FIELDS:
        if field.dtype == "uint64":
            columns[field.name] = chance.poisson(3, ROWS).astype("<u8")
        else:
            columns[field.name] = chance.lognormal(size=ROWS).astype(f"<f{np.dtype(field.dtype).itemsize}")
    return columns


def batch(
    seq: int, columns: dict[str, np.ndarray], compressor: zstandard.ZstdCompressor, roll: int | None = None
) -> pb.StatsBatch:
    """A batch of one step; values move on by `roll` slots from the columns given, by default to others in each step."""
    packed = pb.StatsColumns(
        step=np.full(ROWS, seq, "<u8").tobytes(),
        slot=columns["slot"].tobytes(),
        **{
            name: np.roll(column, seq if roll is None else roll).tobytes()
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
