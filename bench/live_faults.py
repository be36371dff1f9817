"""How long after a fault does a person hear of it? Each fault from the command line, against a real collector.

`examples/inject_fault.py --fault NAME` trains the demo's model (6 layers of width 384) and breaks it, a collector with
SQLite diagnoses, and the clock runs from the beginning of the broken step, before anything can be seen of it, until
the finding of the right rule, layer and role is in the database. Training, collector, diagnosis and this share the
machine. Ends with 1 where a fault is not found.

    python bench/live_faults.py [--faults weight-row rank-killed] [-- options of train_gpt.py]

What is measured replaces its line in bench/results/live_faults.json; the .md beside it and the table of
docs/diagnosis.md are made from that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples")]

from fp8scope_collector.storage.reader import Reader  # noqa: E402
from fp8scope_collector.storage.readmodels import StoredFinding  # noqa: E402
from inject_fault import FAULTS, Spec  # noqa: E402
from measured import machine  # noqa: E402

AFTER = 40  # steps that are trained after the fault, if it is not found before
PATIENCE_S = 60.0
RESULTS = ROOT / "bench/results/live_faults.json"
DOCS = ROOT / "docs/diagnosis.md"


def measure(name: str, options: Sequence[str]) -> dict[str, Any]:
    """What became of one fault; `seconds` is None where it was not found."""
    spec = FAULTS[name]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        url = f"sqlite:///{folder}/fp8scope.db"
        serve = ["-m", "fp8scope_collector", "serve", "--db", url, "--grpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        address = said(running.enter_context(program(serve)), r"grpc (\S+?),")[1]
        faulty = ["examples/inject_fault.py", "--fault", name, "--run", name, "--steps", str(spec.at + AFTER)]
        where = ["--collector", address, "--spool-dir", f"{folder}/spool"]
        training = running.enter_context(program([*faulty, *where, *options]))
        begun = time.monotonic()
        said(training, rf"step {spec.at}: {re.escape(spec.does)}")
        broken = time.monotonic()
        finding = wait_for(spec, url, until=broken + PATIENCE_S)
        return {
            "finding": f"{finding.rule}, {finding.role} of {finding.layer}".removesuffix(", None of ")
            if finding
            else "",
            "seconds": round(time.monotonic() - broken, 1) if finding else None,
            "at": spec.at,
            "seconds_a_step": round((broken - begun) / max(spec.at, 1), 2) if spec.at else None,
            "machine": machine(),
            "month": f"{datetime.now():%B %Y}",
        }


def wait_for(spec: Spec, url: str, until: float) -> StoredFinding | None:
    """The finding that the fault should have, once it is there."""
    reader = Reader(url)
    try:
        while time.monotonic() < until:
            for finding in reader.findings():
                right = finding.rule == spec.rule and spec.layer in ("", finding.layer)
                if right and spec.role in ("", str(finding.role)) and finding.first_step >= spec.at:
                    return finding
            time.sleep(0.1)
        return None
    finally:
        reader.close()


@contextlib.contextmanager
def program(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A program of ours with those that it starts, which end with the block."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FP8SCOPE_")}
    process = subprocess.Popen(
        [sys.executable, "-u", *command],
        cwd=ROOT,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout
        process.stdout.close()


def said(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """The first of its lines with the pattern."""
    assert process.stdout
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found
    raise SystemExit(f"{process.args!r} ended without a line like {pattern!r}")


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| fault | found as | seconds from the broken step on |", "|---|---|---|"]
    for name in FAULTS:
        if line := results.get(name):
            seconds = "not found" if line["seconds"] is None else f"{line['seconds']:.1f}"
            lines.append(f"| {name} | {line['finding']} | {seconds} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    args, options = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started ends with it
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missed = 0
    for name in args.faults:
        line = results[name] = measure(name, [option for option in options if option != "--"])
        missed += line["seconds"] is None
        print(name, line["finding"] or "not found", line["seconds"], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    when = " and ".join(sorted({f"{line['machine']}, {line['month']}" for line in results.values()}))
    intro = f"# Faults of a run that goes on: how soon they are named\n\n`bench/live_faults.py`, {when}.\n\n"
    RESULTS.with_suffix(".md").write_text(f"{intro}{text}\n")
    begin, end = "<!-- bench/live_faults.py writes this -->\n", "<!-- until here -->"
    page = DOCS.read_text()
    DOCS.write_text(re.sub(f"{begin}.*?{end}", lambda _: f"{begin}{text}\n{end}", page, flags=re.DOTALL))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
