"""underflow: non-zero elements become zero."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.recipes import DelayedScaling
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.rolling import all_of_last
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows in which more than a twentieth of the non-zero elements became zero, three in a row.

    From a half on it is critical. The first row under delayed scaling is left out: it is cast with the scale 1.
    Trust: counts are exact; a tensor with very many tiny elements (a sparse gradient) may lose them without harm.
    Source: at 5 % the SQNR of a normal distribution has dropped by 3 dB.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = window["underflow"] / (window["numel"] - window["zeros"])
    settled = ~window.under(DelayedScaling) | (window.age >= 1)
    lost = (ratio > at.UNDERFLOW_RATIO) & settled
    bad = all_of_last(lost, at.UNDERFLOW_ROWS)
    severity = np.where(ratio > at.UNDERFLOW_CRITICAL, Severity.CRITICAL, Severity.WARNING)
    numbers = {"ratio": ratio, "headroom": window.headroom}
    yield from findings(
        window, RULE.name, bad, ratio, severity=severity, still=lost, late=at.UNDERFLOW_ROWS - 1, numbers=numbers
    )


RULE = Rule(
    name="underflow",
    says="non-zero elements are flushed to zero",
    cause="The scale is too low for the tensor: a constant from another model, a history that still remembers a large "
    "value, or gradients that shrank. Under just-in-time scaling the tensor itself is wider than the format.",
    remedies={
        "ConstantScaling": "Raise the exponent of this role, ConstantScaling({role}=...), by no more than the "
        "headroom, or scale this tensor by its own amax: "
        "convert_to_fp8(..., overrides=[Override('{layer}', role='{role}', recipe=AmaxScaling())]).",
        "DelayedScaling": "Forget sooner with DelayedScaling(history_len=16), or scale this tensor just in time: "
        "convert_to_fp8(..., overrides=[Override('{layer}', role='{role}', recipe=CurrentScaling())]).",
        "": "Give this tensor the wider format: convert_to_fp8(..., overrides=[Override('{layer}', role='{role}', "
        "fmt=E5M2)]), and look for the outlier that sets its amax.",
    },
    changes={
        "ConstantScaling": changes.ITS_OWN_AMAX,
        "DelayedScaling": changes.ITS_OWN_CURRENT,
        "": changes.its_own("fmt=E5M2"),
    },
    evidence="{ratio:.1%} of the non-zero elements lost at worst, headroom {headroom:+.1f} bits",
    reach=2,
    check=check,
)
