"""The README's promise in a browser: the demo's training appears, grows without a click, and leads to a tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from programs import SMALL_MODEL, Program

PATIENCE_MS = 60_000
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --no-first-run"


@pytest.fixture
def page(require_binary: Callable[[str], Path]) -> Iterator[Page]:
    """A tab 1400 pixels wide in a new profile of Debian's Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require_binary("chromium"), args=FLAGS.split())
        tab = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
        tab.set_default_timeout(PATIENCE_MS)
        yield tab
        browser.close()


def test_the_demo_is_seen_live_and_leads_to_a_tensor(
    page: Page, tmp_path: Path, free_port: Callable[[], int], start: Callable[..., Program]
) -> None:
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))

    demo = start(
        *("examples/demo.py", "--dir", tmp_path / "demo", "--listen", f"127.0.0.1:{free_port()}"),
        *("--steps", "400", "--validate-every", "0", *SMALL_MODEL),
    )
    page.goto(demo.wait_for(r"dashboard +(http://\S+)")[1])
    demo.wait_for(r"step \d+/")
    page.get_by_role("link", name=re.compile("gpt-fp8")).first.click()

    chart = page.locator("[data-columns]").first
    page.wait_for_function("() => Number(document.querySelector('[data-columns]')?.dataset.columns) >= 5")
    seen = int(chart.get_attribute("data-columns") or 0)
    page.wait_for_function(f"() => Number(document.querySelector('[data-columns]').dataset.columns) > {seen + 5}")
    expect(page.get_by_text("running").first).to_be_visible()
    heat_map = page.locator("[data-columns] .nsewdrag").last
    heat_map.scroll_into_view_if_needed()
    box = heat_map.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_url(re.compile(r"layer=blocks"))
    expect(page.locator(".fs-crumbs")).to_contain_text("blocks.", timeout=PATIENCE_MS)
    expect(page.get_by_text("worst tensors")).to_be_hidden(timeout=PATIENCE_MS)
    expect(page.get_by_text("SQNR").first).to_be_visible(timeout=PATIENCE_MS)
    page.go_back()
    page.wait_for_function("() => !location.search.includes('layer=')")

    assert not errors, errors
