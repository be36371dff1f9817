"""The command `fp8scope diagnose`: replays all rules over a stored run."""

from __future__ import annotations

import json
from collections.abc import Iterator

from fp8scope_collector.config import ConfigError
from fp8scope_collector.diagnosis.engine import diagnose
from fp8scope_collector.diagnosis.report import as_json as report_as_json
from fp8scope_collector.diagnosis.report import as_text
from fp8scope_collector.diagnosis.source import open_run


def diagnosis_of(url: str, ref: str, *, as_json: bool) -> Iterator[str]:
    """The lines to print.

    Raises:
        ConfigError: the run has no rows of statistics.
        StorageError, RunNotFound: as `open_run`.
    """
    stored = open_run(url, ref)
    diagnosis = diagnose(stored.pieces())
    if not diagnosis.rows:
        raise ConfigError(f"run {ref!r} has no rows of statistics; there is nothing to diagnose")
    if as_json:
        yield json.dumps(report_as_json(stored.summary, diagnosis), indent=2)
    else:
        yield from as_text(stored.summary, diagnosis)
