"""What a collector says of itself at its `/metrics`, where the dashboard is told the address: `FP8SCOPE_METRICS`.

The queue, the open connections and refused batches exist in the collector's process alone; everything else on the
system page is read from the database.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

DEFAULT_URL = "http://127.0.0.1:9464/metrics"
_WAITS_S = 0.5
_MOST_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Service:
    """Numbers of one collector, None where it has not said; `problem` says why there are none at all."""

    url: str
    problem: str = ""
    version: str = ""
    queue_bytes: float | None = None
    open_streams: float | None = None
    rows: float | None = None
    refused_batches: float | None = None
    commit_s: float | None = None
    database_up: float | None = None


def ask(url: str | None = None) -> Service:
    """What the collector at `url` says now; waits at most half a second."""
    url = url or os.environ.get("FP8SCOPE_METRICS") or DEFAULT_URL
    if not url.startswith(("http://", "https://")):
        return Service(url, problem="the address must begin with http:// or https://")
    try:
        with urllib.request.urlopen(url, timeout=_WAITS_S) as answer:
            written = answer.read(_MOST_BYTES).decode()
        samples: dict[tuple[Any, ...], float] = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(written)
            for sample in family.samples
        }
    except (OSError, ValueError, urllib.error.URLError) as error:
        return Service(url, problem=f"no collector answers: {getattr(error, 'reason', error)}")
    versions = [labels[0][1] for name, *labels in samples if name == "fp8scope_build_info" and labels]
    if not versions:
        return Service(url, problem="what answers is not a collector of fp8scope")
    count, total = samples.get(("fp8scope_commit_seconds_count",)), samples.get(("fp8scope_commit_seconds_sum",))
    return Service(
        url,
        version=versions[0],
        queue_bytes=samples.get(("fp8scope_queue_bytes",)),
        open_streams=samples.get(("fp8scope_open_streams",)),
        rows=samples.get(("fp8scope_ingest_rows_total",)),
        refused_batches=samples.get(("fp8scope_ingest_batches_total", ("outcome", "refused"))),
        commit_s=total / count if count and total is not None else None,
        database_up=samples.get(("fp8scope_database_up",)),
    )
