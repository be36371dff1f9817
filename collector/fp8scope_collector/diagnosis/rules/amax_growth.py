"""amax-growth: a weight or an input keeps doubling."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.records import Role
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, findings
from fp8scope_collector.diagnosis.rolling import before, largest, smallest
from fp8scope_collector.diagnosis.window import Bools, Floats, Window


def check(window: Window) -> Iterator[Finding]:
    """Rows of a weight whose amax grew by an eighth of a bit a step over 4 rows, or of an input's that keeps doubling.

    An input counts where the last 4 rows are all half a bit above the 32 before and rise by half a bit; or where
    the smallest of 8 rows is four times the largest of the 8 that ended 64 rows earlier, so that a spike does not.
    A weight may not have jumped in a single row: that is the rule weight-scale-jump's. The first 32 rows of a
    process life are left out (warm-up). Trust: weights in four rows, inputs in four rows where they double within
    four, else slowly. Source: outliers that grow until FP8 diverges, arXiv 2409.12517 and 2505.20524.
    """
    new = window.recent(0)
    grown, rows = (np.full(new["amax"].shape, np.nan) for _ in range(2))
    bad = np.zeros(grown.shape, dtype=bool)
    for role, judged in ((Role.WEIGHT, _weights), (Role.INPUT, _inputs)):
        which = window.of_role(role)
        grown[..., which], rows[..., which], bad[..., which] = judged(window, which)
    bad &= new.age >= at.SETTLED_ROWS
    yield from findings(new, RULE.name, bad, grown, numbers={"bits": grown, "rows": rows, "amax": new["amax"]})


def _weights(window: Window, which: Bools) -> tuple[Floats, float, Bools]:
    """By how many bits the fresh rows of weights grew, within how many rows, and whether that is too fast."""
    window = window.recent(4)
    amax = window.amax_exp2[..., which]
    steepest = largest(np.nan_to_num(amax - before(amax, 1)), 4)
    grown = np.where(steepest < at.WEIGHT_JUMP_BITS, amax - before(amax, 4), np.nan)
    steps = window.steps[None, :, None].astype(np.float64)
    too_fast = grown >= at.WEIGHT_GROWTH_BITS * (steps - before(steps, 4))
    return grown[:, window.fresh :], 4.0, too_fast[:, window.fresh :]


def _inputs(window: Window, which: Bools) -> tuple[Floats, Floats, Bools]:
    """The same of inputs, which double at once or slowly."""
    amax = window.amax_exp2[..., which]
    slowly = smallest(amax, 8) - before(largest(amax, 8), 64)
    above = smallest(amax, 4) - before(largest(amax, 32), 4)
    doubling = (above >= at.INPUT_DOUBLING_BITS) & (amax - before(amax, 3) >= at.INPUT_RISE_BITS)
    bad = doubling | ((slowly >= at.INPUT_GROWTH_BITS) & (window.age >= at.SETTLED_ROWS + 72))
    grown, rows = np.where(doubling, above, slowly), np.where(doubling, 36.0, 64.0)
    return grown[:, window.fresh :], rows[:, window.fresh :], bad[:, window.fresh :]


RULE = Rule(
    name="amax-growth",
    says="the largest element keeps doubling",
    cause="A weight that doubles within a few steps has a learning rate that is much too high. An input that keeps "
    "growing has an outlier channel: SwiGLU's two weights aligning, a missing norm, attention that sharpens.",
    remedies={
        "": "Weight: lower the learning rate, lengthen its warm-up, check the optimizer's state after a resume. "
        "Input: norm or clip before this layer, weight decay on the layer that makes the outlier, or this layer in "
        "bfloat16 by module_filter_fn=lambda module, name: name != '{layer}'.",
    },
    changes={"weight": "for group in optimizer.param_groups: group['lr'] /= 10", "input": changes.BFLOAT16},
    evidence="amax grew by {bits:.1f} bits within {rows:.0f} rows, to {amax:.3g}",
    reach=71,
    check=check,
)
