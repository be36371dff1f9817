"""Stored runs as DataFrames: the same numbers as the reader's, under the names that people use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8scope_collector.decode import decode_open, decode_stats
from fp8scope_collector.limits import Limits
from fp8scope_collector.notebook import Database
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.writer import StatsWriter
from fp8scope_protos.v1 import telemetry_pb2 as pb


@pytest.fixture
def database(tmp_path: Path, wire: Any) -> Database:
    """Two runs: b records 4 steps more, has a layer less, and the double amax."""
    url = f"sqlite:///{tmp_path}/test.db"
    engine = open_engine(url)
    migrate(engine)
    writer = StatsWriter(engine)
    for name, slots, steps, factor in [("a", 9, 4, 1), ("b", 6, 8, 2)]:
        source = writer.register(decode_open(wire.open(name, slots=slots), Limits()), now_unix_ns=1)
        columns = wire.columns(0, slots=slots, steps=steps)
        columns["amax"] = columns["amax"] * np.float32(factor)
        scalars = [pb.Scalar(step=step, name="loss", value=9.0 - step) for step in range(steps)]
        writer.commit([decode_stats(wire.stats(1, columns, scalars=scalars), source, Limits())], now_unix_ns=1)
    engine.dispose()
    return Database(url)


def test_runs_and_tensors_are_called_by_their_names(database: Database) -> None:
    assert sorted(database.runs().index) == ["a", "b"]
    assert database.runs().loc["a", "rows"] == 36
    assert database.slots("b").loc[("blocks.1.fc", "grad_output"), "format"] == "E5M2"


def test_heat_map_and_series_have_the_readers_numbers(database: Database) -> None:
    heatmap = database.heatmap("a", "amax")
    series = database.series("a", "blocks.2.fc", "weight", ["amax", "numel"])

    assert heatmap.shape == (9, 4)
    assert heatmap.loc[("blocks.2.fc", "weight")].tolist() == [7.0, 71.0, 135.0, 199.0]
    assert series[("amax", "high")].tolist() == [7.0, 71.0, 135.0, 199.0]
    assert series[("numel", "low")].tolist() == [10, 74, 138, 202]
    with pytest.raises(KeyError):
        database.series("b", "blocks.2.fc", "weight")


def test_scalars_and_rows_are_whole(database: Database) -> None:
    assert database.scalars("b")["loss"].tolist() == [9.0 - step for step in range(8)]
    assert len(database.rows("a")) == 36
    assert set(database.rows("a")["layer"]) == {"blocks.0.fc", "blocks.1.fc", "blocks.2.fc"}


def test_comparing_takes_the_tensors_that_both_have_on_one_axis(database: Database) -> None:
    found = database.compare("a", "b", "amax")

    assert len(found) == 6
    assert found.columns.tolist() == list(range(8))
    assert found.loc[("blocks.1.fc", "weight")].tolist()[:4] == [4.0, 68.0, 132.0, 196.0]
    assert found[[4, 5, 6, 7]].isna().all().all()
