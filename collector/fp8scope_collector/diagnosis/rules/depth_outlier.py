"""depth-outlier: the first or the last layer is scaled unlike those between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, Severity, findings
from fp8scope_collector.diagnosis.rolling import mean
from fp8scope_collector.diagnosis.window import Ints, Window
from fp8scope_collector.storage.readmodels import Slot


def check(window: Window) -> Iterator[Finding]:
    """Rows in which the first or last layer's mean amax of 16 rows is 3 bits from the median of those between.

    Layers belong together whose names differ in one number only (blocks.0.mlp.fc1, blocks.1.mlp.fc1 ...), five or more.
    Info: it is usual, and says which layers deserve a recipe of their own. Trust: after 32 rows.
    Source: arXiv 2309.17224, figures 6 to 9: the first layer's inputs, the last layer's gradients.
    """
    new = window.recent(0)
    level = mean(window.amax_exp2, 16, at_least=8)[:, window.fresh :]
    apart = np.full(level.shape, np.nan)
    for families in _families(window.slots):
        with np.errstate(invalid="ignore"):
            middle = np.median(level[..., families[:, 1:-1]], axis=-1)
        for end in (0, -1):
            apart[..., families[:, end]] = level[..., families[:, end]] - middle
    size = np.nan_to_num(np.abs(apart))
    bad = (size >= at.DEPTH_BITS) & (new.age >= at.SETTLED_ROWS)
    numbers = {"bits": apart, "scale_exp2": new.scale_exp2}
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
