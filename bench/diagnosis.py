"""What live diagnosis costs: one look at 1,680 tensors with 512 steps in memory, and what ingest loses by it.

The look is timed as the diagnosing process does it, read from SQLite and judged: a run of 1,680 tensors of which 512
steps were judged before, and 8 new steps. Ingest is the saturated collector of `bench/ingest.py`, with diagnosis and
without, in turns, and the medians of both are compared; its rows clip in every step, so every tensor has a finding.

    python bench/diagnosis.py [--rounds 3] [--seconds 6]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import ingest
from fp8core.records import Role
from fp8scope_collector.diagnosis.engine import Episodes, diagnose
from fp8scope_collector.diagnosis.live import Watcher
from fp8scope_collector.diagnosis.window import FIELDS_READ, ScalarSeries, Window, cut, follow, tail
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.readmodels import Slot
from recordings import Job

SLOTS, STEPS, NEW = 1680, 512, 8
RESULTS = Path(__file__).parent / "results" / "diagnosis.md"


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


def ingest_rows_per_s(rounds: int, seconds: float) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"off": [], "on": []}
    for number in range(rounds):
        for diagnosis in ("off", "on") if number % 2 == 0 else ("on", "off"):
            os.environ["FP8SCOPE_DIAGNOSIS"] = diagnosis
            found[diagnosis].append(ingest.measure("sqlite", 8, seconds)["rows_per_s"])
    return found


def listed(rates: list[float]) -> str:
    return ", ".join(f"{rate:,.0f}" for rate in rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6)
    options = parser.parse_args()
    judging, replay, look = judging_ms(), replay_ms(), look_ms()
    rates = ingest_rows_per_s(options.rounds, options.seconds)
    off, on = statistics.median(rates["off"]), statistics.median(rates["on"])
    text = f"""# What live diagnosis costs

`bench/diagnosis.py`, {ingest.machine()}, {datetime.now():%B %Y}.

| what | value |
|---|---|
| judging {NEW} new steps of {SLOTS:,} tensors, after {STEPS} | {judging:.0f} ms |
| judging {STEPS} steps of them at once | {replay:.0f} ms |
| a whole look at {NEW} new ones, with reading and writing on SQLite | {look:.0f} ms |
| ingest, 8 streams, without diagnosis: median of {options.rounds} | {off:,.0f} rows/s |
| the same with diagnosis, every tensor clipping | {on:,.0f} rows/s ({on / off - 1:+.1%}) |

Rounds without: {listed(rates["off"])}; with: {listed(rates["on"])}.
"""
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
