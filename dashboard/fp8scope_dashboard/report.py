"""`python -m fp8scope_dashboard.report`: a run as one HTML file that needs no server and no network.

It has what somebody asks first of a run that is over: what went wrong and what to do, the heat maps, and the tensors
that did worst. The pictures are the dashboard's own: the file (report.html, filled) carries the same figures, the
panel.js that draws them and plotly.js, and a policy that forbids the page to load anything else.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import html
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fp8scope_collector.storage.reader import (
    Quantity,
    Reader,
    RunNotFound,
    RunSummary,
    Slot,
    StorageError,
    StoredFinding,
)
from fp8scope_dashboard import text
from fp8scope_dashboard.charts import overview, panels, tensor
from fp8scope_dashboard.component import assets, message

QUANTITIES: tuple[Quantity, ...] = ("scale_exp2", "headroom", "overflow", "underflow")
MOST_FINDINGS = 40
MOST_TENSORS = 6


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and the messages of the panels below it."""

    title: str
    sentence: str
    messages: tuple[Mapping[str, Any], ...]


def main() -> None:
    """Reads the arguments and writes the file."""
    parser = argparse.ArgumentParser(prog="fp8scope report", description="Writes a run as one HTML file.")
    parser.add_argument("run")
    parser.add_argument("--db", required=True, metavar="URL")
    parser.add_argument("--out", "-o", required=True, metavar="FILE")
    arguments = parser.parse_args()
    try:
        size = write_report(arguments.db, arguments.run, Path(arguments.out))
    except (StorageError, RunNotFound) as error:
        sys.exit(f"fp8scope report: {error}")
    except OSError as error:
        sys.exit(f"fp8scope report: cannot write {arguments.out!r}: {error.strerror}")
    print(f"wrote {arguments.out} ({size / 1e6:.1f} MB): open it in a browser")


def write_report(url: str, ref: str, out: Path) -> int:
    """Writes the report of run `ref` to `out`, whole or not at all; returns its size in bytes.

    Raises:
        StorageError, RunNotFound: as the reader.
        OSError: the file cannot be written.
    """
    reader = Reader(url)
    try:
        run = reader.run(ref)
        page = _page(run, list(_sections(reader, run)))
    finally:
        reader.close()
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return len(page.encode())


def _sections(reader: Reader, run: RunSummary) -> Iterable[Section]:
    if run.first_step is None or run.last_step is None:
        yield Section("No rows", "This run has sent no statistics.", ())
        return
    first, last = run.first_step, run.last_step
    slots = reader.slots(run.id)
    found = reader.findings(run.id)
    yield _findings(found)
    scalars = reader.scalars(run.id, max_points=panels.MAX_POINTS)
    maps = reader.heatmaps(run.id, QUANTITIES, max_columns=panels.MAX_COLUMNS)
    for i, heatmap in enumerate(maps):
        figure, height = overview.overview(heatmap, slots, scalars if i == 0 else [], first, last)
        steps = text.count(last - first + 1)
        note = f"{text.count(heatmap.low.shape[1])} columns for {steps} steps, extremes kept"
        title = "Scales and the training loop" if i == 0 else heatmap.quantity.capitalize()
        if heatmap.quantity in overview.SHARES and not np.nanmax(heatmap.high, initial=0) > 0:
            yield Section(title, "Of no tensor, in no step.", ())
            continue
        yield Section(title, note, (message.whole(figure, height=height),))
    for slot in _worst(found, slots, reader, run):
        series = reader.series(run.id, slot.slot, tensor.FIELDS, max_points=panels.MAX_POINTS)
        figure, height = tensor.tensor_figure(series, slot, first, last, None)
        sentence = f"{slot.format or 'unknown format'}, {slot.recipe or 'unknown recipe'}"
        yield Section(f"{slot.role} of {slot.layer}", sentence, (message.whole(figure, height=height),))


