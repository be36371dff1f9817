"""overflow: elements are clipped by the cast."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.recipes import AmaxScaling, ConstantScaling, CurrentScaling
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.rolling import all_of_last, counted
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows whose elements were clipped more than the recipe may.

    Just-in-time scaling comes from the tensor itself: one clipped element is a fault, at once and critical. Delayed
    scaling clips a little while amax rises, a constant a little always: they are judged by share, in one row where it
    is large, else over several. The first two rows under delayed scaling (scale 1, then one amax) are left out.
    Trust: counts are exact. Source: arXiv 2310.18313 (share), 2309.17224 figure 5 (constants).
    """
    if not (window["overflow"] > 0).any():
        return
    ratio = window.ratio("overflow")
    just_in_time = window.under(AmaxScaling, CurrentScaling)
    constant = window.under(ConstantScaling)
    settled = constant | (window.age >= 2)
    many = (ratio > at.OVERFLOW_RATIO) & (window["overflow"] >= at.OVERFLOW_ELEMENTS)
    often = counted(many, 8) >= at.OVERFLOW_ROWS
    steadily = all_of_last(ratio > at.CONSTANT_OVERFLOW_RATIO, 3)
    too_much = (ratio > at.OVERFLOW_AT_ONCE) | np.where(constant, steadily, often & many)
    bad = np.where(just_in_time, ratio > 0, too_much & settled)
    severity = np.where(just_in_time | (ratio > at.OVERFLOW_CRITICAL), Severity.CRITICAL, Severity.WARNING)
    still = ratio > at.OVERFLOW_RATIO
    numbers = {"ratio": ratio, "headroom": window.headroom}
    yield from findings(window, RULE.name, bad, ratio, severity=severity, still=still, numbers=numbers)


RULE = Rule(
    name="overflow",
    says="elements beyond the format's range are clipped to its maximum",
    cause="The scale is too high for the tensor: a constant from another model, an amax history that has not seen "
    "values this large, an outlier. Under just-in-time scaling it cannot happen: the scale was not made from this "
    "tensor.",
    remedies={
        "ConstantScaling": "Lower the exponent of this role, ConstantScaling({role}=...), by the bits that headroom is "
        "below 0, or scale this tensor by its own amax: "
        "convert_to_fp8(..., overrides=[Override('{layer}', role='{role}', recipe=AmaxScaling())]).",
        "DelayedScaling": "Leave room with DelayedScaling(margin_bits=1), or scale this tensor just in time: "
        "convert_to_fp8(..., overrides=[Override('{layer}', role='{role}', recipe=CurrentScaling())]).",
        "": "Look for a cast that uses another tensor's scale, or for a clamp that binds (AmaxScaling(clamp=126) is "
        "the widest).",
    },
    changes={"ConstantScaling": changes.ITS_OWN_AMAX, "DelayedScaling": changes.ITS_OWN_CURRENT},
    evidence="{ratio:.2%} of the elements clipped at worst, headroom {headroom:+.1f} bits",
    reach=7,
    check=check,
)
