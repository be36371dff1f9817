"""How long the dashboard's views take on a large run, what a live tick costs, and whether memory stays flat.

The run has 560 layers x 3 roles x 12,000 steps x 4 ranks, 80 million rows, written through the collector's writer
with its rollups. A real browser (Chromium by Playwright, its profile on disk) opens each view in a new profile, then
five times more in the same; a proxy between browser and server counts bytes as they are on the wire. A thread goes on
writing during the ticks.

    python bench/dashboard.py [--db FILE] [--only views|ticks|viewers] [--views run,tensor] [--viewers-for 300]

The database stays where `--db` says and is continued by the next call, so that it need not be written in one go
(`--build-for SECONDS` only writes, which takes eight minutes in all). What is measured goes to results/dashboard.json,
and results/dashboard.md is written from it, so that the parts can be measured one by one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import BrowserContext, Page, Playwright, sync_playwright

from measured import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
from large_run import LAYERS, Recording

RUN = "large"
WARM_UP_S = 10
RESULTS = Path(__file__).parent / "results" / "dashboard.md"
MEASURED = RESULTS.with_suffix(".json")
WARM = 5  # visits after the first
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --no-first-run"
READY = {
    "runs": ("", ".fs-row"),
    "run": (f"run={RUN}", "[data-columns]:not([data-columns='0'])"),
    "tensor": (f"run={RUN}&layer=blocks.70.mlp.fc1&role=grad_output", "[data-version]"),
    "scales": (f"run={RUN}&view=scales", "[data-version]"),
    "compare": (f"view=compare&runs={RUN},{RUN}-b", "[data-columns]:not([data-columns='0'])"),
    "findings": ("view=findings", ".fs-empty, .fs-findings"),
    "system": ("view=system", ".fs-table"),
    "settings": ("view=settings", ".fs-table"),
}


class Proxy:
    """Hands bytes on between browser and server, and counts what goes to the browser."""

    def __init__(self, port: int) -> None:
        self.to_browser = 0
        self._target = port
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self.port = 0

        async def serve() -> None:
            server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await server.serve_forever()

        threading.Thread(target=lambda: self._loop.run_until_complete(serve()), daemon=True).start()
        started.wait()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, count: bool) -> None:
            try:
                while data := await source.read(65536):
                    self.to_browser += len(data) if count else 0
                    sink.write(data)
                    await sink.drain()
            except OSError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pump(reader, to_server, count=False), pump(from_server, writer, count=True))


@contextmanager
def dashboard(url: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The running dashboard and its port."""
    command = [sys.executable, "-m", "fp8scope_dashboard", "--db", url, "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout
        found = re.search(r":(\d+)$", process.stdout.readline().strip())
        assert found, "the dashboard did not start"
        yield process, int(found[1])
    finally:
        process.terminate()
        process.wait(timeout=20)


def paint_s(page: Page, address: str, ready: str) -> float:
    """From the request to the first chart, or the first row of a table."""
    started = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.wait_for_selector(ready, state="attached", timeout=120_000)
    return time.perf_counter() - started


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


@contextmanager
def profile(playwright: Playwright, chromium: str, **options: Any) -> Iterator[BrowserContext]:
    """A browser with a new profile on disk, as a person's is: its cache holds files and compiled scripts."""
    with tempfile.TemporaryDirectory() as folder:
        context = playwright.chromium.launch_persistent_context(
            folder, executable_path=chromium, args=FLAGS.split(), **options
        )
        with no_errors(context):
            yield context
        context.close()


@contextmanager
def no_errors(context: BrowserContext) -> Iterator[None]:
    """Ends the measurement if a page reported an error to its console: what is broken may be fast."""
    errors: list[str] = []
    context.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield
    if errors:
        raise SystemExit("the browser's console shows:\n" + "\n".join(errors))


def measure_views(playwright: Playwright, chromium: str, address: str, views: list[str]) -> dict[str, list[float]]:
    """Of each view seconds to the first useful paint: in a new profile, at the second visit, median of later ones."""
    found = {}
    for view in views:
        query, ready = READY[view]
        with profile(playwright, chromium, viewport={"width": 1400, "height": 1000}) as context:
            visits = []
            for _ in range(1 + WARM):
                page = context.new_page()
                visits.append(paint_s(page, f"{address}/?{query}", ready))
                page.wait_for_timeout(1000)  # a script is compiled for the cache after it ran
                page.close()
            found[view] = [visits[0], visits[1], float(np.median(visits[2:]))]
        print(view, *(f"{seconds:.2f} s" for seconds in found[view]), flush=True)
    return found


class Growth:
    """A thread that writes one step of all ranks each second."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def _write(self) -> None:
        while not self._stop.wait(1.0):
            self._recording.grow(1)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


VERSION = "Number(document.querySelector('[data-columns]').dataset.version)"
SCROLLED = "document.querySelector('[data-testid=stMain]').scrollTop"
LEFT_END = "Math.round(document.querySelector('.fs-plot').layout.xaxis.range[0])"


def ticks_seen(page: Page, seconds: float) -> int:
    """How often the chart changed."""
    seen, ticks, ended = page.evaluate(VERSION), 0, time.monotonic() + seconds
    while time.monotonic() < ended:
        page.wait_for_timeout(100)
        if (now := page.evaluate(VERSION)) != seen:
            seen, ticks = now, ticks + 1
    return ticks


def measure_ticks(page: Page, proxy: Proxy, pid: int, recording: Recording, seconds: float) -> dict[str, str]:
    """Server time and bytes of a tick while the run grows by a step each second; zoom and scroll stay."""
    page.wait_for_timeout(1000 * WARM_UP_S)
    page.mouse.move(400, 500)
    page.mouse.wheel(0, 300)
    page.wait_for_timeout(1500)
    scrolled = page.evaluate(SCROLLED)
    with Growth(recording):
        page.wait_for_timeout(4000)
        before, processor = proxy.to_browser, cpu_s(pid)
        ticks = ticks_seen(page, seconds)
        sent, used = proxy.to_browser - before, cpu_s(pid) - processor
        same = page.evaluate(SCROLLED) == scrolled
        page.evaluate("document.querySelector('[data-testid=stMain]').scrollTo(0, 0)")
        page.wait_for_timeout(500)
        box = page.locator(".fs-plot .nsewdrag").first.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"], box["y"] + 40, steps=8)
        page.mouse.up()
        page.wait_for_url("**range=*")
        page.wait_for_timeout(4000)
        left, address = page.evaluate(LEFT_END), page.url
        zoomed_ticks = ticks_seen(page, seconds / 2)
        kept = (page.evaluate(LEFT_END), page.url) == (left, address) and left > 0
    return {
        "bytes on the wire a tick": f"{sent / max(1, ticks) / 1000:,.1f} kB",
        "server's processor time a tick, all of the page": f"{1000 * used / max(1, ticks):,.0f} ms",
        "ticks seen": f"{ticks} in {seconds:.0f} s",
        "scroll position kept over them": "yes" if same and scrolled else "no",
        "zoom kept": f"{'yes' if kept else 'no'}, from step {left:,} on, over {zoomed_ticks} ticks",
    }


def measure_viewers(contexts: list[BrowserContext], address: str, pid: int, seconds: float) -> dict[str, str]:
    """Memory of the server while several people look at a run that grows."""
    for context in contexts:
        paint_s(context.new_page(), address, READY["run"][1])
    time.sleep(min(30.0, seconds / 4))
    sizes, processor = [], cpu_s(pid)
    ended = time.monotonic() + seconds
    while time.monotonic() < ended:
        sizes.append(rss_mib(pid))
        time.sleep(min(15.0, seconds / 8))
    said = f"{sizes[0]:,.0f} MiB at first, {max(sizes):,.0f} at most, {sizes[-1]:,.0f} at the end"
    used = (cpu_s(pid) - processor) / seconds
    return {
        f"{len(contexts)} viewers for {seconds:.0f} s, memory of the server": said,
        f"{len(contexts)} viewers, processor of the server": f"{used:.0%} of one core",
    }


def build(url: str, steps: int, ranks: int, until: float) -> bool:
    """Writes what is missing; False when time ran out."""
    for name, length in ((RUN, steps), (f"{RUN}-b", min(steps, 1024))):
        recording = Recording(url, name, ranks if name == RUN else 1)
        while recording.next_step < length:
            if time.monotonic() > until:
                recording.writer.roll_up()
                print(f"{name}: {recording.next_step:,} of {length:,} steps are written")
                return False
            recording.grow(min(64, length - recording.next_step))
        recording.writer.roll_up()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db", type=Path, default=Path(tempfile.gettempdir()) / "fp8scope-bench-dashboard.db")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--ticks-for", type=float, default=30, metavar="SECONDS")
    parser.add_argument("--viewers", type=int, default=5)
    parser.add_argument("--viewers-for", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--build-for", type=float, metavar="SECONDS", help="only write the database, at most so long")
    parser.add_argument(
        "--only", choices=("views", "ticks", "viewers"), help="measure a part, and keep the other figures"
    )
    parser.add_argument("--views", default=",".join(READY), help="which views are opened")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    url = f"sqlite:///{options.db}"
    if not build(url, options.steps, options.ranks, time.monotonic() + (options.build_for or 1e9)) or options.build_for:
        return
    found: dict[str, Any] = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    load = os.getloadavg()[0]
    with dashboard(url) as (process, port), sync_playwright() as playwright:
        proxy = Proxy(port)
        address = f"http://127.0.0.1:{proxy.port}"
        run_page = f"{address}/?{READY['run'][0]}"
        if options.only in (None, "views"):
            views = options.views.split(",")
            found.setdefault("views", {}).update(measure_views(playwright, options.chromium, address, views))
        if options.only in (None, "ticks"):
            recording = Recording(url, RUN, options.ranks)
            with profile(playwright, options.chromium, viewport={"width": 1400, "height": 700}) as context:
                page = context.new_page()
                paint_s(page, run_page, READY["run"][1])
                found["ticks"] = measure_ticks(page, proxy, process.pid, recording, options.ticks_for)
        if options.only in (None, "viewers"):
            recording = Recording(url, RUN, options.ranks)
            browser = playwright.chromium.launch(executable_path=options.chromium, args=FLAGS.split())
            contexts = [browser.new_context() for _ in range(options.viewers)]
            with Growth(recording), ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(no_errors(context))
                found["viewers"] = measure_viewers(contexts, run_page, process.pid, options.viewers_for)
            browser.close()
    found["where"] = {
        "machine": machine(),
        "month": f"{datetime.now():%B %Y}",
        "size": f"{3 * len(LAYERS):,} slots x {options.steps:,} steps x {options.ranks} ranks, "
        f"{options.db.stat().st_size / 1e9:.1f} GB",
    }
    found.setdefault("load", {}).update(dict.fromkeys([options.only] if options.only else PARTS, round(load, 1)))
    RESULTS.parent.mkdir(exist_ok=True)
    MEASURED.write_text(json.dumps(found, indent=2) + "\n")
    RESULTS.write_text(report(found))
    print(RESULTS.read_text())


PARTS = ("views", "ticks", "viewers")


def report(found: dict[str, Any]) -> str:
    """What was measured, as results/dashboard.md."""
    where = found["where"]
    loads = ", ".join(f"{load} ({part})" for part, load in found["load"].items())
    lines = [
        "# The dashboard on a large run",
        "",
        f"{where['machine']}; {where['month']}; load when a part began: {loads}.",
        "Browser, server and SQLite share these cores.",
        f"{where['size']}: `bench/dashboard.py`.",
    ]
    if views := found.get("views"):
        lines += [
            "",
            "Seconds from the request to the first chart, or the first row of a table:",
            "",
            f"| view | new profile | second visit | later visits, median of {WARM - 1} |",
            "|---|---|---|---|",
            *(
                f"| {view} | {' | '.join(f'{seconds:.2f}' for seconds in views[view])} |"
                for view in READY
                if view in views
            ),
        ]
    lines += ["", "No page reported an error to its browser's console: the script ends where one does."]
    facts = found.get("ticks", {}) | found.get("viewers", {})
    if facts:
        lines += ["", "| the run's page, while the run grows by a step a second | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
