"""Every place that statistics can be in; a test that asks for `kept` runs on each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from fp8scope_collector.storage.engine import migrate, open_engine, open_stats
from fp8scope_collector.storage.stats_store import StatsStore
from fp8scope_collector.storage.writer import StatsWriter


@dataclass(frozen=True)
class Kept:
    """A relational database, the statistics' store beside or in it, and the writer of both."""

    engine: sa.Engine
    store: StatsStore
    writer: StatsWriter


@pytest.fixture(params=["sqlite", "postgresql"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    sqlite = request.param == "sqlite"
    engine = open_engine(f"sqlite:///{tmp_path}/test.db" if sqlite else request.getfixturevalue("postgres_url"))
    migrate(engine)
    store = open_stats(None, engine)
    store.migrate()
    yield Kept(engine, store, StatsWriter(engine, store))
    engine.dispose()
