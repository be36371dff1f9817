"""The dashboard in a real browser: its views by clicks and by address, and a run that grows while one looks.

Everything is checked in one browser and on one server, since starting them costs more than all the rest.
"""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from playwright.sync_api import Browser, Page, WebSocketRoute, expect, sync_playwright
from streamlit.proto.BackMsg_pb2 import BackMsg

from fp8core.records import FIELDS, Role
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import migrate, open_engine

LAYERS = [f"blocks.{block}.{leaf}" for block in range(4) for leaf in ("attn.qkv", "mlp.fc1")]
HOSTILE = "<img src=x onerror=document.title='owned'>"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


class Recording:
    """A run in the database that can grow."""

    def __init__(self, engine: sa.Engine, name: str) -> None:
        self.engine, self.steps = engine, 0
        now = time.time_ns()
        with engine.begin() as connection:
            run = schema.run.insert().values(name=name, created_unix_ns=now)
            run_id = connection.execute(run).inserted_primary_key[0]
            source = {
                "run_id": run_id,
                "rank": 0,
                "incarnation": 1,
                "source_uuid": name,
                "world_size": 1,
                "rows": 0,
                "started_unix_ns": now,
                "first_seen_unix_ns": now,
                "last_seen_unix_ns": now,
                "clock_skew_ns": 0,
                "agent_version": "0.1.0",
                "environment_json": "{}",
            }
            self.source_id = connection.execute(schema.source.insert().values(**source)).inserted_primary_key[0]
            covered = {"source_id": self.source_id, "first_step": 0, "rolled_step": 0, "pruned_step": 0}
            connection.execute(schema.coverage.insert().values(**covered))
            for slot, (layer, role) in enumerate((layer, role) for layer in [*LAYERS, name] for role in Role):
                key = {"run_id": run_id, "slot": slot}
                shape = {"module_class": "Fp8Linear", "in_features": 64, "out_features": 64}
                connection.execute(schema.slot.insert().values(**key, layer=layer, role=role, **shape))
                recipe = {"incarnation": 1, "format": "E4M3FN", "recipe": "AmaxScaling()", "margin": 0}
                connection.execute(schema.slot_recipe.insert().values(**key, **recipe))

    def grow(self, steps: int) -> None:
        """Records further steps."""
        rows, losses = [], []
        for step in range(self.steps, self.steps + steps):
            losses.append({"source_id": self.source_id, "name": "loss", "step": step, "value": 9 - math.log(step + 1)})
            for slot in range(3 * len(LAYERS) + 3):
                exponent = round(3 * math.sin(step / 30 + slot))
                row: dict[str, Any] = {field.name: 0 for field in FIELDS}
                row |= {"amax": 2.0**exponent, "scale_min": 2.0 ** (8 - exponent), "scale_max": 2.0 ** (8 - exponent)}
                row |= {"numel": 4096, "underflow": slot, "sum_sq": 1.0, "err_sq": 0.001}
                rows.append({"source_id": self.source_id, "step": step, "slot": slot, **row})
        with self.engine.begin() as connection:
            connection.execute(schema.stats.insert(), rows)
            connection.execute(schema.scalar.insert(), losses)
            source = schema.source.c
            self.steps += steps
            news = {"rows": source.rows + len(rows), "last_seen_unix_ns": time.time_ns(), "last_step": self.steps - 1}
            connection.execute(schema.source.update().where(source.id == self.source_id).values(**news))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    engine = open_engine(f"sqlite:///{tmp_path_factory.mktemp('browser') / 'runs.db'}")
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def recording(database: sa.Engine) -> Recording:
    recording = Recording(database, "gpt")
    recording.grow(120)
    Recording(database, "other").grow(30)
    Recording(database, HOSTILE).grow(12)
    return recording


