"""history-pinned: one large value in the amax history holds the scale down."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.recipes import DelayedScaling
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.rolling import before, counted, smallest
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows in which the history's largest amax is 3 bits above everything recent, after the scale fell in one row.

    What the history holds follows from the scale, so nothing else need be known of it. It goes on until the value
    has left the history. A warning where a third of the format's range is lost, else info.
    Trust: four rows after the value. Source: Transformer Engine's rules (a history of 1024 keeps a value 1024 casts).
    """
    by_max = window.of_recipe(lambda recipe: isinstance(recipe, DelayedScaling) and recipe.algo == "max") == 1
    if not ((window.headroom - window.margins >= at.PINNED_BITS) & by_max).any():
        return  # of most windows
    lost = smallest(window.headroom, at.PINNED_ROWS) - window.margins
    pinned = (lost >= at.PINNED_BITS) & by_max
    fell = (before(window.scale_exp2, 1) - window.scale_exp2 >= at.PINNED_BY_BITS) & (window.age >= 3)
    bad = pinned & (counted(fell, 2 * at.PINNED_ROWS) > 0)
    severity = np.where(lost >= at.PINNED_SHARE * window.normal_bits, Severity.WARNING, Severity.INFO)
    numbers = {"lost": lost, "headroom": window.headroom}
    yield from findings(
        window, RULE.name, bad, lost, severity=severity, still=pinned, late=at.PINNED_ROWS - 1, numbers=numbers
    )


RULE = Rule(
    name="history-pinned",
    says="one large value in the amax history holds the scale down",
    cause="A single step had a value far above the others, a bad batch or a spike of the gradient, and the history "
    "keeps it for history_len casts. Meanwhile the tensor uses only the lower part of the format.",
    remedies={
        "": "Shorten the history, DelayedScaling(history_len=16), or scale this tensor just in time: "
        "convert_to_fp8(..., overrides=[Override('{layer}', role='{role}', recipe=CurrentScaling())]). "
        "Look at the batch of the first step named here.",
    },
    changes={"": changes.SHORT_HISTORY},
    evidence="{lost:.1f} bits of the format's range unused at worst",
    reach=8,
    check=check,
)
