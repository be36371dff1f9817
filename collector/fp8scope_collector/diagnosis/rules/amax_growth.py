"""amax-growth: a weight or an input keeps doubling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fp8core.records import Role
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, findings
from fp8scope_collector.diagnosis.rolling import before, largest, smallest
from fp8scope_collector.diagnosis.window import Bools, Floats, Window


def check(window: Window) -> Iterator[Finding]:
    """Rows of a weight whose amax grew by an eighth of a bit a step over 4 rows, or of an input's that keeps doubling.

    An input counts where it rose above the 32 rows before it in two rows, to twice their largest and by half a bit in
    the second; where the last 4 rows are all half a bit above the 32 before and rise by half a bit; or where the
    smallest of 8 rows is four times the largest of the 8 that ended 64 rows earlier. A spike, or a step to another
    level, is none of these. A weight may not have jumped in a single row: that is the rule weight-scale-jump's. The
    first 32 rows of a process life are left out (warm-up). Trust: weights in four rows, inputs in two where they
    double within two and in four where within four, else slowly. Source: outliers that grow until FP8 diverges,
    arXiv 2409.12517 and 2505.20524.
    """
    new = window.recent(0)
    grown, rows = (np.full(new["amax"].shape, np.nan) for _ in range(2))
    bad = np.zeros(grown.shape, dtype=bool)
    for which, judged in ((_rising_weights(window), _weights), (_rising_inputs(window), _inputs)):
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


def _rising_weights(window: Window) -> Bools:
    """The weights of which the condition above may be true: the others are not looked at."""
    return _rising(window, Role.WEIGHT, {4: 4 * at.WEIGHT_GROWTH_BITS})  # four rows are four steps or more


def _rising_inputs(window: Window) -> Bools:
    """The inputs of which a condition below may be true, and those with rows that say nothing."""
    rising = _rising(window, Role.INPUT, {1: at.INPUT_RISE_BITS, 3: at.INPUT_RISE_BITS, 64: at.INPUT_GROWTH_BITS})
    return rising | (window.of_role(Role.INPUT) & np.isnan(window.amax_exp2).any(axis=(0, 1)))


def _rising(window: Window, role: Role, bits: Mapping[int, float]) -> Bools:
    """The tensors of a role that rise by so many bits within so many rows, in any fresh row."""
    which = window.of_role(role)
    amax = window.amax_exp2[..., which]
    rising = np.zeros(amax.shape[-1], dtype=bool)
    for back, least in bits.items():
        first = max(window.fresh, back)
        with np.errstate(invalid="ignore"):
            rising |= (amax[:, first:] - amax[:, first - back : -back] >= least).any(axis=(0, 1))
    which[which] = rising
    return which


def _inputs(window: Window, which: Bools) -> tuple[Floats, Floats, Bools]:
    """The same of inputs, which double at once, soon or slowly."""
    amax = window.amax_exp2[..., which]
    of_32, rise = largest(amax, 32), amax - before(amax, 1)
    slowly = smallest(amax, 8) - before(largest(amax, 8), 64)
    above = smallest(amax, 4) - before(of_32, 4)
    doubling = (above >= at.INPUT_DOUBLING_BITS) & (amax - before(amax, 3) >= at.INPUT_RISE_BITS)
    doubled = amax - before(of_32, 2)
    at_once = (
        (doubled >= at.INPUT_DOUBLED_BITS) & (doubled - rise >= at.INPUT_RISING_BITS) & (rise >= at.INPUT_RISE_BITS)
    )
    bad = at_once | doubling | ((slowly >= at.INPUT_GROWTH_BITS) & (window.age >= at.SETTLED_ROWS + 72))
    grown = np.select([doubling, at_once], [above, doubled], slowly)
    rows = np.select([doubling, at_once], [36.0, 34.0], 64.0)
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
