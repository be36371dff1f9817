"""nonfinite: a tensor contains NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterator

from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows with NaN or infinite elements, at once.

    Of tensors that begin in one step the first in the order of computation is the origin: findings are listed so,
    forward in model order, then gradients from the last layer back. Trust: counts are exact; the cast itself makes
    none.
    """
    count = window["nonfinite"]
    numbers = {"count": count, "ratio": window.ratio("nonfinite")}
    yield from findings(window, RULE.name, count > 0, count, severity=Severity.CRITICAL, numbers=numbers)


RULE = Rule(
    name="nonfinite",
    says="the tensor contains NaN or infinity",
    cause="The data had it, or an operation before this layer made it: an overflow in float16, a division by zero, a "
    "logarithm of zero, a diverged weight. A weight with NaN stays so for the rest of the run.",
    remedies={
        "": "The layer listed first is nearest to the origin: if it is the first layer's input, look at the batch of "
        "that step; if a gradient, at the loss and the layers after it. Skip steps whose loss is not finite, and "
        "resume from a checkpoint before the first step named here.",
    },
    changes={"": changes.SKIP_STEP},
    evidence="{count:.0f} elements not finite at worst ({ratio:.2%})",
    reach=0,
    check=check,
)
