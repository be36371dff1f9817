"""Every place that statistics can be in; a test that asks for `kept` runs on each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

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


SERVER = os.environ.get("FP8SCOPE_CLICKHOUSE_URL")  # clickhouse://USER:PASSWORD@HOST:8123/AN_EMPTY_DATABASE


@pytest.fixture(params=["sqlite", "postgresql", "chdb", *(["clickhouse"] if SERVER else [])])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    url = f"sqlite:///{tmp_path}/test.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    if request.param == "chdb":
        url += f"?stats=chdb:///{tmp_path}/stats"
    if request.param == "clickhouse":
        url += f"?stats={quote(str(SERVER))}"
    engine = open_engine(url)
    migrate(engine)
    store = open_stats(engine)
    store.migrate()
    yield Kept(engine, store, StatsWriter(engine, store))
    store.close()
    engine.dispose()
