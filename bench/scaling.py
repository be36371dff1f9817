"""Writes docs/scaling.md: what to run for how many GPUs, computed from what bench/ingest.py measured.

    python bench/scaling.py

Nothing measured is typed in here; what is assumed (models, step times, headroom) is, and the page says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "ingest.json"
PAGE = ROOT / "docs" / "scaling.md"

HEADROOM = 0.5  # of the measured rate: the rest is for readers, catching up after an outage, and other machines
DAY_S = 86_400
DISK_TB = 2.0
NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "clickhouse": "ClickHouse"}


@dataclass(frozen=True)
class Job:
    """A training job of the page: an assumption."""

    gpus: int
    model: str
    slots: int  # (layer, role) that one rank has
    steps_per_s: float


@dataclass(frozen=True)
class Measured:
    """What one collector and its database did on one machine."""

    engine: str
    rows_per_s: float
    bytes_per_row: float
    streams: int
    peak_mib: int
    diagnosis_mib: int
    machine: str
    month: str


JOBS = (
    Job(8, "32 blocks, every rank has all of them", 32 * 7 * 3, 1.0),
    Job(512, "80 blocks, pipeline of 4", 80 * 7 * 3 // 4, 0.2),
    Job(16_000, "128 blocks, pipeline of 16", 128 * 7 * 3 // 16, 0.1),
)
EVERY = (1, 10)  # record every n-th step


def main() -> None:
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    measured = best(results["lines"])
    return TEMPLATE.format(
        disk=f"{DISK_TB:g}",
        headroom=f"{HEADROOM:.0%}",
        streams=f"{max(line['streams'] for line in results['lines'].values()):,}",
        jobs="\n".join(row(job, every, measured) for job in JOBS for every in EVERY),
        measured="\n".join(
            f"| {NAMES[each.engine]} | {each.rows_per_s:,.0f} | {each.bytes_per_row:.0f} | {each.streams} "
            f"| {each.peak_mib:,} + {each.diagnosis_mib:,} MiB | {each.machine}, {each.month} |"
            for each in measured.values()
        ),
    )


TEMPLATE = """\
# What to run for how many GPUs

Written by `bench/scaling.py` from [what was measured](../bench/results/ingest.md): change that, not this page.

Rows a second = GPUs x slots of a rank x steps a second / n, for `attach(..., every=n)`; a slot is one layer's input,
weight or grad_output. Bytes a day = rows a second x bytes a row x 86,400.

| GPUs | model: slots of a rank | steps/s | every | rows/s | database | collectors | bytes a day | {disk} TB hold |
|---|---|---|---|---|---|---|---|---|
{jobs}

What one collector with its database took, agents on the same machine too:

| database | rows/s | bytes a row | streams | memory: collector + diagnosis | where |
|---|---|---|---|---|---|
{measured}

## How it is computed

* A database and a collector are loaded to {headroom} of their measured rate at most. The rest is for readers, for
  catching up after an outage (at half load, an hour's is made up for in an hour), and for what differs on your
  machines: measure there with `python bench/ingest.py`, then `python bench/scaling.py`.
* The database is the first of SQLite, PostgreSQL and ClickHouse that takes the load. SQLite is one file and one
  collector: a job that should be watched also while a machine is down takes PostgreSQL, whatever its size. Here that is
  assumed from 512 GPUs on; then there are two collectors at least, and agents have both addresses.
* More collectors, and shards of ClickHouse, come from dividing the load by {headroom} of the measured rate. That shards
  and collectors add up was not measured: we had one machine.
* The most streams that were measured on one collector are {streams}; a collector refuses more than 16,384.
* The retention is for raw rows (`serve --retention`), here what {disk} TB hold; rollups stay.
"""


def best(lines: dict[str, dict[str, Any]]) -> dict[str, Measured]:
    """For each database the line with the most streams."""
    found: dict[str, Measured] = {}
    for engine in NAMES:
        own = [line for line in lines.values() if line["engine"] == engine]
        if own:
            line = max(own, key=lambda line: line["streams"])
            found[engine] = Measured(**{field.name: line[field.name] for field in fields(Measured)})
    return found


def row(job: Job, every: int, measured: dict[str, Measured]) -> str:
    """The job's line of the table."""
    rows_per_s = job.gpus * job.slots * job.steps_per_s / every
    head = f"| {job.gpus:,} | {job.model}: {job.slots:,} | {job.steps_per_s:g} | {every} | {rows_per_s:,.0f} "
    database = choose(job, rows_per_s, measured)
    if database is None:
        return f"{head}| more than was measured | | | |"
    parts = math.ceil(rows_per_s / (HEADROOM * database.rows_per_s))
    name = NAMES[database.engine]
    if database.engine == "clickhouse":
        name += f", {parts} shard{'s' if parts > 1 else ''}"
    collectors = max(parts, 2 if job.gpus >= 512 else 1)
    bytes_per_day = rows_per_s * database.bytes_per_row * DAY_S
    days = DISK_TB * 1e12 / bytes_per_day
    return f"{head}| {name} | {collectors} | {size(bytes_per_day)} | {days_text(days)} |"


def choose(job: Job, rows_per_s: float, measured: dict[str, Measured]) -> Measured | None:
    """The first database that takes the load; ClickHouse takes any, in shards."""
    for engine, each in measured.items():
        if engine == "sqlite" and job.gpus >= 512:
            continue
        if engine == "clickhouse" or rows_per_s <= HEADROOM * each.rows_per_s:
            return each
    return None


def size(count: float) -> str:
    """Bytes for people, in the units that disks are sold in."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.3g} {unit}"
    return f"{count:,.0f} B"


def days_text(days: float) -> str:
    """Days for people."""
    return f"{days:,.0f} days" if days >= 2 else f"{days * 24:,.0f} hours"


if __name__ == "__main__":
    main()
