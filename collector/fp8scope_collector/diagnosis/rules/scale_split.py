"""scale-split: one rank scales a tensor unlike the others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.records import Role
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, findings
from fp8scope_collector.diagnosis.rolling import mean
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Rows in which the mean amax of 16 rows differs between ranks by 2 bits (inputs) or 4 (gradients).

    Weights are left out: shards of tensor parallelism differ by right (see weights-diverged). Trust: after 16 rows;
    where ranks hold different experts or parts of a sequence, this is how they are. Source: a failure known of
    Megatron-LM, a wrong group of ranks for the amax reduction.
    """
    if len(window.ranks) < 2:
        return
    level = mean(window.amax_exp2, 16, at_least=16)
    low, high = np.where(np.isnan(level), np.inf, level), np.where(np.isnan(level), -np.inf, level)
    spread = np.maximum(high.max(axis=0) - low.min(axis=0), 0.0)[None]
    limit = np.where(window.of_role(Role.GRAD_OUTPUT), at.SPLIT_BITS_GRAD, at.SPLIT_BITS_INPUT)
    bad = (spread >= limit) & ~window.of_role(Role.WEIGHT)
    ranks = np.array(window.ranks, dtype=np.float64)
    numbers = {"bits": spread, "high": ranks[high.argmax(axis=0)][None], "low": ranks[low.argmin(axis=0)][None]}
    yield from findings(window, RULE.name, bad, spread, numbers=numbers)


RULE = Rule(
    name="scale-split",
    says="a rank's values are of another size than the others'",
    cause="The ranks do not train the same thing: another shard of data (padding, another source), dropout or "
    "normalisation that differs, or a communication group that leaves a rank out.",
    remedies={
        "": "Compare the two ranks' batches and the groups that their gradients are reduced over. Ranks that hold "
        "different experts or parts of a sequence need nothing.",
    },
    evidence="rank {high:.0f} is {bits:.1f} bits above rank {low:.0f}",
    reach=15,
    check=check,
)
