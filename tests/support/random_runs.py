"""Random runs with gaps, ranks and resumed lives, written straight into the tables, and each row of them to compare."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sqlalchemy as sa

from fp8core.formats import FORMATS
from fp8core.records import Role
from fp8scope_collector.storage import schema

SECOND = 10**9
NOW = 1_800_000_000 * SECOND
LAYERS = ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1")


@dataclass
class Recorded:
    """A run in the database and, for the reference, every row that was written: (rank, incarnation, step, slot)."""

    run_id: int
    formats: dict[tuple[int, int], str] = field(default_factory=dict)
    rows: dict[tuple[int, int, int, int], dict[str, float | None]] = field(default_factory=dict)

    def history(self, first_step: int = 0, last_step: int = 2**62) -> dict[tuple[int, int, int], list[Any]]:
        """(step, slot, rank) -> [row, largest value of its format], by the definition: newer lives own their range."""
        ends: dict[tuple[int, int], list[int]] = {}
        for rank, incarnation, step, _ in self.rows:
            ends.setdefault((rank, incarnation), []).append(step)
        found = {}
        for (rank, incarnation, step, slot), row in self.rows.items():
            newer = [steps for (r, i), steps in ends.items() if r == rank and i > incarnation]
            if first_step <= step <= last_step and not any(min(steps) <= step <= max(steps) for steps in newer):
                found[step, slot, rank] = [row, FORMATS[self.formats[incarnation, slot]].max]
        return found


def record(engine: sa.Engine, seed: int, *, name: str = "gpt", every: int = 1) -> Recorded:
    """A random run of 1 to 3 ranks and 1 to 3 incarnations that resume anywhere, with gaps and null fields."""
    rng = random.Random(seed)
    slots = [(layer, role) for layer in LAYERS for role in Role]
    with engine.begin() as connection:
        run_id = insert_run(connection, name)
        recorded = Recorded(run_id)
        for number, (layer, role) in enumerate(slots):
            insert_slot(connection, run_id, number, layer, role)
        start, stop = 0, rng.randrange(20, 90)
        incarnations = rng.choice([1, 2, 3])
        for incarnation in range(1, incarnations + 1):
            for number in range(len(slots)):
                form = rng.choice(["E4M3FN", "E5M2"])
                recorded.formats[incarnation, number] = form
                values = {"run_id": run_id, "incarnation": incarnation, "slot": number, "format": form}
                recipe = schema.slot_recipe.insert().values(**values, recipe="AmaxScaling()", margin=incarnation)
                connection.execute(recipe)
            for rank in range(rng.choice([1, 3])):
                source_id = insert_source(connection, run_id, rank, incarnation)
                rows = []
                for step in range(start, stop, every):
                    for number in range(len(slots)):
                        if rng.random() < 0.15:
                            continue
                        row = random_row(rng)
                        recorded.rows[rank, incarnation, step, number] = row
                        rows.append({"source_id": source_id, "step": step, "slot": number, **row})
                insert_rows(connection, source_id, rows)
            start = rng.randrange(0, stop)
            stop = start + rng.randrange(5, 60)
    return recorded


def random_row(rng: random.Random) -> dict[str, float | None]:
    """The fields of one row; here and there one is missing."""
    numel = rng.choice([256, 4096])
    scale = 2.0 ** rng.randrange(-6, 20)
    values: dict[str, float | None] = {
        "amax": float(np.float32(rng.choice([0.0, 10 ** rng.uniform(-6, 3)]))),
        "scale_min": scale,
        "scale_max": scale * rng.choice([1, 2]),
        "numel": numel,
        "zeros": rng.randrange(9),
        "overflow": rng.choice([0, 0, rng.randrange(numel)]),
        "underflow": rng.randrange(numel),
        "subnormal": rng.randrange(numel),
        "nonfinite": rng.choice([0, 0, 1]),
        "sum_sq": rng.random() + 1e-9,
        "err_sq": rng.random() * 1e-3,
    }
    return {name: None if rng.random() < 0.05 else value for name, value in values.items()}


def insert_run(connection: sa.Connection, name: str, **columns: Any) -> int:
    """Returns its id; it was made an hour before `NOW`."""
    values = {"project": "", "name": name, "created_unix_ns": NOW - 3600 * SECOND} | columns
    return int(connection.execute(schema.run.insert().values(**values)).inserted_primary_key[0])


def insert_slot(connection: sa.Connection, run_id: int, slot: int, layer: str, role: Role) -> None:
    """A tensor of a linear layer of 64 x 64."""
    size = {"module_class": "Fp8Linear", "in_features": 64, "out_features": 64}
    connection.execute(schema.slot.insert().values(run_id=run_id, slot=slot, layer=layer, role=role, **size))


def insert_source(connection: sa.Connection, run_id: int, rank: int = 0, incarnation: int = 1, **columns: Any) -> int:
    """Returns its id; it was seen five seconds before `NOW`."""
    values = {
        "run_id": run_id,
        "rank": rank,
        "incarnation": incarnation,
        "world_size": 3,
        "clock_skew_ns": 0,
        "source_uuid": f"{run_id}-{rank}-{incarnation}",
        "agent_version": "0.1.0",
        "environment_json": "{}",
        "started_unix_ns": NOW,
        "first_seen_unix_ns": NOW,
        "last_seen_unix_ns": NOW - 5 * SECOND,
    } | columns
    return int(connection.execute(schema.source.insert().values(**values)).inserted_primary_key[0])


def insert_rows(connection: sa.Connection, source_id: int, rows: list[dict[str, Any]]) -> None:
    """Rows of `source_id` that nothing has rolled up."""
    connection.execute(schema.stats.insert(), rows)
    steps = [row["step"] for row in rows]
    connection.execute(
        schema.coverage.insert().values(source_id=source_id, first_step=min(steps), rolled_step=0, pruned_step=0)
    )
    connection.execute(schema.source.update().where(schema.source.c.id == source_id).values(last_step=max(steps)))


def quantity_of(row: dict[str, Any], largest: float, quantity: str) -> tuple[float, float]:
    """(low, high) of one row of one rank, NaN where it has none."""
    nan = (math.nan, math.nan)
    if quantity == "scale_exp2":
        return tuple(math.log2(row[n]) if row[n] else math.nan for n in ("scale_min", "scale_max"))  # type: ignore[return-value]
    if quantity == "amax":
        return (row["amax"], row["amax"]) if row["amax"] is not None else nan
    if quantity == "headroom":
        scaled = (row["amax"] or 0) * (row["scale_max"] or 0)
        return (math.log2(largest / scaled),) * 2 if scaled else nan
    if quantity == "sqnr_db":
        known = row["sum_sq"] and row["err_sq"] is not None
        return (-10 * math.log10(row["err_sq"] / row["sum_sq"]),) * 2 if known else nan
    if row[quantity] is None or row["numel"] is None:
        return nan
    return (row[quantity] / row["numel"],) * 2
