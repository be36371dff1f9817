"""scale-clamped: the scale is at its limit, and the tensor would need another."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.recipes import MAX_SCALE_EXP2, AmaxScaling, CurrentScaling, DelayedScaling
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.rolling import all_of_last
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows whose scale is at the recipe's clamp (or at float32's limit) while the headroom is not what it leaves.

    Two in a row. Critical where elements are clipped: the clamp binds on the wrong side.
    Trust: exact. Source: the clamp of 31 in the code of arXiv 2309.17224, which a small GPT's gradients reach.
    """
    clamps = window.of_recipe(lambda recipe: recipe.clamp if isinstance(recipe, AmaxScaling) else MAX_SCALE_EXP2)
    at_clamp = (np.abs(window.scale_exp2) >= clamps) & window.under(AmaxScaling, CurrentScaling, DelayedScaling)
    if not at_clamp.any():
        return
    excess = window.headroom - window.margins
    held = at_clamp & ((excess < 0) | (excess > 1))
    severity = np.where(window["overflow"] > 0, Severity.CRITICAL, Severity.WARNING)
    numbers = {"scale_exp2": window.scale_exp2, "headroom": window.headroom, "missing": excess}
    yield from findings(
        window, RULE.name, all_of_last(held, 2), np.abs(excess), severity=severity, still=held, late=1, numbers=numbers
    )


RULE = Rule(
    name="scale-clamped",
    says="the scale is at its limit",
    cause="The tensor is so small or so large that its scale would lie beyond the recipe's clamp: gradients without "
    "loss scaling under a clamp of 31, or a tensor that is about to vanish or to explode.",
    remedies={
        "AmaxScaling": "Widen the clamp, AmaxScaling(clamp=126), or scale the loss by a constant. If the clamp is 126 "
        "already, the tensor itself has gone wrong: see where it began to move.",
        "": "The scale is at float32's limit: the tensor itself has gone wrong. See where it began to move.",
    },
    changes={"AmaxScaling": changes.its_own("recipe=AmaxScaling(clamp=126)")},
    evidence="scale 2^{scale_exp2:.0f}, {missing:+.1f} bits from what the recipe would leave",
    reach=1,
    check=check,
)
