"""A small recorded database for the views: one run with losses, one empty, one with names that try to be markup."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import streamlit as st
from streamlit.testing.v1 import AppTest

from fp8core.records import FIELDS, Role
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import migrate, open_engine

APP = Path(__file__).parents[2] / "dashboard" / "fp8scope_dashboard" / "app.py"
HOSTILE = '<img src=x onerror=alert(1)>**$\\text{x}$** :smile: [a](javascript:alert(1)) & "q" `c`'
STEPS = 40


def stored(
    engine: sa.Engine, name: str, layers: list[str], *, steps: int = STEPS, project: str = "", ranks: int = 1
) -> int:
    """A run whose last layer's grad_output overflows from step 20 on, with a NaN loss and a null field.

    The id of its first rank's source; rank r has 2**r times the amax of rank 0.
    """
    now = time.time_ns()
    with engine.begin() as connection:
        values: dict[str, Any] = {"project": project, "name": name, "created_unix_ns": now - 10**12}
        values["config_json"] = json.dumps({"recipe": name, "lr": 0.001})
        run_id = connection.execute(schema.run.insert().values(**values)).inserted_primary_key[0]
        sources = []
        for rank in range(ranks):
            source = {
                "run_id": run_id,
                "rank": rank,
                "incarnation": 1,
                "source_uuid": f"{project}/{name}/{rank}",
                "world_size": ranks,
                "started_unix_ns": now,
                "first_seen_unix_ns": now,
                "last_seen_unix_ns": now + 3600 * 10**9,  # slow tests do not make it stale
                "clock_skew_ns": 0,
                "agent_version": "0.1.0",
                "environment_json": "{}",
            }
            sources.append(connection.execute(schema.source.insert().values(**source)).inserted_primary_key[0])
        for number, (layer, role) in enumerate((layer, role) for layer in layers for role in Role):
            key = {"run_id": run_id, "slot": number}
            shape = {"module_class": "Fp8Linear", "in_features": 64, "out_features": 64}
            connection.execute(schema.slot.insert().values(**key, layer=layer, role=role, **shape))
            form = "E5M2" if role == Role.GRAD_OUTPUT else "E4M3FN"
            recipe = {"incarnation": 1, "format": form, "recipe": "AmaxScaling()", "margin": 0}
            connection.execute(schema.slot_recipe.insert().values(**key, **recipe))
        for source_id in sources if steps else ():
            connection.execute(
                schema.coverage.insert().values(source_id=source_id, first_step=0, rolled_step=0, pruned_step=0)
            )
    for rank, source_id in enumerate(sources):
        written(engine, source_id, 3 * len(layers), range(steps), times=2.0**rank)
    return int(sources[0])


def written(engine: sa.Engine, source_id: int, slots: int, steps: range, *, times: float = 1.0) -> None:
    """Rows and scalars of these steps, as the collector would write them."""
    rows = []
    for step in steps:
        for slot in range(slots):
            amax = times * 2.0 ** (3 * math.sin(step / 9 + slot))
            scale = 2.0 ** (8 - round(3 * math.sin(step / 9 + slot)))
            row = {field.name: 0.0 if field.dtype != "uint64" else 0 for field in FIELDS}
            row |= {"amax": amax, "scale_min": scale, "scale_max": scale, "numel": 4096, "underflow": slot}
            row |= {"sum_sq": 40.0 * amax, "err_sq": None if slot == 1 else 0.02 * amax}
            row["overflow"] = 41 if slot == slots - 1 and step >= 20 else 0
            rows.append({"source_id": source_id, "step": step, "slot": slot, **row})
    with engine.begin() as connection:
        if rows:
            connection.execute(schema.stats.insert(), rows)
            loss = [
                {"source_id": source_id, "name": "loss", "step": s, "value": None if s == 7 else 9 - s / 9}
                for s in steps
            ]
            connection.execute(schema.scalar.insert(), loss)
        source = schema.source.c
        news = {"rows": source.rows + len(rows), "last_seen_unix_ns": time.time_ns() + 3600 * 10**9}
        if rows:
            news["last_step"] = steps[-1]
        connection.execute(schema.source.update().where(source.id == source_id).values(**news))


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the recorded database; nobody writes to it."""
    url = f"sqlite:///{tmp_path_factory.mktemp('dashboard') / 'runs.db'}"
    engine = open_engine(url)
    migrate(engine)
    stored(engine, "gpt", [f"blocks.{b}.{leaf}" for b in range(3) for leaf in ("attn.qkv", "mlp.fc1")])
    stored(engine, "empty", ["lm_head"], steps=0)
    stored(engine, HOSTILE, [HOSTILE, "blocks.0.<b>x</b>"], project="$text")
    engine.dispose()
    return url


@pytest.fixture
def open_app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., AppTest]]:
    """A function: the app after its first run on a database, at an address given by query parameters."""

    def run(url: str, **params: str) -> AppTest:
        monkeypatch.setenv("FP8SCOPE_DB", url)
        app = AppTest.from_file(str(APP), default_timeout=60)
        for name, value in params.items():
            app.query_params[name] = value
        return app.run()

    yield run
    st.cache_data.clear()
    st.cache_resource.clear()


@pytest.fixture
def record() -> Callable[..., int]:
    """A function: a run in a database; the id of its source."""
    return stored


@pytest.fixture
def append() -> Callable[..., None]:
    """A function: rows of further steps of a source."""
    return written


@pytest.fixture
def change() -> Callable[..., None]:
    """A function: gives a slot of a source another scale from a step on."""

    def change(engine: sa.Engine, source_id: int, *, slot: int, first_step: int, scale: float) -> None:
        rows = schema.stats.c
        here = sa.and_(rows.source_id == source_id, rows.slot == slot, rows.step >= first_step)
        with engine.begin() as connection:
            connection.execute(schema.stats.update().where(here).values(scale_min=scale, scale_max=scale))

    return change


@pytest.fixture
def find() -> Callable[..., None]:
    """A function: stores an open finding."""

    def find(engine: sa.Engine, run_id: int, *, slot: int, severity: str, rule: str = "overflow") -> None:
        texts = dict.fromkeys(("says", "evidence", "cause", "remedy", "change"), "it clips")
        numbers = dict.fromkeys(("first_step", "last_step", "first_row", "last_row", "rows", "worst_step"), 3)
        times = {"opened_unix_ns": time.time_ns(), "updated_unix_ns": time.time_ns()}
        values = {"run_id": run_id, "slot": slot, "severity": severity, "rule": rule, **texts, **numbers, **times}
        with engine.begin() as connection:
            connection.execute(schema.finding.insert().values(**values, ranks_json="[0]", numbers_json="{}", note=""))

    return find
