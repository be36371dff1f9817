"""Each view on a recorded database, on empty and missing ones, and with names that try to be markup."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.reader import QUANTITIES, Reader, StorageError
from fp8scope_dashboard import heatmaps, queries
from fp8scope_dashboard.charts import tensor
from fp8scope_dashboard.views import advice

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


def test_scales_have_a_panel_for_each_role_and_a_line_for_each_layer(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded, run="gpt", view="scales")

    assert not app.exception
    depth, steps, layers, everything = [data for data in panels(app) if data["kind"] == "chart"]
    assert [trace["about"]["names"] for trace in depth["figure"]["traces"][:2]] == [
        [f"blocks.{block}.attn.qkv" for block in range(3)],
        [f"blocks.{block}.mlp.fc1" for block in range(3)],
    ]
    assert len(steps["figure"]["traces"]) == 18  # 3 blocks x 2 types x 3 roles
    assert sum(trace["type"] == "heatmap" for trace in layers["figure"]["traces"]) == 3
    assert [trace["type"] for trace in everything["figure"]["traces"]] == ["bar"] * 3


def test_compare_says_where_runs_begin_to_differ_and_what_they_were_told(
    open_app: OpenApp, tmp_path: Path, record: Callable[..., int], change: Callable[..., None]
) -> None:
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    engine = open_engine(url)
    migrate(engine)
    layers = ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    record(engine, "a", layers)
    changed = record(engine, "b", layers)
    change(engine, changed, slot=4, first_step=17, scale=2.0**20)
    engine.dispose()

    app = open_app(url, view="compare", runs="a,b")

    assert not app.exception
    runs, settings = [data for data in panels(app) if data["kind"] == "table" and data["rows"]]
    begins = runs["rows"][1]["cells"][3]
    assert begins["text"] == "step 17: blocks.1.mlp.fc1"
    assert begins["sub"].startswith("weight, 2²⁰ against 2")
    assert begins["to"]["step"] == "17"
    assert [cell["text"] for cell in settings["rows"][0]["cells"]] == ["recipe", "a", "b"]
    facets = [t for data in panels(app) if data["kind"] == "chart" for t in data["figure"]["traces"] if "z" in t]
    assert [trace["about"]["role"] for trace in facets] == ["input", "weight", "grad_output"]


def test_one_run_to_compare_asks_for_others(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded, view="compare", runs="gpt,gone")

    assert not app.exception
    assert "gone" in app.warning[0].value
    table = panel(app, "table")
    assert table["title"] == "compare gpt with"
    assert {"view": "compare", "runs": "gpt,empty"} in [row["to"] for row in table["rows"]]


def test_findings_of_many_tensors_are_one_line_and_are_acknowledged_together(
    open_app: OpenApp, tmp_path: Path, record: Callable[..., int], find: Callable[..., None]
) -> None:
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    engine = open_engine(url)
    migrate(engine)
    record(engine, "gpt", [f"blocks.{b}.fc" for b in range(5)])
    for slot in range(0, 15, 3):
        find(engine, 1, slot=slot, severity="critical")
    find(engine, 1, slot=-1, severity="info", rule="loss-spike")
    engine.dispose()

    app = open_app(url, view="findings")

    assert not app.exception
    many, alone = panel(app, "findings")["entries"]
    assert many["tensor"]["count"] == "5 layers"
    assert [member["text"] for member in many["members"]] == [f"blocks.{b}.fc" for b in range(5)]
    assert alone["tensor"] == {"layer": "the whole run"}
    assert queries.acknowledge(many["ids"], by="ada", reason="known") == ""
    assert queries.acknowledge([99], by="ada", reason="known").startswith("finding 99 is unknown")
    seen = open_app(url, view="findings", show="acknowledged")
    assert panel(seen, "findings")["entries"][0]["seen"]["by"] == "ada"
    assert panel(open_app(url), "table")["rows"][0]["cells"][3]["marks"] == [{"dot": "info", "text": "1"}]
    assert panel(open_app(url, run="gpt"), "findings")["entries"][0]["severity"] == "info"


def test_a_run_that_nobody_diagnosed_is_not_called_healthy(
    open_app: OpenApp, tmp_path: Path, record: Callable[..., int]
) -> None:
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    engine = open_engine(url)
    migrate(engine)
    record(engine, "gpt", ["blocks.0.fc"])
    before = panel(open_app(url, run="gpt"), "findings")["empty"]
    st.cache_resource.clear()
    with engine.begin() as connection:
        values = {"run_id": 1, "step": 39, "rows": 40, "sources_json": "{}", "updated_unix_ns": 0}
        connection.execute(schema.judged.insert().values(**values))
    engine.dispose()

    after = panel(open_app(url, run="gpt"), "findings")["empty"]

    assert before.startswith("Not diagnosed: ")
    assert before.endswith(f"fp8scope diagnose gpt --db {url}")
    assert after == "No open findings up to step 39."


def test_a_tensor_of_several_ranks_shows_them_apart(
    open_app: OpenApp, tmp_path: Path, record: Callable[..., int]
) -> None:
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    engine = open_engine(url)
    migrate(engine)
    record(engine, "gpt", ["blocks.0.fc"], ranks=2)
    engine.dispose()

    app = open_app(url, run="gpt", layer="blocks.0.fc", role="input")

    assert not app.exception
    title = next(data for data in panels(app) if data.get("title") == "2 ranks")
    assert title["subtitle"] == (
        "rank 1 is the largest everywhere; rank 0 is the smallest everywhere; farthest apart at step 0: 1 bit"
    )
    drawn = [data for data in panels(app) if data["kind"] == "chart"]
    names = [trace["about"]["name"] for trace in drawn[1]["figure"]["traces"]]
    assert names == ["smallest", "largest", "rank 0", "rank 1", "spread"]


def test_scales_say_which_constants_would_do(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded, run="gpt", view="scales")

    assert not app.exception
    rows = next(data for data in panels(app) if data.get("columns", [{}, {}])[1].get("text") == "a constant scale")[
        "rows"
    ]
    assert [row["cells"][0]["text"] for row in rows] == ["input", "weight", "grad_output", "all roles"]
    constant, refresh = queries.advice(next(run for run in queries.runs() if run.name == "gpt"))
    assert rows[0]["cells"][2]["text"] == constant[0].lower.tensor
    assert rows[0]["cells"][5]["text"] == f"{refresh[0].interval} step" + "s" * (refresh[0].interval > 1)


def test_a_very_long_run_is_advised_on_the_command_line(
    open_app: OpenApp, recorded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "MOST_ROWS", 100)

    app = open_app(recorded, run="gpt", view="scales")

    assert (
        app.caption[0].value
        == f"That reads all 720 rows, which is for the command line: `fp8scope advise gpt --db {recorded}`"
    )


def test_system_shows_the_database_and_each_agent(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded, view="system")

    assert not app.exception
    agents = next(data for data in panels(app) if data.get("title") == "agents")
    assert {row["cells"][0]["text"] for row in agents["rows"]} == {"gpt", "empty", f"$text/{HOSTILE}"}
    database = next(data for data in panels(app) if data.get("title") == "database")
    assert database["rows"][3]["cells"][1]["text"] == "sqlite"


def test_settings_show_no_password(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded, view="settings")

    assert not app.exception
    facts = {row["cells"][0]["text"]: row["cells"][1]["text"] for row in panel(app, "table")["rows"]}
    assert facts["database"] == recorded
    assert Reader.url.fget is not None
    with pytest.raises(StorageError) as refused:
        Reader("postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("filter", "sort", "shown"),
    [
        ("", "run", ["$text", "empty", "gpt"]),
        ("", "-run", ["gpt", "empty", "$text"]),
        ("state:running gp", "", ["gpt"]),
        ("tag:none", "", []),
        ("", "rows", ["gpt", "$text", "empty"]),
    ],
)
def test_runs_are_filtered_and_sorted(
    open_app: OpenApp, recorded: str, filter: str, sort: str, shown: list[str]
) -> None:
    app = open_app(recorded, filter=filter, sort=sort)

    assert not app.exception
    names = [row["cells"][1]["text"].split("/")[0] for row in panel(app, "table")["rows"]]
    assert names == shown


def test_ticked_runs_can_be_compared(open_app: OpenApp, recorded: str) -> None:
    one = panel(open_app(recorded, runs="gpt"), "table")
    two = panel(open_app(recorded, runs="gpt,empty"), "table")

    assert one["actions"][0]["text"] == "tick another run to compare"
    assert two["actions"][0] == {"text": "compare 2 runs", "to": {"view": "compare", "runs": "gpt,empty"}, "main": True}


def test_a_regular_expression_that_is_none_is_a_sentence(open_app: OpenApp, recorded: str) -> None:
    app = open_app(recorded, run="gpt", filter="/(/")

    assert not app.exception
    assert "not a regular expression" in app.info[0].value


@pytest.fixture
def growing(tmp_path: Path, record: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of 100 steps and a function that appends steps to it; the views read its database."""
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    engine = open_engine(url)
    migrate(engine)
    source = record(engine, "gpt", ["blocks.0.fc", "blocks.1.fc"], steps=100)
    monkeypatch.setenv("FP8SCOPE_DB", url)
    yield url, engine, source
    engine.dispose()