def _findings(found: Sequence[StoredFinding]) -> Section:
    """What diagnosis found, worst first, and what to do."""
    rows = [
        {
            "cells": [
                {"text": finding.severity, "dot": finding.severity},
                {
                    "text": finding.layer or "the run",
                    "style": "fs-main",
                    **({"role": finding.role.value, "sub": finding.role.value} if finding.role else {}),
                },
                {"text": _steps(finding), "right": True},
                {"text": f"{finding.says}: {finding.evidence}", "sub": finding.cause},
                {"text": finding.remedy, "sub": finding.change},
            ]
        }
        for finding in found[:MOST_FINDINGS]
    ]
    if not rows:
        return Section("Findings", "No rule found anything wrong while this run was watched.", ())
    heads = ("", "tensor", "steps", "what and why", "what to do")
    columns = [{"text": name, "right": name == "steps"} for name in heads]
    sentence = f"{text.count(len(found))} found" + (f", the worst {len(rows)} shown" if len(found) > len(rows) else "")
    return Section("Findings", sentence, ({"kind": "table", "rows": rows, "columns": columns, "empty": ""},))


def _steps(finding: StoredFinding) -> str:
    first, last = finding.first_step, finding.last_step
    return text.count(first) if first == last else f"{text.count(first)} – {text.count(last)}"


def _worst(found: Sequence[StoredFinding], slots: Sequence[Slot], reader: Reader, run: RunSummary) -> Iterable[Slot]:
    """The tensors with the worst findings, then those that lost most, then those with the least headroom."""
    by_number = {slot.slot: slot for slot in slots}
    everything = (run.last_step or 0) - (run.first_step or 0) + 1
    numbers = [finding.slot for finding in found if finding.slot is not None]
    by: tuple[Quantity, ...] = ("nonfinite", "overflow", "headroom")
    for quantity in by:
        top = reader.top(run.id, last_steps=everything, limit=MOST_TENSORS, by=quantity)
        numbers += [worst.slot for worst in top]
    return [by_number[number] for number in dict.fromkeys(numbers)][:MOST_TENSORS]


# the file


def _page(run: RunSummary, sections: Sequence[Section]) -> str:
    messages = [message for section in sections for message in section.messages]
    numbers = iter(range(len(messages)))
    body = "\n".join(
        f"<section><h2>{_text(section.title)}</h2><p>{_text(section.sentence)}</p>"
        + "".join(f'<div id="panel{next(numbers)}"></div>' for _ in section.messages)
        + "</section>"
        for section in sections
    )
    data = json.dumps(messages, allow_nan=False)
    parts = {
        "run": _text(run.ref),
        "facts": _text(_facts(run)),
        "outcome": _text(run.outcome_message),
        "body": body,
        "data": data.replace("<", r"\u003c"),
        "panel_css": assets.source("panel.css"),
        "panel_js": _packed("panel.js"),
        "plotly_js": _packed("plotly.js"),
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return re.sub("%%([a-z_]+)%%", lambda place: parts[place[1]], template)


def _facts(run: RunSummary) -> str:
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.created_unix_ns / 1e9))
    took = text.duration((run.last_seen_unix_ns - run.created_unix_ns) / 1e9)
    last = "–" if run.last_step is None else text.count(run.last_step)
    dropped = f" · {text.count(run.dropped_rows)} rows dropped" if run.dropped_rows else ""
    tags = f" · {', '.join(run.tags)}" if run.tags else ""
    return (
        f"{run.state} at step {last} · begun {made}, {took} · {run.ranks}/{run.world_size} ranks · "
        f"{text.count(run.rows)} rows{dropped}{tags}"
    )


def _text(value: str) -> str:
    return html.escape("".join(c if c.isprintable() or c == "\u2009" else "�" for c in value))


def _packed(name: str) -> str:
    return base64.b64encode(gzip.compress(assets.source(name).encode(), 9, mtime=0)).decode()


if __name__ == "__main__":
    main()
