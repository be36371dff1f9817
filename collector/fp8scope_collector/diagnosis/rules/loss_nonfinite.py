"""loss-nonfinite: the loss is NaN or infinite; with the tensor that was so first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.records import Role
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.loss import losses
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Steps whose loss is NaN or infinite, at once, with the first tensor of the last 8 rows that was. Trust: exact."""
    bad = np.zeros((1, window.steps.size, 1), dtype=bool)
    for point in losses(window):
        bad[0, point.row, 0] |= not np.isfinite(point.value)
    yield from findings(
        window,
        RULE.name,
        bad,
        bad.astype(np.float64),
        severity=Severity.CRITICAL,
        note=lambda row, _: _origin(window, row),
        of_run=True,
    )


def _origin(window: Window, row: int) -> str:
    start = max(0, row - 7)
    rows, slots = np.nonzero((window["nonfinite"][:, start : row + 1] > 0).any(axis=0))
    if not rows.size:
        return "no FP8 tensor contained NaN or infinity up to then"
    at_first = slots[rows == rows[0]]
    forward = [s for s in at_first if window.slots[s].role != Role.GRAD_OUTPUT]
    first = window.slots[forward[0] if forward else at_first[-1]]
    return f"first not finite: {first.role} of {first.layer} at step {window.steps[start + int(rows[0])]}"


RULE = Rule(
    name="loss-nonfinite",
    says="the loss is NaN or infinite",
    cause="A tensor was not finite, in the data, the weights or the loss itself.",
    remedies={
        "": "Start at the tensor named here. Without one the loss function or the layers outside FP8 made it: a "
        "logarithm of zero, an empty batch, float16.",
    },
    changes={"": changes.SKIP_STEP},
    evidence="the loss is not a finite number",
    reach=7,
    check=check,
)
