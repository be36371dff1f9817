"""How the service itself does, read from the database: sources with their agents, drops and clocks, and its size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from fp8scope_collector.messages import run_label
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.overview import database_bytes
from fp8scope_collector.storage.readmodels import SourceState, SystemState

_MOST_SOURCES = 2000


def read_system(connection: sa.Connection) -> SystemState:
    """The database and its sources, the one heard from last first."""
    source, run = schema.source, schema.run
    drops: dict[int, dict[str, int]] = {}
    for source_id, reason, rows in connection.execute(sa.select(schema.drop)):
        drops.setdefault(source_id, {})[reason] = rows
    query = (
        sa.select(source, run.c.project, run.c.name)
        .join_from(source, run, run.c.id == source.c.run_id)
        .order_by(source.c.last_seen_unix_ns.desc(), source.c.id)
        .limit(_MOST_SOURCES)
    )
    sources = [
        SourceState(
            run=run_label(row.project, row.name),
            rank=row.rank,
            incarnation=row.incarnation,
            agent_version=row.agent_version,
            environment=_texts(row.environment_json),
            first_seen_unix_ns=row.first_seen_unix_ns,
            last_seen_unix_ns=row.last_seen_unix_ns,
            clock_skew_s=row.clock_skew_ns / 1e9,
            rows=row.rows,
            last_step=row.last_step,
            outcome=row.outcome or "",
            drops=drops.get(row.id, {}),
        )
        for row in connection.execute(query)
    ]
    version = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one()
    totals = connection.execute(
        sa.select(sa.func.count(), sa.cast(sa.func.coalesce(sa.func.sum(source.c.rows), 0), sa.BigInteger))
    ).one()
    return SystemState(connection.dialect.name, version, database_bytes(connection), *totals, tuple(sources))


def read_configuration(connection: sa.Connection, run_id: int) -> dict[str, str]:
    """What a run was started with, by name: its configuration, and `environment.` what its newest source ran on."""
    config = connection.execute(
        sa.select(schema.run.c.config_json).where(schema.run.c.id == run_id)
    ).scalar_one_or_none()
    source = schema.source.c
    newest = (
        sa.select(source.environment_json)
        .where(source.run_id == run_id)
        .order_by(source.incarnation.desc(), source.rank)
        .limit(1)
    )
    environment = connection.execute(newest).scalar_one_or_none()
    found = _texts(config or "")
    return found | {f"environment.{name}": value for name, value in _texts(environment or "").items()}


def _texts(written: str) -> dict[str, str]:
    """A JSON object as texts, nested names joined by dots; what is damaged is as good as absent."""
    try:
        parsed = json.loads(written or "{}")
    except ValueError:
        return {}
    return dict(_flat(parsed, "")) if isinstance(parsed, Mapping) else {}


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return found
