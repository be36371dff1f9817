"""docs/storage.md describes the tables that there are, and its queries run."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fp8scope_collector.decode import decode_open, decode_stats
from fp8scope_collector.limits import Limits
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.schema import metadata
from fp8scope_collector.storage.writer import StatsWriter
from fp8scope_protos.v1 import telemetry_pb2 as pb

DOCUMENT = Path(__file__).parents[2] / "docs" / "storage.md"
QUERIES = re.findall(r"```sql\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def test_every_column_is_described_and_no_other() -> None:
    described: dict[str, set[str]] = {}
    for section in re.findall(r"^### (\w+)\n(.*?)(?=^##)", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE):
        cells = re.findall(r"^\| (`.*?) \|", section[1], re.MULTILINE)
        described[section[0]] = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}

    assert described == {table.name: {column.name for column in table.c} for table in metadata.tables.values()}


def test_the_queries_answer(database_url: str, wire: Any) -> None:
    engine = open_engine(database_url)
    migrate(engine)
    writer = StatsWriter(engine)
    source = writer.register(decode_open(wire.open("gpt-fp8"), Limits()), now_unix_ns=1)
    scalars = [pb.Scalar(step=1000, name="loss", value=2.5)]
    drops = [pb.Drop(reason="ring_full", rows=3)]
    for seq, step in [(1, 100), (2, 1000)]:
        message = wire.stats(seq, wire.columns(step), scalars=scalars, drops=drops)
        writer.commit([decode_stats(message, source, Limits())], now_unix_ns=1)

    answers = []
    with engine.begin() as connection:
        for query in QUERIES:
            for statement in query.split(";"):
                if statement.strip():
                    result = connection.execute(sa.text(statement))
                    answers.append(len(result.all()) if result.returns_rows else result.rowcount)

        left = [
            connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for table in metadata.sorted_tables
            if table.name != "audit"  # which remembers what is gone
        ]

    assert answers == [1, 6, 1, 1, 0, 1, 12, 1]
    assert left == [0] * len(left), "deleting a run leaves nothing"
    engine.dispose()


@pytest.mark.parametrize("field", ["message_bytes", "columns_bytes", "rows", "slots", "name_chars", "layer_chars"])
def test_the_limits_are_those_of_the_code(field: str) -> None:
    value = {each.name: each.default for each in fields(Limits)}[field]
    assert isinstance(value, int)
    written = f"{value >> 20} MiB" if value >= 1 << 20 else f"{value:,}"

    assert written in DOCUMENT.read_text()