def test_a_live_heat_map_is_what_reading_all_of_it_gives(
    growing: Any, append: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, engine, source = growing
    monkeypatch.setattr("fp8scope_dashboard.charts.panels.MAX_COLUMNS", 20)
    live = heatmaps.LiveHeatMaps(1, ("scale_exp2", "overflow"), 0, None)
    live.read()

    for steps in (range(100, 103), range(103, 131)):
        append(engine, source, 6, steps)
        live._read_at = 0.0
        found = live.read()

    assert found["overflow"].width == 8
    for whole in Reader(url).heatmaps(1, ("scale_exp2", "overflow"), width=8):
        np.testing.assert_array_equal(found[whole.quantity].low, whole.low)
        np.testing.assert_array_equal(found[whole.quantity].high, whole.high)


def test_a_live_curve_has_every_step_once_and_all_extremes(growing: Any, append: Callable[..., None]) -> None:
    url, engine, source = growing
    append(engine, source, 6, range(100, 230))

    found = queries.series(Reader(url).run("gpt"), 5, 0, 229)

    whole = Reader(url).series(1, 5, tensor.FIELDS, max_points=1000)
    assert int(found.count.sum()) == 230
    assert (np.diff(found.step) > 0).all()
    for name in tensor.FIELDS:
        assert np.nanmax(found.high[name]) == np.nanmax(whole.high[name])
        assert np.nanmin(found.low[name]) == np.nanmin(whole.low[name])
