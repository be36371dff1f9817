"""All rules, in the order of how near they are to the cause: of two that begin alike the earlier is told first."""

from __future__ import annotations

from collections.abc import Mapping

from fp8scope_collector.diagnosis.finding import Rule
from fp8scope_collector.diagnosis.rules import (
    amax_growth,
    dead_tensor,
    depth_outlier,
    gradient_scale_falling,
    headroom_wasted,
    history_pinned,
    loss_nonfinite,
    loss_spike,
    nonfinite,
    overflow,
    rank_missing,
    rows_missing,
    run_silent,
    scale_clamped,
    scale_flapping,
    scale_frozen,
    scale_split,
    underflow,
    weight_scale_jump,
    weights_diverged,
)

RULES: tuple[Rule, ...] = (
    nonfinite.RULE,
    weights_diverged.RULE,
    weight_scale_jump.RULE,
    scale_frozen.RULE,
    amax_growth.RULE,
    dead_tensor.RULE,
    scale_clamped.RULE,
    history_pinned.RULE,
    overflow.RULE,
    underflow.RULE,
    gradient_scale_falling.RULE,
    scale_flapping.RULE,
    loss_nonfinite.RULE,
    loss_spike.RULE,
    scale_split.RULE,
    rank_missing.RULE,
    rows_missing.RULE,
    run_silent.RULE,
    headroom_wasted.RULE,
    depth_outlier.RULE,
)

BY_NAME: Mapping[str, Rule] = {rule.name: rule for rule in RULES}
