"""What live diagnosis costs: an evaluation, what ingest loses by it, and how late findings are.

* **evaluation**: all rules over 1,680 tensors with 512 steps in memory: extended by a cursor (8 new steps come, the
  usual case), and all 512 at once (after a restart, or in a replay); and a look of the process, which reads and writes.
* **ingest**: the saturated collector of `bench/ingest.py` with diagnosis and without, in turns, medians compared. Its
  rows clip and have NaN in every step, so that every tensor has findings of several rules: the dearest there can be.
  How far behind diagnosis is when the clients end, and how long it takes to catch up.
* **pace**: an agent that sends 10 or 100 steps a second; seconds from sending a NaN until its finding is stored.

    python bench/diagnosis.py [--parts evaluation ingest pace] [--rounds 3] [--seconds 20]

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
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import ingest
from fp8core.records import FIELDS, Role
from fp8scope_collector.diagnosis.engine import Episodes, diagnose
from fp8scope_collector.diagnosis.live import Watcher
from fp8scope_collector.diagnosis.window import FIELDS_READ, ScalarSeries, Window, cut, follow, tail
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
WAIT_S = 15.0  # for diagnosis to catch up, so that three rounds take less than four minutes
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
    before, episodes, times = None, Episodes(), []
    for number, piece in enumerate(pieces):
        started = time.perf_counter()
        window = follow(before, piece)
        episodes.observe(window)
        before = tail(window)
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


def saturated(rounds: int, seconds: float) -> dict[str, Any]:
    """Rows a second and p99 without and with diagnosis, and how far that was behind."""
    found: dict[str, Any] = {"seconds": seconds, "off": [], "on": [], "off_p99_ms": [], "on_p99_ms": []}
    behind: list[dict[str, float]] = []

    @contextlib.contextmanager
    def watching(url: str) -> Iterator[None]:
        with ingest.asking(url):
            yield
        if os.environ["FP8SCOPE_DIAGNOSIS"] == "on":
            behind.append(caught_up(url))

    for number in range(rounds):
        for diagnosis in ("off", "on") if number % 2 == 0 else ("on", "off"):
            os.environ["FP8SCOPE_DIAGNOSIS"] = diagnosis
            line = ingest.measure("sqlite", 8, seconds, watching)
            found[diagnosis].append(line["rows_per_s"])
            found[f"{diagnosis}_p99_ms"].append(line["p99_ms"])
            print(diagnosis, line["rows_per_s"], line["p99_ms"], behind[-1:], file=sys.stderr)
    return found | {"behind": behind}


def caught_up(url: str) -> dict[str, float]:
    """The share of steps that was judged when the clients had ended, and when all were, if within `WAIT_S`."""
    reader, started = Reader(url), time.monotonic()
    run = reader.runs()[0].id
    progress = reader.progress(run)
    assert progress
    share = ((reader.judged_step(run) or 0) + 1) / (progress.settled_step + 1)
    while (reader.judged_step(run) or 0) < progress.settled_step and time.monotonic() < started + WAIT_S:
        time.sleep(0.1)
    reader.close()
    return {"judged_share": round(share, 2), "caught_up_s": round(time.monotonic() - started, 1)}


def pace(steps_per_s: int, seconds: float = 12.0) -> float:
    """Seconds from sending a step with a NaN until its finding is stored, at a steady pace."""
    window = healthy(int(steps_per_s * seconds))
    broken = window.steps.size * 2 // 3
    window["nonfinite"][0, broken, 5] = 1.0
    sent: list[float] = []

    def requests() -> Iterator[pb.ClientMessage]:
        opening = ingest.opening()
        for slot in opening.slots:
            slot.recipe = window.slots[slot.slot].recipe
        yield pb.ClientMessage(open=opening)
        compressor, started = zstandard.ZstdCompressor(level=1), time.monotonic()
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
        off, on = statistics.median(part["off"]), statistics.median(part["on"])
        rounds = f"median of {len(part['off'])} rounds of {part['seconds']:g} s"
        row(f"ingest, 8 streams, without diagnosis, {rounds}", f"{off:,.0f} rows/s", part)
        row("the same with diagnosis", f"{on:,.0f} rows/s ({on / off - 1:+.1%})", part)
        p99 = [statistics.median(part[name]) for name in ("off_p99_ms", "on_p99_ms")]
        row("its p99 from sending to acknowledgement, without and with", f"{p99[0]:,.0f} and {p99[1]:,.0f} ms", part)
        shares = [f"{each['judged_share']:.0%}" for each in part["behind"]]
        row("steps that diagnosis had judged when the clients ended", ", ".join(shares), part)
        later = [f"{each['caught_up_s']:g}" for each in part["behind"]]
        row(f"seconds until it had judged all ({WAIT_S:g}: not yet)", ", ".join(later), part)
    if part := results.get("pace"):
        for rate, delay in part["delay_s"].items():
            row(f"from a NaN to its finding, {rate} steps/s of {SLOTS:,} tensors", f"{delay:.1f} s", part)
    if part := results.get("ingest"):
        rates = [", ".join(f"{rate:,.0f}" for rate in part[name]) for name in ("off", "on")]
        text += ["", f"Rounds without: {rates[0]}; with: {rates[1]} rows/s."]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in options.parts:
        if part == "ingest":
            found = saturated(options.rounds, options.seconds)
        else:
            found = evaluation() if part == "evaluation" else {"delay_s": {rate: pace(rate) for rate in RATES}}
        results[part] = found | {"machine": machine(), "month": f"{datetime.now():%B %Y}"}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
