"""The report of a run, opened from disk by a real browser that has no network."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from programs import FP8SCOPE, environment

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
HOSTILE = '<img src=x onerror=alert(1)>**$\\text{x}$** :smile: [a](javascript:alert(1)) & "q" `c`'


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FP8SCOPE, "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)


def test_a_report_opens_from_disk_without_a_network_and_draws_everything(
    recorded: str, tmp_path: Path, require_binary: Callable[[str], Path]
) -> None:
    out = tmp_path / "report.html"

    done = report("gpt", "--db", recorded, "-o", out)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"wrote {out}")
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require_binary("chromium"), args=ARGUMENTS)
        context = browser.new_context(offline=True)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto(out.as_uri())
        page.locator("html[data-drawn]").wait_for(state="attached")
        expect(page.get_by_role("heading", name="grad_output of blocks.2.mlp.fc1")).to_be_visible()
        drawn = int(page.locator("html").get_attribute("data-drawn") or 0)
        plots = page.locator(".js-plotly-plot").count()
        browser.close()
    assert drawn >= 4
    assert plots >= 4
    assert wrong == []


def test_names_of_a_training_job_are_text_in_a_report(recorded: str, tmp_path: Path) -> None:
    out = tmp_path / "report.html"

    done = report(f"$text/{HOSTILE}", "--db", recorded, "-o", out)

    assert done.returncode == 0, done.stderr
    assert "<img" not in out.read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in out.read_text()


def test_what_cannot_be_written_or_found_is_a_sentence_and_leaves_no_file(recorded: str, tmp_path: Path) -> None:
    unknown = report("none", "--db", recorded, "-o", tmp_path / "a.html")
    nowhere = report("gpt", "--db", recorded, "-o", tmp_path / "no" / "a.html")

    assert unknown.stderr.startswith("fp8scope report: run 'none' is unknown")
    assert "cannot write" in nowhere.stderr
    assert unknown.returncode == nowhere.returncode == 1
    assert list(tmp_path.glob("*.html")) == []
