"""amax-growth: a weight or an input keeps doubling."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.records import Role
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, findings
from fp8scope_collector.diagnosis.rolling import before, largest, smallest
from fp8scope_collector.diagnosis.window import Window, log2


def check(window: Window) -> Iterator[Finding]:
    """Rows of a weight whose amax grew by an eighth of a bit a step over 4 rows, or of an input's that keeps doubling.

    An input counts where the last 4 rows are all half a bit above the 32 before and rise by half a bit; or where
    the smallest of 8 rows is four times the largest of the 8 that ended 64 rows earlier, so that a spike does not.
    A weight may not have jumped in a single row: that is the rule weight-scale-jump's. The first 32 rows of a
    process life are left out (warm-up). Trust: weights in four rows, inputs in four rows where they double within
    four, else slowly. Source: outliers that grow until FP8 diverges, arXiv 2409.12517 and 2505.20524.
    """
    amax = log2(window["amax"])
    rise = amax - before(amax, 1)
    steepest = largest(np.nan_to_num(rise), 4)
    of_weight = np.where(steepest < at.WEIGHT_JUMP_BITS, amax - before(amax, 4), np.nan)
    steps = before(window.steps[None, :, None].astype(np.float64), 4)
    too_fast = of_weight >= at.WEIGHT_GROWTH_BITS * (window.steps[None, :, None] - steps)
    of_input = smallest(amax, 8) - before(largest(amax, 8), 64)
    above = smallest(amax, 4) - before(largest(amax, 32), 4)
    doubling = (above >= at.INPUT_DOUBLING_BITS) & (amax - before(amax, 3) >= at.INPUT_RISE_BITS)
    settled = window.age >= at.SETTLED_ROWS
    weight, tensor = window.of_role(Role.WEIGHT), window.of_role(Role.INPUT)
    slowly = (window.age >= at.SETTLED_ROWS + 72) & (of_input >= at.INPUT_GROWTH_BITS)
    bad = settled & ((weight & too_fast) | (tensor & (doubling | slowly)))
    of_input = np.where(doubling, above, of_input)
    grown = np.where(weight, of_weight, of_input)
    rows = np.where(weight, 4.0, np.where(doubling, 36.0, 64.0))
    numbers = {"bits": grown, "rows": np.broadcast_to(rows, grown.shape), "amax": window["amax"]}
    yield from findings(window, RULE.name, bad, grown, numbers=numbers)


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
    check=check,
)
