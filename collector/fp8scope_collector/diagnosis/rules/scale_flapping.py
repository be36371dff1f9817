"""scale-flapping: an input's or weight's scale moves up and down by two exponents or more, again and again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.records import Role
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, findings
from fp8scope_collector.diagnosis.rolling import before, counted
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows whose scale moved by two exponents, as it did four times within 16 rows, in both directions.

    Gradients are left out: theirs moves at every second step where nothing is wrong.
    Trust: within 16 rows. Source: arXiv 2309.17224, figures 7 to 9: inputs and weights move by 1 and seldom.
    """
    change = window.scale_exp2 - before(window.scale_exp2, 1)
    up, down = change >= at.FLAP_BITS, change <= -at.FLAP_BITS
    moved = (up | down) & ~window.of_role(Role.GRAD_OUTPUT) & (window.age >= 3)
    if not moved.any():
        return
    ups, downs = counted(up & moved, 16), counted(down & moved, 16)
    bad = moved & (ups + downs >= at.FLAPS) & (ups > 0) & (downs > 0)
    worst = np.nan_to_num(np.abs(change))
    numbers = {"bits": worst, "moves": (ups + downs).astype(np.float64)}
    yield from findings(window, RULE.name, bad, worst, still=moved, numbers=numbers)


RULE = Rule(
    name="scale-flapping",
    says="the scale moves up and down by two exponents or more",
    cause="The tensor's largest element comes and goes: an outlier channel or token that only some batches have, or "
    "two kinds of batch in turn. Where it is there, everything else in the tensor has fewer bits.",
    remedies={
        "": "Find the outlier's channel in this layer's {role}; batches that alternate belong mixed. If it belongs "
        "there, keep the layer in bfloat16 by module_filter_fn=lambda module, name: name != '{layer}'.",
    },
    changes={"": changes.BFLOAT16},
    evidence="{moves:.0f} moves within 16 rows, up to {bits:.1f} bits",
    reach=16,
    check=check,
)
