"""scale-frozen: the scale does not follow its tensor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8core.recipes import AmaxScaling, CurrentScaling, DelayedScaling
from fp8core.records import Role
from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.rolling import all_of_last, before, largest
from fp8scope_collector.diagnosis.window import Bools, Window


def check(window: Window) -> Iterator[Finding]:
    """Rows whose scale stayed although the recipe would have moved it, four in a row.

    Just-in-time scaling: the headroom is more than a bit from what the recipe leaves. Delayed scaling: the scale is 1
    as at the start though the tensor is elsewhere, or it does not allow for the amax of the row before, which is in the
    history, or (histories of at most 64) it remembers what has left it. In a longer history a scale that stays too
    low looks like one that is pinned: the rule history-pinned's.
    Trust: exact arithmetic of the recipe; with rows that are further apart than a sixteenth of the history the delayed
    half is not judged. Source: a failure known of Transformer Engine (a scale that stayed 1 from the start).
    """
    forgotten = _forgotten(window)
    window = window.recent(4)
    forgotten = forgotten[:, forgotten.shape[1] - window.steps.size :]
    scale = window["scale_min"]
    with np.errstate(invalid="ignore"):
        same = (scale == before(scale, 1)) & (scale == window["scale_max"])
    excess = window.headroom - window.margins
    off = (excess - at.FROZEN_BITS > at.FROZEN_BITS) | (excess < -at.FROZEN_BITS)
    stale = same & off & window.under(AmaxScaling, CurrentScaling) & ~_clamped(window)
    initial = (scale == 1) & off & window.under(DelayedScaling) & (window.age >= 1)
    still = stale | initial | (same & (_unheeded(window) | forgotten))
    if not still.any():
        return
    bad = all_of_last(still, at.FROZEN_ROWS)
    worst = np.abs(np.nan_to_num(excess))
    numbers = {"scale_exp2": window.scale_exp2, "headroom": window.headroom}
    yield from findings(
        window, RULE.name, bad, worst, severity=Severity.CRITICAL, still=still, late=at.FROZEN_ROWS - 1, numbers=numbers
    )


def _unheeded(window: Window) -> Bools:
    """Whether the scale is higher than the amax of the row before allows under delayed scaling."""
    remembered = window.of_recipe(lambda recipe: recipe.history_len if isinstance(recipe, DelayedScaling) else 0)
    distance = np.diff(window.steps, prepend=window.steps[:1])[None, :, None]
    tolerance = np.full(len(window.slots), at.REACTION)
    if len(window.ranks) > 1:
        tolerance[~window.of_role(Role.WEIGHT)] = at.REACTION_OF_RANKS
    with np.errstate(invalid="ignore", divide="ignore"):
        allowed = window.largest * 2.0**-window.margins / window["scale_min"]
        higher: Bools = before(window["amax"], 1) > allowed * tolerance
    return higher & (remembered >= 16 * distance)


def _forgotten(window: Window) -> Bools:
    """Whether the scale is lower than everything of the last 64 rows, none left out, would make it.

    Judged where a history of at most 64 casts cannot reach further back.
    """
    short = window.of_recipe(lambda recipe: isinstance(recipe, DelayedScaling) and recipe.history_len <= 64) == 1
    which = short & (window.of_role(Role.WEIGHT) | (len(window.ranks) == 1))
    forgotten = np.zeros(window["amax"].shape, dtype=bool)
    if not which.any():
        return forgotten
    amax, scale = (window[name][..., which] for name in ("amax", "scale_min"))
    distance = np.diff(window.steps, prepend=window.steps[:1] - 1)[None, :, None]
    unbroken = all_of_last((amax > 0) & (distance == 1), 64)
    with np.errstate(invalid="ignore", divide="ignore"):
        remembered = (window.largest * 2.0**-window.margins)[which] / scale
        lower = remembered > before(largest(amax, 64), 1) * at.REACTION
    forgotten[..., which] = lower & (before(unbroken.astype(np.float64), 1) == 1)
    return forgotten


def _clamped(window: Window) -> Bools:
    clamp = window.of_recipe(lambda recipe: recipe.clamp if isinstance(recipe, AmaxScaling) else 127)
    at_clamp: Bools = np.abs(window.scale_exp2) >= clamp
    return at_clamp


RULE = Rule(
    name="scale-frozen",
    says="the scale stays although the tensor moved",
    cause="The scale's state is not updated: a module that is not in training mode, a compiled graph or a wrapper that "
    "dropped the update, buffers restored from a checkpoint in each step, or a history that belongs to another tensor.",
    remedies={
        "DelayedScaling": "Check that the module is in training mode and that its buffer fp8_state_{role} changes from "
        "step to step. Until that is found, scale just in time: "
        "convert_to_fp8(..., overrides=[Override('{layer}', role='{role}', recipe=CurrentScaling())]).",
        "": "Just-in-time scaling has no state: the recorded scale is not of this tensor. Check what writes this slot.",
    },
    changes={"DelayedScaling": changes.ITS_OWN_CURRENT},
    evidence="scale 2^{scale_exp2:.1f} unchanged, headroom {headroom:+.1f} bits",
    reach=68,
    check=check,
)
