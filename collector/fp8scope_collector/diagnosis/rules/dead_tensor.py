"""dead-tensor: a tensor is zero, all of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.records import Role
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, findings
from fp8scope_collector.diagnosis.rolling import all_of_last
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows in which every element was zero, four in a row; of weights after the first 32 rows only.

    Zero-initialised layers begin so and leave it with the first optimizer steps. Trust: exact; four rows.
    """
    dead = window["zeros"] == window["numel"]
    settled = np.where(window.of_role(Role.WEIGHT), window.age >= at.SETTLED_ROWS, window.age >= at.DEAD_ROWS)
    bad = all_of_last(dead, at.DEAD_ROWS) & settled
    yield from findings(
        window, RULE.name, bad, window["numel"], still=dead, late=at.DEAD_ROWS - 1, numbers={"numel": window["numel"]}
    )


RULE = Rule(
    name="dead-tensor",
    says="the tensor is all zeros",
    cause="The layer is cut off: a mask or a residual factor of zero, an activation that is dead for every input, a "
    "parameter that no loss reaches, gradients detached or underflowed before this layer.",
    remedies={
        "": "A dead grad_output: what comes after {layer} does not use it. A dead input: what comes before gives "
        "nothing. If it is meant so, leave the layer out: module_filter_fn=lambda module, name: name != '{layer}'.",
    },
    changes={"": changes.BFLOAT16},
    evidence="all {numel:.0f} elements are zero",
    reach=3,
    check=check,
)
