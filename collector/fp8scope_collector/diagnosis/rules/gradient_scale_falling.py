"""gradient-scale-falling: the gradients of the last layers grow and stay large, so that their scale falls."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.records import Role
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, findings
from fp8scope_collector.diagnosis.rolling import before, mean, smallest
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows of the last quarter of the layers whose gradient's amax was 3 bits above its mean, four in a row.

    The mean is of the logarithms over 32 rows that ended four rows earlier. Judged by amax, so that it holds under
    every recipe. Trust: four rows; gradients of small batches spike for a single step, which does not count.
    Source: arXiv 2309.17224, figures 7 to 9: the last layer's gradient bias has spikes that grow with the model.
    """
    gradients = np.flatnonzero(window.of_role(Role.GRAD_OUTPUT))
    last = np.zeros(len(window.slots), dtype=bool)
    last[gradients[-max(1, gradients.size // 4) :]] = True
    amax = window.amax_exp2
    rise = np.full_like(amax, np.nan)
    late = amax[..., last]
    usual = before(mean(late, 32, at_least=16), at.GRADIENT_RISE_ROWS)
    rise[..., last] = smallest(late, at.GRADIENT_RISE_ROWS) - usual
    bad = (rise >= at.GRADIENT_RISE_BITS) & (window.age >= at.SETTLED_ROWS)
    numbers = {"bits": rise, "scale_exp2": window.scale_exp2}
    yield from findings(window, RULE.name, bad, rise, late=at.GRADIENT_RISE_ROWS - 1, numbers=numbers)


RULE = Rule(
    name="gradient-scale-falling",
    says="the gradient of one of the last layers grows and its scale falls",
    cause="The loss pulls harder at the end of the model than it did: the beginning of a divergence, a change of the "
    "data, a loss that is summed instead of averaged.",
    remedies={
        "": "Look at the loss and the gradient norm of these steps. Clip gradients "
        "(torch.nn.utils.clip_grad_norm_) or lower the learning rate before it reaches the layers below; check "
        "whether the data or the loss changed.",
    },
    changes={"": changes.CLIP_GRADIENTS},
    evidence="gradients {bits:.1f} bits above their usual size, scale 2^{scale_exp2:.1f}",
    reach=35,
    check=check,
)