@pytest.fixture(scope="module")
def server(database: sa.Engine, recording: Recording) -> Iterator[str]:
    """The address of a running dashboard."""
    command = [sys.executable, "-m", "fp8scope_dashboard", "--db", str(database.url), "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("fp8scope dashboard: http://127.0.0.1:")
        yield line.split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - started < 3, "SIGTERM took longer than two seconds and the machine's slowness"


@pytest.fixture(scope="module")
def browser(require_binary: Callable[[str], Path]) -> Iterator[Browser]:
    path = require_binary("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*ARGUMENTS, "--no-first-run"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a fresh context; the test fails if its console shows an error."""
    context = browser.new_context(viewport={"width": 1400, "height": 1300})
    context.set_default_timeout(30_000)
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


def parameters(page: Page) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def drawn(page: Page) -> None:
    """Waits for the first chart."""
    expect(page.locator("[data-version]").first).to_be_visible(timeout=30_000)


def cell(page: Page, facet: int, x: float, y: float) -> tuple[float, float]:
    """The place of a heat map's cell on the screen; facets are the lowest panels of the chart."""
    place = page.locator(".fs-plot").first.locator(".nsewdrag").nth(facet)
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    assert box is not None
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def test_from_the_list_to_a_tensor_and_back(page: Page, server: str) -> None:
    page.goto(server)
    page.locator(".fs-row .fs-main a", has_text="gpt").click()
    drawn(page)
    assert parameters(page) == {"run": "gpt"}

    page.mouse.click(*cell(page, 3, 0.5, 0.5))  # loss, input, weight, grad_output
    expect(page.locator(".fs-facts")).to_be_visible()
    where = parameters(page)
    assert where["layer"] in LAYERS
    assert where["role"] == "grad_output"
    assert 55 <= int(where["step"]) <= 65
    expect(page.locator(".fs-crumbs")).to_contain_text(where["layer"])

    neighbour = page.locator(".fs-nav a").first
    layer = (neighbour.text_content() or "").strip("‹› ")
    neighbour.click()
    expect(page.locator(".fs-crumbs")).to_contain_text(layer)
    page.go_back()
    expect(page.locator(".fs-crumbs")).to_contain_text(where["layer"])
    page.go_back()
    expect(page.locator(".fs-title", has_text="worst tensors")).to_be_visible()
    assert parameters(page) == {"run": "gpt"}
    page.go_back()
    expect(page.locator(".fs-row").first).to_be_visible()
    assert parameters(page) == {}


def test_runs_that_are_ticked_are_compared_and_a_cell_shows_its_tensor_in_all(page: Page, server: str) -> None:
    page.goto(server)
    page.get_by_role("checkbox", name="compare gpt").click()
    page.wait_for_url("**runs=gpt*")
    page.get_by_role("checkbox", name="compare other").click()
    page.get_by_role("link", name="compare 2 runs").click()
    drawn(page)
    page.wait_for_function("document.querySelectorAll('[data-version]').length >= 3")
    assert parameters(page) == {"view": "compare", "runs": "gpt,other"}
    expect(page.locator("tr.fs-here")).to_contain_text("nowhere")

    place = page.locator(".fs-plot").nth(1).locator(".nsewdrag").nth(1)
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.9)  # where both have rows
    page.wait_for_url("**layer=*")
    expect(page.locator(".fs-title", has_text=f"weight of {parameters(page)['layer']}")).to_be_visible()
    page.go_back()
    page.wait_for_url(lambda url: "layer" not in url)


def test_what_a_chart_shows_is_downloaded_as_numbers_and_as_a_picture(page: Page, server: str, tmp_path: Path) -> None:
    page.goto(f"{server}/?run=gpt&quantity=amax&role=weight&range=10-19")
    drawn(page)

    with page.expect_download() as numbers:
        page.get_by_role("link", name="CSV").click()
    with page.expect_download() as table:
        page.get_by_role("link", name="Parquet").click()
    with page.expect_download() as picture:
        page.get_by_role("button", name="PNG").click()

    for download in (numbers, table, picture):
        download.value.save_as(tmp_path / download.value.suggested_filename)
    rows = list(csv.DictReader((tmp_path / "gpt-amax.csv").read_text().splitlines()))
    assert {row["role"] for row in rows} == {"weight"}
    assert {int(row["step"]) for row in rows} == set(range(10, 20))
    assert pq.read_table(tmp_path / "gpt-amax.parquet").num_rows == len(rows)
    png = (tmp_path / "fp8scope.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") > 1500  # twice the pixels of the chart


@pytest.mark.parametrize(
    ("address", "words"),
    [("?view=scales&run=gpt", "over depth"), ("?view=system", "agents"), ("?view=findings", "findings")],
)
def test_every_view_has_an_address_that_opens_in_a_new_browser(
    page: Page, server: str, address: str, words: str
) -> None:
    page.goto(f"{server}/{address}")

    expect(page.locator(".fs-title", has_text=words).first).to_be_visible()
    expect(page.locator(".fs-tabs [aria-current=page]")).to_contain_text(address.split("view=")[1].split("&")[0])


def test_the_list_can_be_used_with_the_keyboard_alone(page: Page, server: str) -> None:
    page.goto(server)
    run = page.locator(".fs-row .fs-main a", has_text="other")
    expect(run).to_be_visible()

    run.focus()
    page.wait_for_timeout(2500)  # the list is drawn anew beneath the focus
    assert page.evaluate("document.activeElement.textContent") == "other"
    page.keyboard.press("Enter")

    page.wait_for_url("**run=other*")
    drawn(page)


def test_a_range_drawn_in_the_chart_is_in_the_address_and_a_double_click_takes_it_away(page: Page, server: str) -> None:
    page.goto(f"{server}/?run=gpt&role=input")
    drawn(page)

    page.mouse.move(*cell(page, 1, 0.25, 0.3))
    page.mouse.down()
    page.mouse.move(*cell(page, 1, 0.5, 0.4), steps=4)
    page.mouse.up()
    page.wait_for_url("**range=*")
    first, last = (int(step) for step in parameters(page)["range"].split("-"))
    assert (27 <= first <= 33, 57 <= last <= 63) == (True, True)
    expect(page.locator(".fs-note").first).to_contain_text(f"every one of {last - first + 1} steps")

    page.mouse.dblclick(*cell(page, 1, 0.5, 0.5))
    page.wait_for_url(lambda url: "range" not in url)
    assert parameters(page) == {"run": "gpt", "role": "input"}


def test_a_deep_link_opens_in_a_browser_that_was_never_here(page: Page, server: str) -> None:
    page.goto(f"{server}/?run=gpt&layer=blocks.2.attn.qkv&role=weight&step=40")

    drawn(page)
    expect(page.locator(".fs-crumbs")).to_contain_text("blocks.2.attn.qkv")
    expect(page.locator(".fs-title").first).to_contain_text("weight")
    expect(page.locator(".fs-title").first).to_contain_text("step 40")
    page.locator(".fs-nav a", has_text="blocks.2.mlp.fc1").click()
    expect(page.locator(".fs-crumbs")).to_contain_text("blocks.2.mlp.fc1")
    assert parameters(page)["role"] == "weight"


def test_the_pointer_reads_layer_role_step_and_value(page: Page, server: str) -> None:
    page.goto(f"{server}/?run=gpt&role=weight")
    drawn(page)

    page.mouse.move(*cell(page, 1, 0.5, 0.02))
    page.mouse.move(*cell(page, 1, 0.501, 0.03))

    tip = page.locator(".fs-tip").first
    expect(tip).to_contain_text("blocks.0.attn.qkv")
    expect(tip).to_contain_text("weight")
    expect(tip).to_contain_text("scale")


def test_a_growing_run_is_seen_without_a_click_in_the_same_plot(page: Page, server: str, recording: Recording) -> None:
    page.goto(f"{server}/?run=gpt")
    drawn(page)
    columns = int(page.locator("[data-columns]").first.get_attribute("data-columns") or 0)
    plot = page.evaluate_handle("document.querySelector('.fs-plot')")
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.5):
            recording.grow(4)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        grown = f"Number(document.querySelector('[data-columns]').dataset.columns) >= {columns + 8}"
        page.wait_for_function(grown, timeout=30_000)
    finally:
        stop.set()
        writer.join()

    assert page.evaluate("plot => plot.isConnected && plot === document.querySelector('.fs-plot')", plot)


