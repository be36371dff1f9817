"""Every view in a real browser on a run as large as real ones: 1,680 tensors on four ranks, which grows meanwhile.

test_dashboard_views.py has what depends on clicks and addresses alone, on a small run; here is what size may break.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from fp8scope_dashboard.component.assets import addresses
from large_run import BROKEN, LAYERS, Recording

FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --no-first-run"
PATIENCE_MS = 60_000
OF_BROKEN = LAYERS[BROKEN // 3]


@pytest.fixture(scope="module", params=[40, pytest.param(2048, marks=pytest.mark.slow)])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Recording]:
    """The address of a database with the run and a shorter one of one rank, and the former to go on with."""
    url = f"sqlite:///{tmp_path_factory.mktemp('large') / 'runs.db'}"
    large = Recording(url, "large", 4, broken_from=request.param // 2)
    large.grow(request.param)
    Recording(url, "other", 1).grow(request.param // 2)
    return url, large


@pytest.fixture(scope="module")
def server(recorded: tuple[str, Recording]) -> Iterator[str]:
    command = [sys.executable, "-m", "fp8scope_dashboard", "--db", recorded[0], "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def browser(require_binary: Callable[[str], Path]) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require_binary("chromium"), args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def profile(browser: Browser) -> Iterator[BrowserContext]:
    """A new profile, in which no page may report an error."""
    errors: list[str] = []
    context = browser.new_context(viewport={"width": 1400, "height": 1200})
    context.set_default_timeout(PATIENCE_MS)
    context.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield context
    context.close()
    assert errors == []


def parameters(page: Page) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def drawn(page: Page, charts: int = 1) -> None:
    """Waits until so many charts are there."""
    if charts:
        page.locator("[data-version]").nth(charts - 1).wait_for(state="attached")


def at(page: Page, name: str) -> None:
    """Waits until the header says that this is where we are; the page before may still be there for a moment."""
    page.locator(".fs-crumbs .fs-here", has_text=name).wait_for()


def place(page: Page, panel: int, x: float, y: float) -> tuple[float, float]:
    """A point of a panel of the first chart: the loss, then a facet of each role."""
    box = page.locator(".fs-plot").first.locator(".nsewdrag").nth(panel).bounding_box()
    assert box is not None
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def test_from_the_list_to_the_broken_tensor_its_neighbour_and_another_run_and_back(
    profile: BrowserContext, server: str
) -> None:
    page = profile.new_page()
    page.goto(server)
    page.locator(".fs-row .fs-main a", has_text="large").click()
    drawn(page)
    expect(page.locator(".fs-note").first).to_contain_text("2 layers a row, the worse one shown")
    worst = page.locator("tr.fs-row").filter(has_text=OF_BROKEN).filter(has_text="overflow")
    expect(worst).to_contain_text("0.381 %")
    page.goto(f"{server}/?run=large&quantity=overflow")
    drawn(page)

    page.mouse.click(*place(page, 2, 0.9, (BROKEN // 3 + 0.5) / len(LAYERS)))  # of two layers in the row the worse one
    page.wait_for_url("**layer=*")
    at(page, OF_BROKEN)
    where = parameters(page)
    assert (where["layer"], where["role"]) == (OF_BROKEN, "weight")
    page.locator(".fs-title", has_text="4 ranks").wait_for()
    drawn(page, 4)

    page.locator(".fs-nav a", has_text=LAYERS[BROKEN // 3 + 1]).click()
    following = LAYERS[BROKEN // 3 + 1]
    at(page, following)
    page.locator(".fs-tabs a", has_text="compare").click()
    page.locator("tr.fs-row a", has_text="other").click()
    page.wait_for_url("**runs=large*other**")
    drawn(page, 3)

    page.go_back()
    page.locator("tr.fs-row a", has_text="other").wait_for()  # there is one run, and others to choose
    assert parameters(page) == {"view": "compare", "runs": "large"}
    for layer in (following, OF_BROKEN):
        page.go_back()
        at(page, layer)
        assert parameters(page) == where | {"layer": layer}


def test_views_open_by_their_address_in_a_new_profile(profile: BrowserContext, server: str) -> None:
    page = profile.new_page()
    for address, charts, words in [
        ("view=scales&run=large", 4, "all 140: grey from lowest to highest"),
        ("view=compare&runs=large,other", 3, "difference below"),
        (f"run=large&layer={OF_BROKEN}&role=grad_output&step=7", 4, "farthest apart"),
        ("run=large&filter=blocks.58.*", 1, "layers a row"),
        ("view=findings", 0, "Nothing found"),
        ("view=system", 0, "agents"),
        ("view=settings", 0, "database"),
        ("", 0, "2 runs"),
    ]:
        page.goto(f"{server}/?{address}")
        drawn(page, charts)
        if "filter" in address:
            expect(page.locator(".fs-note").first).not_to_contain_text(words)
        else:
            page.locator(".fs", has_text=words).first.wait_for()


def test_a_run_grows_under_a_zoom_that_stays_and_what_is_seen_is_downloaded(
    profile: BrowserContext, server: str, recorded: tuple[str, Recording], tmp_path: Path
) -> None:
    page, large = profile.new_page(), recorded[1]
    page.goto(f"{server}/?run=large&role=weight")
    drawn(page)
    page.mouse.move(*place(page, 1, 0.5, 0.3))
    page.mouse.down()
    page.mouse.move(*place(page, 1, 0.998, 0.4), steps=4)
    page.mouse.up()
    page.wait_for_url("**range=*-")  # to the newest step: it follows
    left = "document.querySelector('.fs-plot')?.layout?.xaxis.range[0]"
    first = int(parameters(page)["range"].removesuffix("-"))
    page.wait_for_function(f"{left} === {first} - 0.5")
    newest, stop = large.next_step, threading.Event()

    def write() -> None:
        while not stop.wait(0.5):
            large.grow(2)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        page.wait_for_function(f"document.querySelector('.fs-plot')?.layout?.xaxis.range[1] >= {newest} + 6")
    finally:
        stop.set()
        writer.join()

    assert page.evaluate(left) == first - 0.5
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    download.value.save_as(tmp_path / "seen.csv")
    rows = list(csv.DictReader((tmp_path / "seen.csv").read_text().splitlines()))
    assert {row["role"] for row in rows} == {"weight"}
    assert len({row["layer"] for row in rows}) == len(LAYERS)
    assert min(int(row["step"]) for row in rows) <= first


def test_a_chart_that_is_left_while_it_is_being_drawn_is_no_error(profile: BrowserContext, server: str) -> None:
    page = profile.new_page()
    page.goto(f"{server}/?run=large")
    drawn(page)

    page.evaluate(
        """async (assets) => {
            const { mount } = await import(new URL(assets["panel.js"], document.baseURI).href);
            const parentElement = document.body.appendChild(document.createElement("div"));
            const figure = { traces: [{ y: [1, 2, 3] }], layout: { title: { text: "left" } } };
            const frame = { height: 300, figure, view: null };
            const data = { kind: "chart", version: "1", base: null, arrays: {}, frame: { is: frame } };
            const { react } = window.Plotly;
            const begun = new Promise((begin) => {
                window.Plotly.react = (...what) => {
                    const drawing = react(...what);
                    begin([drawing]);
                    return drawing;
                };
            });
            const leave = await mount({ data, parentElement, setTriggerValue() {} }, assets);
            const [drawing] = await begun;
            parentElement.remove();
            leave();
            await drawing;
        }""",
        addresses(),
    )


@pytest.mark.slow
def test_a_report_of_the_run_opens_from_disk_without_a_network(
    profile: BrowserContext, recorded: tuple[str, Recording], tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    command = [Path(sys.executable).with_name("fp8scope"), "report", "large", "--db", recorded[0], "-o", file]
    subprocess.run(command, check=True, timeout=240)
    asked: list[str] = []
    page = profile.new_page()
    profile.set_offline(True)
    page.on("request", lambda request: asked.append(request.url))

    page.goto(file.as_uri())

    drawn(page, 4)
    assert [url for url in asked if not re.match(r"(file|data|blob):", url)] == []
