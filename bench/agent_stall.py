"""Whether anything stalls a training step: `Monitor.step` while the collector, or the disk, is no use.

Two thousand steps in a process of its own for each trouble. The agent is as in a training job: drain thread, spool,
sender process. What counts is how long `step()` takes on the training thread, how long leaving takes, and whether
memory grows.

    absent     nothing listens at the collector's address
    hung       something accepts connections, and never answers
    slow       a collector that commits one row a second
    flapping   a collector that is there for two seconds and away for two
    full disk  the spool's disk takes nothing more after some hundred steps (by RLIMIT_FSIZE)

    python bench/agent_stall.py                     # writes bench/results/agent_stall.json; 3 minutes
    python bench/agent_stall.py --steps 200 --only hung
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

from measured import machine

TROUBLES = ("none", "absent", "hung", "slow", "flapping", "full disk")
WARM_UP = 500  # steps until memory counts: rings, buffers and lists have their sizes by then
SLOTS = 72  # the demo's
PAUSE_S = 0.008  # a short training step
FULL_BYTES = 1 << 20  # of a file; at about 3 kB a step


def train(address: str, spool: str, steps: int, full_bytes: int) -> dict[str, float]:
    """A training loop in this process; the report of its steps."""
    import torch
    from torch import nn

    import fp8core
    import fp8scope_agent as fp8scope

    torch.set_num_threads(1)
    logging.getLogger("fp8scope").setLevel(logging.ERROR)
    if full_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (full_bytes, resource.RLIM_INFINITY))
    model = fp8core.convert_to_fp8(nn.Sequential(*(nn.Linear(16, 16) for _ in range(SLOTS // 3))))
    x_BK = torch.randn(16, 16)
    times_ms, resident_kb = (array("d", [0.0]) * steps for _ in range(2))  # whole from the start: growth is the agent's
    monitor = fp8scope.attach(model, run="stall", collector=address, spool_dir=spool)
    for step in range(steps):
        loss = model(x_BK).square().mean()
        torch.autograd.backward(loss)
        began = time.perf_counter()
        monitor.step(loss=loss)
        times_ms[step] = 1e3 * (time.perf_counter() - began)
        resident_kb[step] = _resident_kb()
        time.sleep(PAUSE_S)
    began = time.perf_counter()
    monitor.close()
    exit_s = time.perf_counter() - began
    snapshot = monitor.snapshot()
    settled = resident_kb[min(WARM_UP, steps // 2) :]
    cuts = statistics.quantiles(times_ms, n=100)
    return {
        "step_median_ms": round(cuts[49], 3),
        "step_p99_ms": round(cuts[98], 3),
        "step_largest_ms": round(max(times_ms), 3),
        "exit_s": round(exit_s, 2),
        "memory_kb_per_1000_steps": round(1000 * statistics.linear_regression(range(len(settled)), settled).slope, 1),
        "rows_recorded": snapshot.rows_recorded,
        "rows_dropped": sum(snapshot.rows_dropped.values()),
        "histograms_dropped": sum(n for reason, n in snapshot.rows_dropped.items() if reason.endswith("_histograms")),
    }


@contextmanager
def collector(trouble: str) -> Iterator[str]:
    """An address at which this trouble waits."""
    if trouble == "hung":
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
    elif trouble in ("absent", "full disk"):
        yield "127.0.0.1:1"
    else:
        with Acknowledger(row_s=1.0 if trouble == "slow" else 0.0) as server:
            if trouble == "flapping":
                threading.Thread(target=server.flap, daemon=True).start()
            yield server.address


class Acknowledger:
    """A collector that only counts: it takes `row_s` for a row, and says that it has it."""

    def __init__(self, row_s: float) -> None:
        import grpc

        from fp8scope_protos.v1 import telemetry_pb2_grpc

        self._row_s = row_s
        self._grpc, self._servicers = grpc, telemetry_pb2_grpc
        self._up_to_seq: dict[str, int] = {}
        self._closed = threading.Event()
        self._port = 0
        self._start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Acknowledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._server.stop(grace=None).wait(5)

    def flap(self) -> None:
        while not self._closed.wait(2):
            self._server.stop(grace=None).wait(5)
            if self._closed.wait(2):
                return
            self._start()

    def _start(self) -> None:
        self._server = self._grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        self._servicers.add_TelemetryServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]  # generated
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self._server.start()

    def Stream(self, messages, context):  # type: ignore[no-untyped-def]  # noqa: N802  # gRPC's
        from fp8scope_protos.v1 import telemetry_pb2 as pb

        uuid = next(messages).open.source_uuid
        opened = pb.Opened(incarnation=1, up_to_seq=self._up_to_seq.get(uuid, 0), takes_histograms=True)
        yield pb.ServerMessage(opened=opened, window=8)
        for message in messages:
            body = message.WhichOneof("body")
            if body == "heartbeat":
                continue
            record = getattr(message, body)
            if self._closed.wait(self._row_s * getattr(record, "rows", 0)):
                return
            self._up_to_seq[uuid] = record.seq
            yield pb.ServerMessage(ack=pb.Ack(up_to_seq=record.seq))


def _resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether anything stalls a training step.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", choices=TROUBLES)
    parser.add_argument("--full-bytes", type=int, default=FULL_BYTES, help="where the full disk ends")
    parser.add_argument("--train", nargs=3, metavar=("ADDRESS", "SPOOL", "TROUBLE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        address, spool, trouble = arguments.train
        full_bytes = arguments.full_bytes if trouble == "full disk" else 0
        print(json.dumps(train(address, spool, arguments.steps, full_bytes)))
        return
    report: dict[str, dict[str, float]] = {}
    for trouble in (arguments.only,) if arguments.only else TROUBLES:
        with tempfile.TemporaryDirectory() as spool, collector(trouble) as address:
            command = [sys.executable, __file__, "--steps", str(arguments.steps), "--train", address, spool, trouble]
            command += ["--full-bytes", str(arguments.full_bytes)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=600).stdout
            report[trouble] = json.loads(out)
            print(f"{trouble:10}", json.dumps(report[trouble]), flush=True)
    if not arguments.only and arguments.steps >= 2000:
        result = {
            "machine": f"{machine('torch')}; {SLOTS} slots, a step of about 20 ms",
            "month": datetime.datetime.now(datetime.UTC).strftime("%Y-%m"),
            "steps": arguments.steps,
            "troubles": report,
        }
        (Path(__file__).parent / "results" / "agent_stall.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