def test_a_tick_that_left_the_browser_before_a_zoom_does_not_undo_it(
    page: Page, server: str, recording: Recording
) -> None:
    def ticks_say_where_they_were_sent(socket: WebSocketRoute) -> None:
        to_server = socket.connect_to_server()

        def pass_on(content: str | bytes) -> None:
            assert isinstance(content, bytes)
            message = BackMsg.FromString(content)
            if message.rerun_script.is_auto_rerun:
                message.rerun_script.query_string = "run=gpt"
            to_server.send(message.SerializeToString())

        socket.on_message(pass_on)

    page.route_web_socket("**/_stcore/stream", ticks_say_where_they_were_sent)
    page.goto(f"{server}/?run=gpt&range=40-")
    drawn(page)
    recording.grow(recording.steps // 5)  # longer by enough for new controls
    newest = recording.steps - 1

    page.wait_for_function(f"document.querySelector('.fs-plot')?.layout?.xaxis.range[1] === {newest} + 0.5")
    expect(page.get_by_role("slider").last).to_have_attribute("max", str(newest))
    page.wait_for_timeout(2500)  # a tick more
    assert page.evaluate("document.querySelector('.fs-plot').layout.xaxis.range[0]") == 39.5
    assert parameters(page)["range"] == "40-"


def test_names_from_training_jobs_are_text(page: Page, server: str) -> None:
    page.goto(server)
    page.locator(".fs-row .fs-main a", has_text="onerror").click()
    drawn(page)

    expect(page.locator(".fs-crumbs")).to_contain_text(HOSTILE)
    assert page.locator("img[src=x]").count() == 0
    page.locator(".fs-row a", has_text="onerror").first.click()
    expect(page.locator(".fs-facts")).to_be_visible()
    assert page.title() == "fp8scope"


def test_a_taken_port_and_an_open_address_are_refused_in_a_sentence(server: str) -> None:
    taken = urlsplit(server).netloc
    for listen, words in [(taken, "Address already in use"), ("0.0.0.0:0", "--insecure"), ("8501", "HOST:PORT")]:
        command = [sys.executable, "-m", "fp8scope_dashboard", "--listen", listen]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)

        assert found.returncode == 1
        assert found.stderr.startswith("fp8scope dashboard: ")
        assert words in found.stderr
        assert found.stderr.count("\n") == 1
