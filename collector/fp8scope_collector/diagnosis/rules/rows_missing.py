"""rows-missing: recorded steps or tensors are not there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.rolling import before, counted
from fp8scope_collector.diagnosis.window import Bools, Floats, Window


def check(window: Window) -> Iterator[Finding]:
    """Rows after a gap in the steps (a warning), and tensors without a row where their rank has others (info).

    A gap is a distance of steps that is larger than the one which the last four agreed on, or rows of other ranks that
    this rank has not. A tensor must have had a row within the last 64. Trust: exact for gaps; a module that a step does
    not use (an expert, a dropped layer) has no row either, hence info.
    """
    here = window.rank_present
    missing = np.maximum(_skipped_steps(window), _skipped_by_rank(here))
    yield from findings(window, RULE.name, here & (missing > 0), missing, numbers={"missing": missing}, of_run=True)
    gone = ~window.present & here
    if not gone.any():
        return
    gone &= counted(window.present, 64) > 0
    one = gone.astype(np.float64)
    yield from findings(window, RULE.name, gone, one, severity=Severity.INFO, numbers={"missing": one})


def _skipped_steps(window: Window) -> Floats:
    """Recorded steps that should lie between each row and the one before, [1, steps, 1]."""
    distance = np.diff(window.steps, prepend=window.steps[:1])[None, :, None].astype(np.float64)
    usual = before(distance, 1)
    with np.errstate(invalid="ignore"):
        regular = (usual > 0) & np.logical_and.reduce([before(distance, back) == usual for back in (2, 3, 4)])
        return np.where(regular & (distance > usual), np.ceil(distance / np.maximum(usual, 1)) - 1, 0.0)


def _skipped_by_rank(here: Bools) -> Floats:
    """Rows of other ranks between each row of a rank and its one before, [ranks, steps, 1]; 0 beyond 64."""
    index = np.broadcast_to(np.arange(here.shape[1], dtype=np.float64)[None, :, None], here.shape)
    last = np.maximum.accumulate(np.where(here, index, -np.inf), axis=1)
    gap = index - before(last, 1) - 1
    return np.where((gap > 0) & (gap <= 64), gap, 0.0)


RULE = Rule(
    name="rows-missing",
    says="rows are missing",
    cause="The agent dropped them because steps followed each other faster than they could be written, or the spool "
    "was full; or the module was not used in these steps.",
    remedies={
        "": "`fp8scope runs` says how many rows the agent dropped; record fewer steps with attach(..., every=10), or "
        "allow a larger spool. A module that is used in some steps only needs nothing.",
    },
    changes={"": "attach(model, run=run, every=10)"},
    evidence="{missing:.0f} missing in a row at worst",
    reach=65,
    check=check,
)
