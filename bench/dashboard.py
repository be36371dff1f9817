"""How long the dashboard's views take on a large run, what a live tick costs, and whether memory stays flat.

The run has 560 layers x 3 roles x 12,000 steps x 4 ranks, 80 million rows, written through the collector's writer
with its rollups. A real browser (Chromium by Playwright) opens each view in a new profile, then again in the same; a
proxy between browser and server counts bytes as they are on the wire. A thread goes on writing during the ticks.

    python bench/dashboard.py [--db FILE] [--steps 12000] [--ranks 4] [--viewers 5] [--viewers-for 300]

The database stays where `--db` says and is continued by the next call, so that it need not be written in one go
(`--build-for SECONDS` only writes).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
from playwright.sync_api import BrowserContext, Page, sync_playwright

from fp8core.records import Role
from fp8scope_collector.messages import Batch, Opening, SlotSpec, Source
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.writer import StatsWriter

BLOCKS = 140
LEAVES = ("attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2")
LAYERS = [f"blocks.{block}.{leaf}" for block in range(BLOCKS) for leaf in LEAVES]
RUN = "large"
STEPS_A_BATCH = 8
WARM_UP_S = 10
RESULTS = Path(__file__).parent / "results" / "dashboard.md"
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


class Recording:
    """A run that is written in steps, with rows like those of a training: a scale that follows its tensor."""

    def __init__(self, url: str, name: str, ranks: int) -> None:
        engine = open_engine(url)
        migrate(engine)
        self.writer = StatsWriter(engine)
        while self.writer.catch_up(now_unix_ns=time.time_ns()):
            pass
        known = {run.name: run for run in Reader(url).runs()}
        self.next_step = 0 if name not in known else (known[name].last_step or -1) + 1
        self.sources = [
            self.writer.register(opening(name, rank, ranks), now_unix_ns=time.time_ns()) for rank in range(ranks)
        ]
        self.seq = max(source.up_to_seq for source in self.sources) + 1
        self.rng = np.random.default_rng(self.next_step)

    def grow(self, steps: int) -> None:
        """Commits further steps of all ranks, some steps a batch."""
        for start in range(self.next_step, self.next_step + steps, STEPS_A_BATCH):
            count = min(STEPS_A_BATCH, self.next_step + steps - start)
            group = [self._batch(source, rank, start, count) for rank, source in enumerate(self.sources)]
            self.writer.commit(group, now_unix_ns=time.time_ns())
            self.seq += 1
        self.next_step += steps

    def _batch(self, source: Source, rank: int, start: int, count: int) -> Batch:
        slots = 3 * len(LAYERS)
        step = np.repeat(np.arange(start, start + count), slots)
        slot = np.tile(np.arange(slots), count)
        role = slot % 3
        drift = np.sin(step / 900 + slot / 40) * np.array([1, 0.3, 3])[role]
        exponent = np.array([2.0, -3.0, -18.0])[role] + drift + self.rng.normal(0, 0.25, step.size)
        amax = np.exp2(exponent)
        largest = np.where(role == 2, 57344.0, 448.0)
        scale = np.exp2(np.floor(np.log2(largest / amax)) - np.where(role == 2, 3, 0))
        numel = np.full(step.size, 2**20)
        broken = (slot == 700) & (step > 9000)
        sum_sq = amax**2 * 2**17
        columns = {
            "amax": amax.astype(np.float32),
            "scale_min": scale.astype(np.float32),
            "scale_max": scale.astype(np.float32),
            "numel": numel,
            "zeros": np.zeros(step.size, np.int64),
            "overflow": np.where(broken, 4000, 0),
            "underflow": self.rng.poisson(40, step.size),
            "subnormal": self.rng.poisson(900, step.size),
            "nonfinite": np.zeros(step.size, np.int64),
            "sum_sq": sum_sq,
            "err_sq": sum_sq * 10 ** -np.where(role == 2, 2.55, 3.15),
        }
        loss = [(s, "loss", 2 + 8 / (1 + s / 300)) for s in range(start, start + count)] if rank == 0 else []
        return Batch(source, self.seq, 0, step, slot, columns, tuple(loss))


def opening(name: str, rank: int, ranks: int) -> Opening:
    slots = tuple(
        SlotSpec(
            layer=layer,
            role=role,
            module_class="Fp8Linear",
            in_features=4096,
            out_features=4096,
            format="E5M2" if role == Role.GRAD_OUTPUT else "E4M3FN",
            recipe="AmaxScaling()",
            margin=3 if role == Role.GRAD_OUTPUT else 0,
        )
        for layer in LAYERS
        for role in Role
    )
    return Opening(
        project="",
        run=name,
        rank=rank,
        world_size=ranks,
        incarnation=1,
        source_uuid=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name}/{rank}")),
        started_unix_ns=time.time_ns(),
        sent_unix_ns=time.time_ns(),
        agent_version="0.1.0",
        slots=slots,
        config_json='{"lr": 0.001}',
        environment_json='{"host": "bench"}',
        tags_json="[]",
        notes="",
    )


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


def measure_ticks(page: Page, proxy: Proxy, pid: int, recording: Recording, seconds: float) -> list[str]:
    """Server time and bytes of a tick while the run grows by a step each second; zoom and scroll stay."""
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(1.0):
            recording.grow(1)

    writer = threading.Thread(target=write)
    page.mouse.wheel(0, 300)
    page.wait_for_timeout(1500)
    scrolled = page.evaluate("document.querySelector('[data-testid=stMain]').scrollTop")
    version = "Number(document.querySelector('[data-columns]').dataset.version)"
    writer.start()
    try:
        page.wait_for_timeout(4000)
        before, processor, seen, ticks = proxy.to_browser, cpu_s(pid), page.evaluate(version), 0
        ended = time.monotonic() + seconds
        while time.monotonic() < ended:
            page.wait_for_timeout(100)
            if (now := page.evaluate(version)) != seen:
                seen, ticks = now, ticks + 1
        sent, used = proxy.to_browser - before, cpu_s(pid) - processor
    finally:
        stop.set()
        writer.join()
    same = page.evaluate("document.querySelector('[data-testid=stMain]').scrollTop") == scrolled
    return [
        f"| bytes on the wire a tick | {sent / max(1, ticks) / 1000:,.1f} kB |",
        f"| server's processor time a tick (all of the page's fragments) | {1000 * used / max(1, ticks):,.0f} ms |",
        f"| ticks seen in {seconds:.0f} s | {ticks} |",
        f"| scroll position kept | {'yes' if same else 'no'} |",
    ]


def measure_viewers(contexts: list[BrowserContext], address: str, pid: int, seconds: float) -> str:
    """Memory of the server while several people look at a run."""
    for context in contexts:
        paint_s(context.new_page(), address, READY["run"][1])
    time.sleep(min(30.0, seconds / 4))
    sizes = []
    ended = time.monotonic() + seconds
    while time.monotonic() < ended:
        sizes.append(rss_mib(pid))
        time.sleep(min(15.0, seconds / 8))
    return (
        f"| {len(contexts)} viewers for {seconds:.0f} s, memory of the server | {sizes[0]:,.0f} MiB at first, "
        f"{max(sizes):,.0f} at most, {sizes[-1]:,.0f} at the end |"
    )


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
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    url = f"sqlite:///{options.db}"
    if not build(url, options.steps, options.ranks, time.monotonic() + (options.build_for or 1e9)) or options.build_for:
        return
    lines = [
        "# The dashboard on a large run",
        "",
        f"{machine()}; {datetime.now():%B %Y}; a load of {os.getloadavg()[0]:.1f} when it began.",
        "Browser, server and SQLite share these cores.",
        f"{3 * len(LAYERS):,} slots x {options.steps:,} steps x {options.ranks} ranks, "
        f"{options.db.stat().st_size / 1e9:.1f} GB: `bench/dashboard.py`.",
        "",
        "| view | first useful paint, new profile | again in the same profile |",
        "|---|---|---|",
    ]
    with dashboard(url) as (process, port), sync_playwright() as playwright:
        proxy = Proxy(port)
        browser = playwright.chromium.launch(executable_path=options.chromium, args=FLAGS.split())
        for view, (query, ready) in READY.items():
            context = browser.new_context(viewport={"width": 1400, "height": 1000})
            address = f"http://127.0.0.1:{proxy.port}/?{query}"
            new = paint_s(context.new_page(), address, ready)
            warm = [paint_s(context.new_page(), address, ready) for _ in range(3)]
            lines.append(f"| {view} | {new:.1f} s | {np.median(warm):.1f} s |")
            print(lines[-1], flush=True)
            context.close()
        lines += ["", "| of the run page | |", "|---|---|"]
        recording = Recording(url, RUN, options.ranks)
        context = browser.new_context(viewport={"width": 1400, "height": 700})
        page = context.new_page()
        paint_s(page, f"http://127.0.0.1:{proxy.port}/?{READY['run'][0]}", READY["run"][1])
        time.sleep(WARM_UP_S)
        lines += measure_ticks(page, proxy, process.pid, recording, options.ticks_for)
        context.close()
        contexts = [browser.new_context() for _ in range(options.viewers)]
        address = f"http://127.0.0.1:{proxy.port}/?{READY['run'][0]}"
        lines.append(measure_viewers(contexts, address, process.pid, options.viewers_for))
        browser.close()
    print(*itertools.islice(lines, len(READY) + 7, None), sep="\n")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")


def machine() -> str:
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores, {found[1] if found else platform.processor()}"


if __name__ == "__main__":
    main()
