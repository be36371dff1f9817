"""weights-diverged: a weight that was the same on all ranks is so no more."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.records import Role
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.rolling import all_of_last, counted
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows in which a weight's amax differs between ranks after four rows in which it was equal.

    Under tensor or pipeline parallelism shards never were equal, so they are never found; nor are ranks that began
    apart. Trust: exact and at once for the largest element; a weight may differ elsewhere first.
    """
    if len(window.ranks) < 2:
        return
    amax = window["amax"]
    several = (~np.isnan(amax)).sum(axis=0, keepdims=True) >= 2
    low = np.where(np.isnan(amax), np.inf, amax).min(axis=0, keepdims=True)
    high = np.where(np.isnan(amax), -np.inf, amax).max(axis=0, keepdims=True)
    weight = window.of_role(Role.WEIGHT)
    equal, apart = several & (low == high) & weight, several & (low < high) & weight
    were_equal = counted(all_of_last(equal, at.FROZEN_ROWS), at.FROZEN_ROWS) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(apart, high / low - 1, 0.0)
    numbers = {"share": share, "low": low, "high": high}
    yield from findings(
        window, RULE.name, apart & were_equal, share, severity=Severity.CRITICAL, still=apart, numbers=numbers
    )


RULE = Rule(
    name="weights-diverged",
    says="a weight that was the same on all ranks differs",
    cause="The ranks no longer take the same optimizer step: a gradient that is not reduced, a rank that skipped a "
    "step (a NaN that only it saw), memory or network corruption.",
    remedies={
        "": "Stop, and resume all ranks from one checkpoint before this step. Check that every parameter is in the "
        "reduction and that a step is skipped by all ranks or none.",
    },
    changes={"": "for tensor in model.state_dict().values(): torch.distributed.broadcast(tensor, src=0)"},
    evidence="amax from {low:.6g} to {high:.6g} over ranks",
    reach=6,
    check=check,
)
