"""headroom-wasted: half of the format's range lies unused above the tensor."""

from __future__ import annotations

from collections.abc import Iterator

from fp8core.recipes import ConstantScaling, DelayedScaling
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.rolling import all_of_last
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows in which the largest element stayed below the format's range by half of its bits, sixteen in a row.

    Info: FP8 has the same relative precision everywhere in its normal range, so nothing is lost until elements become
    subnormal or zero, which the rule underflow counts. Trust: exact; slow on purpose.
    """
    excess = window.headroom - window.margins
    wasted = (excess >= at.WASTED_SHARE * window.normal_bits) & window.under(ConstantScaling, DelayedScaling)
    bad = all_of_last(wasted, at.WASTED_ROWS)
    numbers = {"headroom": window.headroom, "scale_exp2": window.scale_exp2}
    yield from findings(
        window, RULE.name, bad, excess, severity=Severity.INFO, still=wasted, late=at.WASTED_ROWS - 1, numbers=numbers
    )


RULE = Rule(
    name="headroom-wasted",
    says="half of the format's range is unused",
    cause="The scale is far lower than the tensor needs: a constant chosen for another role or model, or a history "
    "that remembers the large values of the first steps.",
    remedies={
        "ConstantScaling": "Raise the exponent of this role, ConstantScaling({role}=...), by the headroom less two or "
        "three bits.",
        "": "Shorten the history, DelayedScaling(history_len=16), or scale just in time, CurrentScaling().",
    },
    changes={"ConstantScaling": changes.ITS_OWN_AMAX, "": changes.SHORT_HISTORY},
    evidence="{headroom:.1f} bits of headroom at scale 2^{scale_exp2:.1f}",
    reach=15,
    check=check,
)
