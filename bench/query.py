"""How long the dashboard's questions take, at 2 and at 20 million rows: 1,680 slots, every step, one rank.

Rows go through the collector's own writer, without gRPC, so with all rollups. Each question is asked of `Reader` some
times, warm; the median counts. Beside the large run there are a thousand small ones for the list.

    python bench/query.py [--rows 2e6 20e6] [--engines sqlite postgresql clickhouse]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from engines import ENGINES, Database, database
from fp8core.records import FIELDS
from fp8scope_collector.messages import Batch, Source
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import migrate, open_engine, open_stats
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.writer import StatsWriter
from ingest import machine

SLOTS = 1680
RUNS = 1000
GROUP = 24  # batches of one transaction
RESULTS = Path(__file__).parent / "results" / "query.md"
TARGET_MS = {
    "one tensor, whole run, 1,500 points": 50,
    "one tensor, 500 raw steps": 50,
    "heat map, whole run, all slots": 100,
    "worst 20 of the last 1,000 steps": 20,
    "list of 1,000 runs": 50,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=float, nargs="*", default=[2e6, 20e6], help="sizes, ascending")
    arguments.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES, help="databases")
    options = arguments.parse_args()
    lines = [
        "# What a question costs",
        "",
        f"{machine()}; {datetime.now():%B %Y}; a load of {os.getloadavg()[0]:.1f} when it began. `bench/query.py`:",
        f"{SLOTS:,} slots, one rank; medians of warm questions, in milliseconds.",
        "",
        f"| database | rows | {' | '.join(TARGET_MS)} | bytes a row, raw and rollups | written, rows/s |",
        "|" + "---|" * (len(TARGET_MS) + 4),
        f"| target | 20,160,000 | {' | '.join(f'≤ {target}' for target in TARGET_MS.values())} | | |",
    ]
    for engine in options.engines:
        with database(engine) as target:
            for line in measure(engine, target, [int(rows) for rows in options.rows]):
                print(line, flush=True)
                lines.append(line)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")


def measure(name: str, target: Database, sizes: list[int]) -> Iterator[str]:
    """One line of the table for each size; rows are added in between."""
    engine = open_engine(target.url)
    migrate(engine)
    store = open_stats(engine)
    store.migrate()
    add_small_runs(engine)
    empty = target.size_bytes()
    source = add_source(engine, "large", SLOTS)
    writer, steps = StatsWriter(engine, store), 0
    chance = np.random.default_rng(0)
    for rows in sizes:
        start = time.perf_counter()
        before = steps
        while steps < rows // SLOTS:
            count = min(GROUP, rows // SLOTS - steps)
            writer.commit([batch(chance, source, steps + i) for i in range(count)], now_unix_ns=time.time_ns())
            steps += count
        writer.roll_up()
        rate = (steps - before) * SLOTS / (time.perf_counter() - start)
        if name == "postgresql":
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("VACUUM (ANALYZE)")
        asked = questions(target.url, source, steps)
        size = (target.size_bytes() - empty) / (steps * SLOTS)
        share = rollup_bytes(engine) / (steps * SLOTS)
        cells = " | ".join(f"{median:.1f}" for median in asked)
        yield f"| {name} | {steps * SLOTS:,} | {cells} | {size - share:.0f} + {share:.0f} | {rate:,.0f} |"
    store.close()
    engine.dispose()


def questions(url: str, source: Source, steps: int) -> list[float]:
    """The medians in milliseconds, in the order of `TARGET_MS`."""
    reader = Reader(url)
    fields = ["amax", "scale_exp2", "headroom", "overflow_ratio"]
    middle = steps // 2 // 16 * 16 + 5
    window = {"first_step": middle, "last_step": middle + 499}
    asked: list[Callable[[], object]] = [
        lambda: reader.series(source.run_id, 700, fields, max_points=750),
        lambda: reader.series(source.run_id, 700, fields, max_points=500, **window),
        lambda: reader.heatmap(source.run_id, "overflow", max_columns=500),
        lambda: reader.top(source.run_id, last_steps=1000, limit=20, by="overflow"),
        reader.runs,
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
    ids = np.arange(slots)
    return Source(sources[0], run_id, run, 0, 1, 0, False, ids, np.zeros(slots, np.int8), np.full(slots, 8.0))


ROLES = ("input", "weight", "grad_output")


def add_small_runs(engine: sa.Engine) -> None:
    """A thousand runs of eight ranks that have some steps."""
    for number in range(RUNS):
        add_source(engine, f"run-{number}", 0, ranks=8)
    with engine.begin() as connection:
        ids = connection.scalars(sa.select(schema.source.c.id)).all()
        covered = [{"source_id": i, "first_step": 0, "rolled_step": 100, "pruned_step": 100} for i in ids]
        connection.execute(schema.coverage.insert(), covered)
        connection.execute(schema.source.update().values(last_step=99, rows=100))


def rollup_bytes(engine: sa.Engine) -> int:
    """Bytes of the packed arrays themselves."""
    with engine.connect() as connection:
        return int(connection.scalar(sa.select(sa.func.sum(sa.func.length(schema.rollup.c.data)))) or 0)


if __name__ == "__main__":
    main()
