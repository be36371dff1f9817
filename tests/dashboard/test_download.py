"""Files of what a view shows: parsed back, they have the numbers that the reader gives."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from fp8scope_collector.export import table_bytes
from fp8scope_collector.storage.reader import Reader
from fp8scope_dashboard import download, queries
from fp8scope_dashboard.charts import tensor

HOSTILE = '<img src=x onerror=alert(1)>**$\\text{x}$** :smile: [a](javascript:alert(1)) & "q" `c`'


@pytest.fixture
def client(recorded: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("FP8SCOPE_DB", recorded)
    with TestClient(Starlette(routes=list(download.routes()))) as client:
        yield client
    queries._reader(recorded).close()


@pytest.fixture
def reader(recorded: str) -> Iterator[Reader]:
    reader = Reader(recorded)
    yield reader
    reader.close()


def test_a_heat_map_comes_as_csv_with_one_row_for_each_layer_and_column(client: TestClient, reader: Reader) -> None:
    answer = client.get("/download.csv", params={"run": "gpt", "quantity": "amax", "role": "weight", "range": "10-19"})

    assert answer.status_code == 200
    assert answer.headers["content-disposition"].startswith('attachment; filename="gpt-amax.csv"')
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    slots = {slot.slot: slot.layer for slot in reader.slots(reader.run("gpt").id)}
    expected = reader.heatmap(reader.run("gpt").id, "amax", roles=["weight"], first_step=10, last_step=19)
    want = {
        (slots[number], step): value
        for number, line in zip(expected.slots.tolist(), expected.high.tolist(), strict=True)
        for step, value in zip(expected.steps.tolist(), line, strict=True)
    }
    assert {(row["layer"], int(row["step"])): float(row["amax_max"]) for row in rows} == want
    assert {row["role"] for row in rows} == {"weight"}


def test_a_tensor_comes_as_parquet_with_every_field(client: TestClient, reader: Reader) -> None:
    answer = client.get("/download.parquet", params={"run": "gpt", "layer": "blocks.2.mlp.fc1", "role": "grad_output"})

    table = pq.read_table(io.BytesIO(answer.content))
    slots = reader.slots(reader.run("gpt").id)
    slot = next(slot for slot in slots if (slot.layer, slot.role) == ("blocks.2.mlp.fc1", "grad_output"))
    series = reader.series(reader.run("gpt").id, slot.slot, tensor.FIELDS)
    assert table["step"].to_pylist() == series.step.tolist()
    for field in tensor.FIELDS:
        np.testing.assert_array_equal(table[f"{field}_max"].to_numpy(), series.high[field])


def test_a_layer_named_like_a_formula_is_text_to_a_spreadsheet() -> None:
    table = pa.table({"layer": ["=HYPERLINK(A1)", "@x", "blocks.0"]})

    assert table_bytes(table, "csv").decode().splitlines()[1:] == ['"\'=HYPERLINK(A1)"', '"\'@x"', '"blocks.0"']


def test_the_list_of_runs_comes_with_hostile_names_as_text(client: TestClient) -> None:
    answer = client.get("/download.csv")

    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert {row["run"] for row in rows} == {"gpt", "empty", f"$text/{HOSTILE}"}
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"run": "none"}, "run 'none' is unknown"),
        ({"run": "gpt", "layer": "none"}, "layer 'none' is not in run 'gpt'"),
        ({"run": "gpt", "range": "900-999"}, "no rows of these layers"),
        ({"run": "gpt", "layer": "blocks.2.mlp.fc1", "range": "900-999"}, "no rows in this range"),
    ],
)
def test_what_is_not_there_is_a_sentence(client: TestClient, params: dict[str, str], said: str) -> None:
    answer = client.get("/download.csv", params=params)

    assert answer.status_code == 404
    assert said in answer.text


def test_a_database_that_cannot_be_read_is_a_sentence(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8SCOPE_DB", "sqlite:////nowhere/runs.db")

    answer = client.get("/download.csv", params={"run": "gpt"})

    assert answer.status_code == 503
    assert "does not exist" in answer.text
