"""Numbers of a slot that another library has computed, under its names: which of them are fields of ours.

Transformer Engine's `cur_amax` is our amax and its `scale_inv` the inverse of our scale; what has no field here (mse,
underflows%, mean ...) travels as it is, by its own name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .encode import StepRows

# A recipe before the statistic says which cast it is of; these two have one scale a tensor, as a row of ours has.
_SCALE_INV = re.compile(r"(fp8_delayed_scaling_|fp8_current_scaling_)?scale_inv_(min|max)")
_FIELD_OF = {"min": "scale_max", "max": "scale_min"}  # the smallest inverse is of the largest scale


@dataclass(frozen=True)
class Named:
    """The value that `name` had for `slot` at `step`."""

    step: int
    slot: int
    name: str
    value: float


def split(values: Sequence[Named]) -> tuple[list[tuple[int, StepRows]], list[Named]]:
    """The rows of our fields that are in `values`, as (step, rows), and the values that have no field.

    Rows of one entry have the same fields; a field that was not reported is missing from `columns`.
    """
    fields: dict[tuple[int, int], dict[str, float]] = {}
    extremes: dict[tuple[int, int], dict[str, float]] = {}
    others: list[Named] = []
    for named in values:
        key = named.step, named.slot
        scale_inv = _SCALE_INV.fullmatch(named.name)
        if named.name == "cur_amax":
            fields.setdefault(key, {})["amax"] = named.value
        elif scale_inv is not None:
            inverse = 1.0 / named.value if named.value else np.inf
            fields.setdefault(key, {})[_FIELD_OF[scale_inv[2]]] = inverse
        else:
            others.append(named)
            if named.name in ("min", "max"):
                extremes.setdefault(key, {})[named.name] = abs(named.value)
    for key, both in extremes.items():
        if len(both) == 2:
            fields.setdefault(key, {}).setdefault("amax", max(both.values()))
    return _rows(fields), others


def _rows(fields: dict[tuple[int, int], dict[str, float]]) -> list[tuple[int, StepRows]]:
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for (step, slot), values in sorted(fields.items()):
        groups.setdefault((step, tuple(sorted(values))), []).append(slot)
    return [
        (
            step,
            StepRows(
                np.array(slots, np.int64),
                {name: np.array([fields[step, slot][name] for slot in slots], np.float32) for name in names},
            ),
        )
        for (step, names), slots in groups.items()
    ]
