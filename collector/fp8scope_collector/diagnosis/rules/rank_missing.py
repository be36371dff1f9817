"""rank-missing: a rank has stopped sending rows while others go on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, findings
from fp8scope_collector.diagnosis.rolling import counted
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows of other ranks from the fifth on that a rank has no row in, which it had before. Trust: exact."""
    here = window.rank_present
    silent = counted(here, at.RANK_SILENT_ROWS) == 0
    bad = silent & (counted(here, at.RANK_SILENT_ROWS + 1) > 0)
    rows = np.where(here, 0.0, 1.0)
    yield from findings(window, RULE.name, bad, rows, still=~here, late=at.RANK_SILENT_ROWS - 1, of_run=True)


RULE = Rule(
    name="rank-missing",
    says="a rank has stopped sending rows while others go on",
    cause="Its process has died or hangs, its agent switched itself off, or its spool cannot reach the collector.",
    remedies={
        "": "Look at that rank's log. `fp8scope-agent status` on its machine says what waits there, `fp8scope-agent "
        "sync` sends it.",
    },
    changes={"": "fp8scope-agent status"},
    evidence="no row for at least 5 steps that others have",
    reach=at.RANK_SILENT_ROWS,
    check=check,
)
