"""What live diagnosis costs: an evaluation, what ingest loses by it, and how late findings are.

* **evaluation**: all rules over 1,680 tensors with 512 steps in memory: extended by a cursor (8 new steps come, the
  usual case), and all 512 at once (after a restart, or in a replay); and a look of the process, which reads and writes.
* **ingest**: the saturated collector of `bench/ingest.py` with diagnosis beside it. Rows clip and have NaN in every
  step, so that every tensor has findings of several rules: the dearest there can be. Every two seconds, from commit
  to commit, it is noted what came in and what diagnosis used, which looks for some seconds and rests for more; what
  one core of it would cost is fitted to how both differ from what they are around that time, since a machine is
  faster in one minute than in the next by more than diagnosis costs. How many rows it judges meanwhile, and when the
  clients have ended.
* **pace**: an agent that sends 10 or 100 steps a second; seconds from sending a NaN until its finding is stored.

    python bench/diagnosis.py [--parts evaluation ingest pace] [--seconds 240]

What is measured replaces its part in bench/results/diagnosis.json; diagnosis.md is made from that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import sqlalchemy as sa
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import ingest
from fp8core.records import FIELDS, Role
from fp8scope_agent.encode import ZSTD_LEVEL
from fp8scope_collector.diagnosis.engine import Episodes, diagnose
from fp8scope_collector.diagnosis.live import Watcher
from fp8scope_collector.diagnosis.window import FIELDS_READ, Context, ScalarSeries, Window, cut
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.readmodels import Slot
from fp8scope_protos.v1 import telemetry_pb2 as pb
from fp8scope_protos.v1 import telemetry_pb2_grpc as pb_grpc
from live_faults import program, said
from measured import machine
from recordings import Job

SLOTS, STEPS, NEW = 1680, 512, 8
PARTS = ("evaluation", "ingest", "pace")
NOTED_S = 2.0
AROUND = 10  # as many before and after
CATCHING_UP_S = 30.0  # that are watched when the clients have ended
RATES = (10, 100)  # steps a second of one agent
TYPES = {field.name: np.dtype(field.dtype).newbyteorder("<") for field in FIELDS}
RESULTS = Path(__file__).parent / "results" / "diagnosis.json"


def healthy(steps: int) -> Window:
    """Rows of a training in which nothing is wrong: levels that wander by a few per cent."""
    chance = np.random.default_rng(0)
    shape = (1, steps, SLOTS)
    slots = tuple(
        Slot(i, f"layers.{i // 21}.{i // 3 % 7}", role, "Fp8Linear", 4096, 4096, "E4M3FN", "DelayedScaling()", 0)
        for i in range(SLOTS)
        for role in [list(Role)[i % 3]]
    )
    amax = 2.0 ** (chance.normal(0, 2, (1, 1, SLOTS)) + chance.normal(0, 0.02, shape))
    fields = {name: np.zeros(shape) for name in FIELDS_READ}
    fields |= {"amax": amax, "numel": np.full(shape, 2.0**24), "zeros": np.full(shape, 9.0)}
    fields |= dict.fromkeys(("scale_min", "scale_max"), 448 / np.maximum.accumulate(amax, axis=1))
    loss = ScalarSeries(np.arange(steps), 3 + chance.normal(0, 0.02, steps))
    return Window(np.arange(steps), (0,), slots, fields, {"loss": loss})


def judging_ms() -> float:
    """The rules and the episodes of 8 new steps, after 512."""
    pieces = list(cut(healthy(STEPS + 8 * NEW), NEW))
    context, episodes, times = Context(), Episodes(), []
    for number, piece in enumerate(pieces):
        started = time.perf_counter()
        episodes.observe(context.follow(piece))
        times.append((time.perf_counter() - started) * 1e3)
        if number < STEPS // NEW:
            times.clear()
    return statistics.median(times)


def replay_ms() -> float:
    """The same of 512 steps at once, as `fp8scope diagnose` reads them: without a context to extend."""
    window, times = healthy(STEPS), []
    for _ in range(5):
        started = time.perf_counter()
        diagnose([window])
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def look_ms() -> float:
    """A look of the diagnosing process at 8 new steps: queries, reading, judging, writing."""
    window = healthy(STEPS + 8 * NEW)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/bench.db"
        engine = open_engine(url)
        migrate(engine)
        job = Job(engine, replace(window, scalars=window.scalars))
        for start in range(0, STEPS, 64):
            job.send(start, start + 64)
        watcher, times, more = Watcher(url), [], True
        while more:
            _, more = watcher.look()
        for start in range(STEPS, STEPS + 8 * NEW, NEW):
            job.send(start, start + NEW)
            started = time.perf_counter()
            watcher.look()
            times.append((time.perf_counter() - started) * 1e3)
        watcher.close()
        engine.dispose()
    return statistics.median(times)


def evaluation() -> dict[str, Any]:
    return {"judging_ms": judging_ms(), "at_once_ms": replay_ms(), "look_ms": look_ms()}


def saturated(seconds: float) -> dict[str, Any]:
    """What was noted of a saturated collector, and how fast diagnosis judges when the clients have ended."""
    os.environ["FP8SCOPE_DIAGNOSIS"] = "on"
    found: dict[str, Any] = {"seconds": seconds}

    @contextlib.contextmanager
    def watching(url: str) -> Iterator[None]:
        ended = threading.Event()
        noting = threading.Thread(target=lambda: found.update(noted=list(noted(url, ended))))
        noting.start()
        yield
        ended.set()
        noting.join()
        found["judged_after"] = judging_rows_per_s(url, CATCHING_UP_S)

    line = ingest.measure("sqlite", 8, seconds, watching)
    return found | {"p99_ms": line["p99_ms"]}


def noted(url: str, ended: threading.Event) -> Iterator[dict[str, float]]:
    """Rows a second committed, the cores that diagnosis used, and rows a second judged, between two commits each."""
    engine = open_engine(url, read_only=True)
    worker = 0

    def committed() -> int:
        with engine.connect() as connection:
            return connection.execute(sa.select(sa.func.sum(schema.source.c.last_step))).scalar() or 0

    def now() -> tuple[float, float, float, float]:
        before = steps = committed()
        while steps == before and not ended.is_set():
            time.sleep(0.01)
            steps = committed()
        return time.monotonic(), float(ingest.ROWS * steps), processor_s(worker), judged_rows(url)

    now()
    worker = diagnosing_process()
    time.sleep(2 * ingest.WARM_UP_S)
    start = now()
    while not ended.wait(NOTED_S):
        if ended.is_set() or (end := now())[1] == start[1]:
            break
        took_s, *done = (after - before for after, before in zip(end, start, strict=True))
        names = ("rows_per_s", "cores", "judged_per_s")
        yield {name: round(each / took_s, 3) for name, each in zip(names, done, strict=True)}
        start = end
    engine.dispose()


def cost(noted: list[dict[str, float]]) -> tuple[float, float]:
    """What diagnosis took of the rate, as a share, and its standard error."""
    rates, cores = (np.array([each[name] for each in noted]) for name in ("rows_per_s", "cores"))
    near = np.abs(np.subtract.outer(np.arange(rates.size), np.arange(rates.size))) <= AROUND
    near = near / near.sum(axis=1, keepdims=True)
    of_rate, of_cores = (rates / (near @ rates) - 1, cores - near @ cores)
    a_core = of_cores @ of_rate / (of_cores @ of_cores)
    left = of_rate - a_core * of_cores
    error = (left @ left / (left.size - 2) / (of_cores @ of_cores)) ** 0.5
    return float(a_core * cores.mean()), float(error * cores.mean())


def judging_rows_per_s(url: str, seconds: float) -> float:
    """Rows that diagnosis judges a second from now on; 0.0 where it has judged all."""
    started, before = time.monotonic(), judged_rows(url)
    time.sleep(seconds)
    return (judged_rows(url) - before) / (time.monotonic() - started)


def judged_rows(url: str) -> float:
    """The rows that diagnosis has judged, of all ranks."""
    reader = Reader(url)
    run = reader.runs()[0]
    step = reader.judged_step(run.id) or 0
    reader.close()
    return float(step * run.ranks * ingest.ROWS)


def diagnosing_process() -> int:
    """The process that a collector of ours has started beside itself."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(folder.name)) == os.getsid(0) and "diagnosis.worker" in (folder / "cmdline").read_text():
                return int(folder.name)
    raise SystemExit("the collector has started no diagnosis")


