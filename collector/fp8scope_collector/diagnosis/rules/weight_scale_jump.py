"""weight-scale-jump: a weight's amax, and with it its scale, jumps by two exponents in one step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.records import Role
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.rolling import before
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows in which a weight's amax is four times, or a quarter of, that of the row before.

    Judged by amax and not by the scale, so that it holds under every recipe and delayed scaling shows it at once. The
    first rows of a process life are left out: a zero-initialised weight grows by any factor there. Critical from 6
    bits.
    Trust: one row. Source: arXiv 2309.17224, figures 7 to 9: a weight's scaling bias moves by 1, and seldom.
    """
    weights = window.of_role(Role.WEIGHT)
    amax = window["amax"][..., weights]
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = np.log2(amax / before(amax, 1))
    far = np.where(np.isfinite(moved), np.abs(moved), 0.0)
    if not (far >= at.WEIGHT_JUMP_BITS).any():
        return
    bits, size = np.full(window["amax"].shape, np.nan), np.zeros(window["amax"].shape)
    bits[..., weights], size[..., weights] = moved, far
    severity = np.where(size >= at.WEIGHT_JUMP_CRITICAL_BITS, Severity.CRITICAL, Severity.WARNING)
    numbers = {"bits": bits, "amax": window["amax"]}
    bad = (size >= at.WEIGHT_JUMP_BITS) & (window.age >= at.DEAD_ROWS)
    yield from findings(window, RULE.name, bad, size, severity=severity, numbers=numbers)


RULE = Rule(
    name="weight-scale-jump",
    says="the weight's scale jumped by two exponents or more in one step",
    cause="Something other than a normal optimizer step wrote the weight: a corrupted element, a bad checkpoint or "
    "merge, a learning rate many times too high, an optimizer state that was lost.",
    remedies={
        "": "Compare the weight of this layer with the checkpoint before the step: a single row or element that "
        "stands out is corruption, all of it is the optimizer. Resume from before the step.",
    },
    evidence="amax moved by {bits:+.1f} bits in one step, to {amax:.3g}",
    reach=1,
    check=check,
)
