"""Each view on a recorded database, on empty and missing ones, and with names that try to be markup."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.reader import QUANTITIES

OpenApp = Callable[..., AppTest]
HOSTILE = '<img src=x onerror=alert(1)>**$\\text{x}$** :smile: [a](javascript:alert(1)) & "q" `c`'


def panels(app: AppTest) -> list[dict[str, Any]]:
    """What our component was told to show."""
    nodes = [node.proto for node in app.main if type(node).__name__ == "UnknownElement"]
    found = [proto for proto in nodes if type(proto).__name__ == "BidiComponent"]
    told = [json.loads(proto.json, parse_constant=pytest.fail) for proto in found]  # a browser's JSON has no NaN
    return [data | data["frame"]["is"] if data["kind"] == "chart" else data for data in told]


def panel(app: AppTest, kind: str) -> dict[str, Any]:
    return next(data for data in panels(app) if data["kind"] == kind)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Any:
    """No view may print a warning of streamlit's, deprecations included."""
    yield
    loud = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("streamlit")]
    without_server = ("missing ScriptRunContext", "No runtime found")
    assert [message for message in loud if not any(text in message for text in without_server)] == []


def test_list_shows_each_run_and_its_worst_tensor(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded)

    assert not app.exception
    rows = {row["cells"][1]["text"]: row for row in panel(app, "table")["rows"]}
    assert set(rows) == {"gpt", "empty", f"$text/{HOSTILE}"}
    assert [rows["gpt"]["cells"][i]["text"] for i in (2, 4)] == ["running", "39"]
    assert rows["gpt"]["cells"][-1]["text"] == "blocks.2.mlp.fc1"
    assert rows["gpt"]["cells"][-1]["sub"] == "grad_output, 1 % overflow"
    assert rows["empty"]["cells"][-1]["text"] == "no rows yet"
    assert rows["gpt"]["to"] == {"run": "gpt"}


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_run_shows_every_quantity(open_app: OpenApp, recorded: str, quantity: str) -> None:
    app = open_app(recorded, run="gpt", quantity=quantity)

    assert not app.exception
    chart = panel(app, "chart")
    facets = [trace for trace in chart["figure"]["traces"] if trace["type"] == "heatmap"]
    assert [trace["about"]["role"] for trace in facets] == ["input", "weight", "grad_output"]
    assert facets[0]["about"]["names"][:2] == ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"]
    assert chart["note"][0] == "every one of 40 steps"
    worst = panel(app, "table")["rows"][0]
    assert worst["cells"][0]["text"] == "blocks.2.mlp.fc1"
    assert (worst["cells"][1]["text"], worst["cells"][1]["sub"]) == ("1 %", "overflow")
    assert worst["cells"][1]["title"] == "since step 20"


def test_run_shows_what_the_address_asks_for(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded, run="gpt", role="weight", range="10-19", filter="blocks.1*")

    (facet,) = [trace for trace in panel(app, "chart")["figure"]["traces"] if trace["type"] == "heatmap"]
    assert facet["about"]["names"] == ["blocks.1.attn.qkv", "blocks.1.mlp.fc1"]
    assert panel(app, "chart")["arrays"][facet["x"]["$array"]]["shape"] == [10]
    assert panel(app, "chart")["view"] == [10, 19]


def test_filter_that_matches_nothing_says_so(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded, run="gpt", filter="lm_head")

    assert "No layer matches lm\\_head" in app.info[0].value


def test_tensor_shows_its_window_its_values_and_its_neighbours(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded, run="gpt", layer="blocks.2.mlp.fc1", role="grad_output", step="25")

    assert not app.exception
    header = panel(app, "header")
    assert [crumb["text"] for crumb in header["crumbs"]] == ["fp8scope", "runs", "gpt", "blocks.2.mlp.fc1"]
    assert [item["text"] for item in header["nav"]] == ["‹ blocks.2.attn.qkv"]
    facts = {row["cells"][0]["text"]: row["cells"][1]["text"] for row in panel(app, "table")["rows"]}
    assert facts["overflow"] == "41 = 1 %"
    assert facts["format"] == "E5M2, margin 0"
    assert panel(app, "table")["subtitle"] == "step 25"
    assert len([data for data in panels(app) if data["kind"] == "chart"]) == 3


@pytest.mark.parametrize("params", [{"run": "none"}, {"run": "gpt", "layer": "none"}])
def test_unknown_names_are_a_sentence(open_app: OpenApp, recorded: str, params: dict[str, str]) -> None:
    app = open_app(recorded, **params)

    assert not app.exception
    assert "none" in app.warning[0].value


def test_run_without_rows_says_when_they_will_appear(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded, run="empty")

    assert not app.exception
    assert "no rows yet" in app.info[0].value


def test_empty_database_says_how_to_record(open_app: OpenApp, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'empty.db'}"
    engine = open_engine(url)
    migrate(engine)
    engine.dispose()

    app = open_app(url)

    assert panel(app, "table")["rows"] == []
    assert "fp8scope_agent.attach" in panel(app, "table")["empty"]


def test_missing_database_says_how_to_start_one(open_app: OpenApp, tmp_path: Path) -> None:
    app = open_app(f"sqlite:///{tmp_path / 'none.db'}")

    assert not app.exception
    assert "does not exist" in app.error[0].value


@pytest.mark.parametrize("layer", ["", HOSTILE, "blocks.0.<b>x</b>"])
def test_hostile_names_never_reach_plotly_or_markdown_as_markup(open_app: OpenApp, recorded: str, layer: str) -> None:
    app = open_app(recorded, run=f"$text/{HOSTILE}", layer=layer)

    assert not app.exception
    assert panel(app, "header")["crumbs"][2]["text"] == f"$text/{HOSTILE}"
    for data in panels(app):
        layout = data.get("figure", {}).get("layout", {})
        written = [a["text"] for a in layout.get("annotations", [])]
        written += [
            tick for name, axis in layout.items() if name.startswith("yaxis") for tick in axis.get("ticktext", [])
        ]
        assert not [text for text in written if "<img" in text or "<b>x" in text]
    for message in [*app.info, *app.warning, *app.error, *app.markdown]:
        assert "<img" not in message.value.replace("\\<", "")


def test_nonsense_in_the_address_still_opens_the_view(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded, run="gpt", role="bias", quantity="x", range="9-3", step="-1", filter="[")

    assert not app.exception
    assert not app.error