def processor_s(process: int) -> float:
    """The processor time that a process has used; of 0, none."""
    if not process:
        return 0.0
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{process}/task").glob("*/schedstat")) / 1e9


def pace(steps_per_s: int, seconds: float = 12.0) -> float:
    """Seconds from sending a step with a NaN until its finding is stored, at a steady pace."""
    window = healthy(int(steps_per_s * seconds))
    broken = window.steps.size * 2 // 3
    window["nonfinite"][0, broken, 5] = 1.0
    sent: list[float] = []

    def requests() -> Iterator[pb.ClientMessage]:
        opening = ingest.opening(rank=0)
        for slot in opening.slots:
            slot.recipe = window.slots[slot.slot].recipe
        yield pb.ClientMessage(open=opening)
        compressor, started = zstandard.ZstdCompressor(level=ZSTD_LEVEL), time.monotonic()
        for step in range(window.steps.size):
            time.sleep(max(0.0, started + step / steps_per_s - time.monotonic()))
            columns = {name: window[name][0, step].astype(TYPES[name]) for name in window.fields}
            columns["slot"] = np.arange(SLOTS, dtype="<u4")
            message = ingest.batch(step + 1, columns, compressor, roll=0)
            if step == broken:
                sent.append(time.monotonic())
            yield pb.ClientMessage(stats=message)

    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/bench.db"
        serve = ["-m", "fp8scope_collector", "serve", "--db", url, "--grpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        with program(serve) as collector, grpc.insecure_channel(said(collector, r"grpc (\S+?),")[1]) as channel:
            stub = pb_grpc.TelemetryStub(channel)  # type: ignore[no-untyped-call]  # generated
            agent = threading.Thread(target=lambda: list(stub.Stream(requests())))
            agent.start()
            reader = Reader(url)
            while not reader.findings():
                time.sleep(0.05)
            delay = time.monotonic() - sent[0]
            reader.close()
            agent.join()
    return delay


def page(results: dict[str, Any]) -> str:
    """bench/results/diagnosis.md."""
    text = [
        "# What live diagnosis costs",
        "",
        "`bench/diagnosis.py`",
        "",
        "| what | value | measured |",
        "|---|---|---|",
    ]

    def row(what: str, value: str, part: dict[str, Any]) -> None:
        text.append(f"| {what} | {value} | {part['machine']}, {part['month']} |")

    if part := results.get("evaluation"):
        row(f"judging {NEW} new steps of {SLOTS:,} tensors, {STEPS} in memory", f"{part['judging_ms']:.0f} ms", part)
        row(f"judging {STEPS} steps of them at once, as after a restart", f"{part['at_once_ms']:.0f} ms", part)
        row(f"a look at {NEW} new steps, with reading and writing on SQLite", f"{part['look_ms']:.0f} ms", part)
    if part := results.get("ingest"):
        change, error = cost(part["noted"])
        means = {name: statistics.mean(each[name] for each in part["noted"]) for name in part["noted"][0]}
        row(f"ingest, 8 streams, with diagnosis, {part['seconds']:g} s", f"{means['rows_per_s']:,.0f} rows/s", part)
        row("what diagnosis takes of that, and the standard error", f"{change:+.1%} ± {error:.1%}", part)
        row("p99 from sending to acknowledgement", f"{part['p99_ms']:,.0f} ms", part)
        row("cores that diagnosis used", f"{means['cores']:.2f}", part)
        row("rows that it judged meanwhile", f"{means['judged_per_s']:,.0f} a second", part)
        row("the same when the clients had ended", f"{part['judged_after']:,.0f} a second", part)
    if part := results.get("pace"):
        for rate, delay in part["delay_s"].items():
            row(f"from a NaN to its finding, {rate} steps/s of {SLOTS:,} tensors", f"{delay:.1f} s", part)
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seconds", type=float, default=240, help="of saturated ingest (default %(default)s)")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in options.parts:
        if part == "ingest":
            found = saturated(options.seconds)
        else:
            found = evaluation() if part == "evaluation" else {"delay_s": {rate: pace(rate) for rate in RATES}}
        results[part] = found | {"machine": machine(), "month": f"{datetime.now():%B %Y}"}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
