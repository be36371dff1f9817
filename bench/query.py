"""How long the dashboard's questions take, at 2 and at 20 million rows: 1,680 slots, every step, one rank.

Rows go through the collector's own writer, without gRPC, so with all rollups. Each question is asked of `Reader` some
times, warm; the median counts. Beside the large run there are a thousand small ones for the list. A live tick is what
a run's page reads each second: the list, how far the run is, the newest columns of two heat maps.

Each engine and size has a database of its own. With `--keep` it stays there: a later call continues one that was cut
off, and asks one that is whole without writing it again. What is measured replaces its line in
bench/results/query.json, from which query.md is made.

    python bench/query.py [--rows 2e6 20e6] [--engines sqlite postgresql clickhouse] [--keep FOLDER] [--build]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from engines import ENGINES, Database, database
from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch, Source
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import migrate, open_engine, open_stats
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.writer import StatsWriter
from measured import machine

SLOTS = 1680
ROLES = ("input", "weight", "grad_output")
RUNS = 1000
GROUP = 24  # batches of one transaction
RESULTS = Path(__file__).parent / "results" / "query.json"
TARGET_MS = {
    "one tensor, whole run, 1,500 points": 50,
    "one tensor, 500 raw steps": 50,
    "heat map, whole run, all slots": 100,
    "worst 20 of the last 1,000 steps": 20,
    "list of 1,000 runs": 50,
    "live tick": 100,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=float, nargs="*", default=[2e6, 20e6], help="sizes")
    arguments.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES, help="databases")
    arguments.add_argument("--keep", type=Path, metavar="FOLDER", help="where databases are, and stay")
    arguments.add_argument("--build", action="store_true", help="only write them")
    options = arguments.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for engine in options.engines:
        for rows in map(int, options.rows):
            with database(engine, options.keep and options.keep / f"{engine}-{rows}") as target:
                build(target, rows // SLOTS)
                if not options.build:
                    results[f"{engine} {rows // SLOTS * SLOTS}"] = line = measure(target, rows // SLOTS)
                    print(engine, rows, line, flush=True)
    if not options.build:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
    """The results as a table, the engines in their order and each from small to large."""
    lines = [
        "# What a question costs",
        "",
        f"{SLOTS:,} slots, one rank; medians of warm questions, in milliseconds, by `bench/query.py`.",
        "",
        f"| database | rows | {' | '.join(TARGET_MS)} | bytes a row, raw + rollups | measured on |",
        "|" + "---|" * (len(TARGET_MS) + 4),
        f"| at most | | {' | '.join(str(target) for target in TARGET_MS.values())} | | |",
    ]
    for engine in ENGINES:
        sizes = sorted(int(name.split()[1]) for name in results if name.split()[0] == engine)
        for rows in sizes:
            line = results[f"{engine} {rows}"]
            cells = " | ".join(f"{line['ms'][name]:.1f}" if name in line["ms"] else "" for name in TARGET_MS)
            size = f"{line['raw_bytes']:.0f} + {line['rollup_bytes']:.0f}"
            lines.append(f"| {engine} | {rows:,} | {cells} | {size} | {line['on']} |")
    return "\n".join(lines) + "\n"


def build(target: Database, steps: int) -> None:
    """Writes what the database has not got yet of a run of so many steps."""
    engine = open_engine(target.url)
    migrate(engine)
    store = open_stats(engine)
    store.migrate()
    source = schema.source.c
    with engine.connect() as connection:
        large = sa.select(source.id, source.run_id, source.last_step).where(source.source_uuid == "large-0")
        found = connection.execute(large).one_or_none()
    if found is None:
        add_small_runs(engine)
        target.note("empty_bytes", target.size_bytes())
        large_source = add_source(engine, "large", SLOTS)
        written = 0
    else:
        large_source = as_source(found.id, found.run_id, "large", SLOTS)
        written = 0 if found.last_step is None else found.last_step + 1
    if written < steps:
        writer, chance = StatsWriter(engine, store), np.random.default_rng(written)
        while writer.catch_up(now_unix_ns=2**62):
            pass
        for start in range(written, steps, GROUP):
            group = [batch(chance, large_source, step) for step in range(start, min(start + GROUP, steps))]
            writer.commit(group, now_unix_ns=time.time_ns())
        writer.roll_up()
        if engine.dialect.name == "postgresql":
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("VACUUM (ANALYZE)")
    store.close()
    engine.dispose()


def measure(target: Database, steps: int) -> dict[str, Any]:
    """One line of the table."""
    engine = open_engine(target.url, read_only=True)
    with engine.connect() as connection:
        source = schema.source.c
        run_id = connection.scalars(sa.select(source.run_id).where(source.source_uuid == "large-0")).one()
        rollups = int(connection.scalar(sa.select(sa.func.sum(sa.func.length(schema.rollup.c.data)))) or 0)
    engine.dispose()
    load = os.getloadavg()[0]
    medians = questions(target.url, run_id, steps)
    rows = steps * SLOTS
    return {
        "ms": dict(zip(TARGET_MS, medians, strict=True)),
        "raw_bytes": (target.size_bytes() - target.noted("empty_bytes") - rollups) / rows,
        "rollup_bytes": rollups / rows,
        "on": f"{machine()}; {datetime.now():%B %Y}; load {load:.1f} when it began",
    }


def questions(url: str, run_id: int, steps: int) -> list[float]:
    """The medians in milliseconds, in the order of `TARGET_MS`."""
    reader = Reader(url)
    fields = ["amax", "scale_exp2", "headroom", "overflow_ratio"]
    middle = steps // 2 // 16 * 16 + 5
    window = {"first_step": middle, "last_step": middle + 499}
    width = reader.heatmap(run_id, "overflow", max_columns=500).width

    def tick() -> None:
        reader.runs()
        progress = reader.progress(run_id)
        assert progress
        since = progress.last_step // width * width - width
        reader.heatmaps(run_id, ["scale_exp2", "overflow"], first_step=since, width=width)

    asked: list[Callable[[], object]] = [
        lambda: reader.series(run_id, 700, fields, max_points=750),
        lambda: reader.series(run_id, 700, fields, max_points=500, **window),
        lambda: reader.heatmap(run_id, "overflow", max_columns=500),
        lambda: reader.top(run_id, last_steps=1000, limit=20, by="overflow"),
        reader.runs,
        tick,
    ]
    medians = []
    for ask in asked:
        times = []
        for _ in range(12):
            start = time.perf_counter()
            ask()
            times.append((time.perf_counter() - start) * 1e3)
        medians.append(float(np.median(times[2:])))
    reader.close()
    return medians


def batch(chance: np.random.Generator, source: Source, step: int) -> Batch:
    """One step with values like those of a training run."""
    columns: dict[str, np.ndarray] = {}
    for field in FIELDS:
        if field.dtype == "uint64":
            columns[field.name] = chance.poisson(3, SLOTS)
        else:
            columns[field.name] = chance.lognormal(size=SLOTS).astype(field.dtype)
    columns["numel"][:] = 1 << 20
    slots = np.arange(SLOTS)
    return Batch(source, step + 1, 1, np.full(SLOTS, step), slots, columns)


def add_source(engine: sa.Engine, run: str, slots: int, ranks: int = 1) -> Source:
    """A run with its slots and sources; the source of rank 0."""
    with engine.begin() as connection:
        made = schema.run.insert().values(project="", name=run, created_unix_ns=1).returning(schema.run.c.id)
        run_id = connection.execute(made).scalar_one()
        if slots:
            key = {"run_id": run_id, "module_class": "Fp8Linear", "in_features": 64, "out_features": 64}
            named = [{**key, "slot": i, "layer": f"blocks.{i // 3}.fc", "role": ROLES[i % 3]} for i in range(slots)]
            connection.execute(schema.slot.insert(), named)
            how = {"run_id": run_id, "incarnation": 1, "format": "E4M3FN", "recipe": "AmaxScaling()", "margin": 0}
            connection.execute(schema.slot_recipe.insert(), [{**how, "slot": i} for i in range(slots)])
        sources = []
        for rank in range(ranks):
            values = {
                "run_id": run_id,
                "rank": rank,
                "incarnation": 1,
                "world_size": ranks,
                "clock_skew_ns": 0,
                "source_uuid": f"{run}-{rank}",
                "agent_version": "",
                "environment_json": "{}",
                **dict.fromkeys(("started_unix_ns", "first_seen_unix_ns", "last_seen_unix_ns"), 1),
            }
            source = schema.source.insert().values(**values).returning(schema.source.c.id)
            sources.append(connection.execute(source).scalar_one())
    return as_source(sources[0], run_id, run, slots)


def as_source(source_id: int, run_id: int, run: str, slots: int) -> Source:
    """Rank 0 of a run as the writer knows it."""
    ids = np.arange(slots)
    return Source(source_id, run_id, run, 0, 1, 0, False, ids, np.zeros(slots, np.int8), np.full(slots, 8.0))


def add_small_runs(engine: sa.Engine) -> None:
    """A thousand runs of eight ranks that have some steps."""
    for number in range(RUNS):
        add_source(engine, f"run-{number}", 0, ranks=8)
    with engine.begin() as connection:
        ids = connection.scalars(sa.select(schema.source.c.id)).all()
        covered = [{"source_id": i, "first_step": 0, "rolled_step": 100, "pruned_step": 100} for i in ids]
        connection.execute(schema.coverage.insert(), covered)
        connection.execute(schema.source.update().values(last_step=99, rows=100))


if __name__ == "__main__":
    main()
