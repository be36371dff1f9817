"""Writes fp8scope.json, a dashboard for Grafana 10 and later, beside this file: `python deploy/grafana/make.py`.

Import the file in Grafana and choose the Prometheus that scrapes the collectors. It shows what alerts are made of, per
run and role; tensors, scales and histories are in fp8scope's own dashboard, to which the findings link.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("fp8scope.json")
SOURCE = {"type": "prometheus", "uid": "${prometheus}"}
RUN = 'run=~"$run"'
ROWS: list[tuple[str, list[tuple[str, str, str, str]]]] = [  # title; panels: title, unit, expression, legend
    (
        "Runs",
        [
            ("Last step", "short", f"max by (run) (fp8scope_run_last_step{{{RUN}}})", "{{run}}"),
            (
                "Silent for",
                "s",
                f"time() - max by (run) (fp8scope_run_last_seen_timestamp_seconds{{{RUN}}})",
                "{{run}}",
            ),
            (
                "Open findings",
                "short",
                f"max by (run, severity) (fp8scope_open_findings{{{RUN}}})",
                "{{run}} {{severity}}",
            ),
        ],
    ),
    (
        "Tensors, the worst of each role",
        [
            (
                "Clipped, worst tensor",
                "percentunit",
                f"max by (run, role) (fp8scope_worst_overflow_ratio{{{RUN}}})",
                "{{run}} {{role}}",
            ),
            (
                "Headroom, lowest (bits)",
                "short",
                f"min by (run, role) (fp8scope_lowest_headroom_bits{{{RUN}}})",
                "{{run}} {{role}}",
            ),
            (
                "Lost to zero",
                "percentunit",
                f"sum by (run, role) (rate(fp8scope_underflow_elements_total{{{RUN}}}[5m])) / "
                f"sum by (run, role) (rate(fp8scope_elements_total{{{RUN}}}[5m]))",
                "{{run}} {{role}}",
            ),
        ],
    ),
    (
        "Collectors",
        [
            ("Rows a second", "short", "rate(fp8scope_ingest_rows_total[1m])", "{{instance}}"),
            (
                "Commit, 99th percentile",
                "s",
                "histogram_quantile(0.99, sum by (instance, le) (rate(fp8scope_commit_seconds_bucket[5m])))",
                "{{instance}}",
            ),
            ("Waiting for the database", "bytes", "fp8scope_queue_bytes", "{{instance}}"),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = [findings_table()]
    for number, (title, own) in enumerate(ROWS):
        top = 8 + 9 * number
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}, "panels": []})
        panels += [panel(*each, x=8 * i, y=top + 1) for i, each in enumerate(own)]
    for number, each in enumerate(panels, 1):
        each["id"] = number
    return {
        "title": "fp8scope",
        "uid": "fp8scope",
        "schemaVersion": 39,
        "tags": ["fp8scope"],
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {"list": [variable_source(), variable_run()]},
        "panels": panels,
    }


def panel(title: str, unit: str, expression: str, legend: str, *, x: int, y: int) -> dict[str, Any]:
    """Curves over time."""
    return {
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [{"refId": "A", "expr": expression, "legendFormat": legend, "datasource": SOURCE}],
    }


def findings_table() -> dict[str, Any]:
    """What is open now, by name."""
    expression = f"max by (run, severity, rule, layer, role) (fp8scope_finding{{{RUN}}})"
    return {
        "type": "table",
        "title": "Open findings",
        "datasource": SOURCE,
        "gridPos": {"x": 0, "y": 0, "w": 24, "h": 8},
        "targets": [{"refId": "A", "expr": expression, "instant": True, "format": "table", "datasource": SOURCE}],
        "transformations": [{"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}}}],
    }


def variable_source() -> dict[str, Any]:
    """Which Prometheus."""
    return {"name": "prometheus", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def variable_run() -> dict[str, Any]:
    """Which runs."""
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": SOURCE,
        "query": "label_values(fp8scope_run_active, run)",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def text() -> str:
    """What the file holds."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
