"""depth-outlier: the first or the last layer is scaled unlike those between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.rolling import mean, median
from fp8scope_collector.diagnosis.window import Ints, Window
from fp8scope_collector.storage.readmodels import Slot

AT_ONCE = 200_000  # rows of tensors: what a processor keeps near itself


def check(window: Window) -> Iterator[Finding]:
    """Rows in which the first or last layer's mean amax of 16 rows is 3 bits from the median of those between.

    Layers belong together whose names differ in one number only (blocks.0.mlp.fc1, blocks.1.mlp.fc1 ...), five or more.
    Info: it is usual, and says which layers deserve a recipe of their own. Trust: after 32 rows.
    Source: arXiv 2309.17224, figures 6 to 9: the first layer's inputs, the last layer's gradients.
    """
    ends, apart = [], []
    for families in _families(window.slots):
        at_once = max(1, AT_ONCE // (window["amax"][..., 0].size * families.shape[1]))
        for start in range(0, len(families), at_once):
            some = families[start : start + at_once]
            level = mean(window.amax_exp2[..., some.ravel()], 16, at_least=8)[:, window.fresh :]
            level = level.reshape(*level.shape[:2], *some.shape)
            middle = median(level[..., 1:-1])
            ends += [some[:, 0], some[:, -1]]
            apart += [level[..., 0] - middle, level[..., -1] - middle]
    if not ends:
        return
    which = np.concatenate(ends)
    order = np.argsort(which)
    which, bits = which[order], np.concatenate(apart, axis=-1)[..., order]
    new = replace(window.recent(0), slots=tuple(window.slots[slot] for slot in which))
    size = np.nan_to_num(np.abs(bits))
    bad = (size >= at.DEPTH_BITS) & (new.age >= at.SETTLED_ROWS)
    numbers = {"bits": bits, "scale_exp2": window.recent(0).scale_exp2[..., which]}
    still = size >= at.DEPTH_BITS - 1
    yield from findings(new, RULE.name, bad, size, severity=Severity.INFO, still=still, numbers=numbers)


@lru_cache(maxsize=16)  # a run's windows have the same slots again and again
def _families(slots: tuple[Slot, ...]) -> list[Ints]:
    """Slots of one kind over depth: the same role, names that differ in their first number only.

    Those of as many members are together, [families, members].
    """
    families: dict[tuple[str, str], list[int]] = {}
    for index, slot in enumerate(slots):
        kind = re.sub(r"(^|\.)\d+(\.|$)", r"\1#\2", slot.layer, count=1)
        if kind != slot.layer:
            families.setdefault((kind, slot.role), []).append(index)
    sizes = {len(members) for members in families.values() if len(members) >= 5}
    return [np.array([members for members in families.values() if len(members) == size]) for size in sorted(sizes)]


RULE = Rule(
    name="depth-outlier",
    says="the first or last layer is scaled unlike those between them",
    cause="The first layer reads embeddings and the last one feels the loss directly; large models show both.",
    remedies={
        "": "Nothing, if nothing else is found. One constant for all layers will not fit this one: give it its own, "
        "convert_to_fp8(..., overrides=[Override('{layer}', role='{role}', recipe=AmaxScaling())]), or keep it in "
        "bfloat16.",
    },
    changes={"ConstantScaling": changes.ITS_OWN_AMAX},
    evidence="{bits:+.1f} bits from the median of the layers between, scale 2^{scale_exp2:.1f}",
    reach=15,
    check=check,
)
