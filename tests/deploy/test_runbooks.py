"""What the operator's pages tell people to type works: SQL, recipes, metrics, files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from fp8core.recipes import parse_recipe
from fp8scope_collector.storage.schema import metadata

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs/operations.md", ROOT / "docs/alerts.md", *sorted((ROOT / "docs/runbooks").glob("*.md"))]


def blocks(language: str) -> list[str]:
    pattern = re.compile(rf"^ *```{language}\n(.*?)^ *```", flags=re.MULTILINE | re.DOTALL)
    return [block for page in PAGES for block in pattern.findall(page.read_text())]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sa.Connection]:
    """One run with an overflow in step 4 and a NaN in step 6 of the layer `fc1`."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'runs.db'}")
    metadata.create_all(engine)
    source = {"id": 1, "run_id": 1, "rank": 0, "incarnation": 1, "source_uuid": "a", "world_size": 1}
    clocks = dict.fromkeys(["started_unix_ns", "first_seen_unix_ns", "last_seen_unix_ns", "clock_skew_ns"], 0)
    slot = {"run_id": 1, "role": "input", "module_class": "Fp8Linear", "in_features": 16, "out_features": 16}
    rows = [{"source_id": 1, "step": s, "slot": i, "numel": 1000} for s in range(10) for i in range(2)]
    for row in rows:
        row["overflow"] = 5 if (row["slot"], row["step"]) == (1, 4) else 0
        row["nonfinite"] = 1 if (row["slot"], row["step"]) == (1, 6) else 0
    inserts = {
        "run": [{"id": 1, "name": "gpt", "created_unix_ns": 0}],
        "source": [{**source, **clocks, "agent_version": "", "environment_json": "{}"}],
        "slot": [{**slot, "slot": 0, "layer": "fc0"}, {**slot, "slot": 1, "layer": "fc1"}],
        "stats": rows,
    }
    with engine.connect() as connection:
        for table, values in inserts.items():
            connection.execute(metadata.tables[table].insert(), values)
        yield connection


@pytest.mark.parametrize("query", [block for block in blocks("sql") if "SELECT slot.layer" in block])
def test_the_overflow_query_names_the_layer_its_share_and_the_first_step(query: str, database: sa.Connection) -> None:
    assert database.exec_driver_sql(query).all() == [("fc1", "input", 0.005, 4)]


@pytest.mark.parametrize("query", [block for block in blocks("sql") if "stats.nonfinite" in block])
def test_the_nonfinite_query_names_the_first_step_rank_and_layer(query: str, database: sa.Connection) -> None:
    assert database.exec_driver_sql(query).all() == [(6, 0, "fc1", "input", 1)]


def test_every_kind_of_query_is_covered_above() -> None:
    assert len(blocks("sql")) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_recipe_that_a_page_recommends_exists(page: Path) -> None:
    for recipe in re.findall(r"\b(\w+Scaling\([^)]*\))", page.read_text()):
        parse_recipe(recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_path_and_metric_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(r"\b(?:deploy|docs|tests|examples)/[\w./-]*\w", text)
    metrics = re.findall(r"\bfp8scope_(?!dashboard\b|runbooks\b|collector\b|agent\b|protos\b|reader\b)\w+", text)
    catalogue = (ROOT / "docs/metrics.md").read_text()

    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [name for name in metrics if f"`{name.removesuffix('_bucket')}`" not in catalogue] == []
