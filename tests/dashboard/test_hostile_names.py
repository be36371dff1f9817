"""What a training job calls things is text: in a real browser, on every view, nothing of it is executed or breaks.

A name may be HTML, a script, a Markdown link, SQL, a formula, have marks that reverse the writing, or be very long.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import sqlalchemy as sa
from playwright.sync_api import Page, expect, sync_playwright

from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import migrate, open_engine
from programs import environment

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
RUN = "<img src=x onerror='window.owned=1'>"
NAMES = [
    "<script>window.owned=2</script>",
    "[click](javascript:window.owned=3) **bold** $\\frac{1}{2}$ :smile: `x`",
    "'; DROP TABLE run; --",
    '=HYPERLINK("http://evil.example/","x")',
    "\u202egnp.exe\u2066\u2067 \u0007",
    "{{constructor.constructor('window.owned=4')()}} ${window.owned=5} %{x} <b>y</b>",
    '" onmouseover="window.owned=6" x=\'',
    "x" * 10_000,
]
VIEWS: list[dict[str, str]] = [
    {},
    {"run": RUN},
    {"run": RUN, "quantity": "overflow", "role": "grad_output"},
    {"view": "scales", "run": RUN},
    {"view": "findings", "run": RUN},
    {"view": "findings"},
    {"view": "compare", "runs": f"gpt,{quote(RUN)}"},
    {"view": "system"},
    {"view": "settings"},
    *({"run": RUN, "layer": name} for name in NAMES[:7]),  # an address of 10,000 characters is refused by servers
    {"run": NAMES[0], "filter": NAMES[1], "show": NAMES[6], "sort": NAMES[6]},
    {"run": "gpt", "filter": NAMES[6]},
]


def recorded(folder: Path, record: Callable[..., int], find: Callable[..., None]) -> str:
    """A database in which everything that a training job may name is hostile, and a plain run."""
    url = f"sqlite:///{folder / 'runs.db'}"
    engine = open_engine(url)
    migrate(engine)
    record(engine, "gpt", ["blocks.0.fc1"])
    source_id = record(engine, RUN, NAMES)
    with engine.begin() as connection:
        run_id = connection.execute(sa.select(schema.run.c.id).where(schema.run.c.name == RUN)).scalar_one()
        values: dict[str, Any] = {
            "config_json": json.dumps({name: name for name in NAMES}),
            "tags_json": json.dumps(NAMES),
            "notes": " ".join(NAMES),
        }
        connection.execute(schema.run.update().where(schema.run.c.id == run_id).values(**values))
        ended = {"outcome": "failed", "outcome_message": NAMES[0] + NAMES[7], "finished_unix_ns": time.time_ns()}
        about = {"environment_json": json.dumps({"host": RUN, NAMES[6]: NAMES[0]}), "agent_version": NAMES[0]}
        connection.execute(schema.source.update().where(schema.source.c.id == source_id).values(**ended, **about))
        scalars = [{"source_id": source_id, "name": n[:300], "step": s, "value": 1.0} for n in NAMES for s in range(4)]
        connection.execute(schema.scalar.insert(), scalars)
        connection.execute(schema.drop.insert().values(source_id=source_id, reason=NAMES[0], rows=7))
    for slot in (2, 5, 8):
        find(engine, run_id, slot=slot, severity="critical", rule="overflow")
    with engine.begin() as connection:
        said = dict.fromkeys(("evidence", "note", "remedy", "change"), RUN)
        connection.execute(schema.finding.update().values(**said, acknowledged_by=RUN, acknowledged_reason=NAMES[0]))
    engine.dispose()
    return url


def drawn(page: Page) -> None:
    """The view is there: its header, and nothing that is still running."""
    expect(page.locator(".fs-header")).to_be_visible(timeout=30_000)
    expect(page.locator("[data-testid=stStatusWidget]")).to_have_count(0, timeout=30_000)


def test_hostile_names_are_text_on_every_view(
    tmp_path: Path, record: Callable[..., int], find: Callable[..., None], require_binary: Callable[[str], Path]
) -> None:
    url = recorded(tmp_path, record, find)
    command = [sys.executable, "-m", "fp8scope_dashboard", "--db", url, "--listen", "127.0.0.1:0"]
    wrong: list[str] = []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment())
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=require_binary("chromium"), args=ARGUMENTS)
            page = browser.new_page()
            page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
            page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
            page.on("console", lambda m: wrong.append(f"{m.type}: {m.text}") if m.type == "error" else None)
            page.on("request", lambda r: None if r.url.startswith((address, "blob:", "data:")) else wrong.append(r.url))
            for view in VIEWS:
                page.goto(f"{address}/?{urlencode(view)}")
                drawn(page)
                shown = page.locator("body").inner_text()
                assert page.evaluate("window.owned") is None, view
                assert page.locator(".fs img, .fs script, [data-testid=stMarkdown] img").count() == 0, view
                assert page.locator("a[href^='javascript:']").count() == 0, view
                assert "Traceback" not in shown, view
                assert page.locator("[data-testid=stException]").count() == 0, view
                wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                assert wide <= 0, f"{view} is {wide} px wider than the window"
                if view.get("run") == RUN and "layer" not in view:
                    assert RUN in shown, view
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=10)
    assert wrong == []
