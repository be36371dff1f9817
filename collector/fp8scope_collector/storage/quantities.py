"""What can be asked of a slot: how SQL computes each quantity from a row, how ranks merge, and the last step in numpy.

SQL on SQLite has no logarithm that can be relied on, so it computes something that orders like the answer (amax * scale
for headroom, noise / signal for the SQNR), takes minimum and maximum of that, and `in_unit` takes the logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from fp8core.records import FIELD_BY_NAME
from fp8scope_collector.storage import schema

Quantity = Literal["scale_exp2", "amax", "headroom", "overflow", "underflow", "nonfinite"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_COUNTS = ("overflow", "underflow", "subnormal", "nonfinite")


def quantity_columns(quantity: str) -> tuple[sa.ColumnElement[Any], sa.ColumnElement[Any]]:
    """What to take the minimum and the maximum of for a quantity; see `in_unit`."""
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity {quantity!r} is unknown; choose one of {', '.join(QUANTITIES)}")
    if quantity == "scale_exp2":
        return _positive("scale_min"), _positive("scale_max")
    column = _row_value(quantity if quantity in ("amax", "headroom") else f"{quantity}_ratio")
    return column, column


def check_fields(fields: Sequence[str]) -> None:
    """Refuses what `merged_over_ranks` does not know.

    Raises:
        ValueError: a field is unknown.
    """
    known = [*FIELD_BY_NAME, "scale_exp2", "headroom", *(f"{count}_ratio" for count in _COUNTS), "sqnr_db"]
    for field in fields:
        if field not in known:
            raise ValueError(f"field {field!r} is unknown; choose one of {', '.join(known)}")


def _row_value(field: str) -> sa.ColumnElement[Any]:
    """A field of one row of one rank, or what `in_unit` makes it from."""
    stats = schema.stats.c
    if field == "headroom":
        return sa.func.nullif(_double("amax") * _double("scale_max"), 0)
    if field.endswith("_ratio"):
        return _double(field.removesuffix("_ratio")) / sa.func.nullif(stats.numel, 0)
    return _double(field)


def merged_over_ranks(field: str, largest: sa.ColumnElement[float]) -> dict[str, sa.ColumnElement[Any]]:
    """The ranks of one step merged: what `low` and `high` are the extremes of; headroom is a share of `largest`."""
    if field == "scale_exp2":
        return {"low": sa.func.min(_positive("scale_min")), "high": sa.func.max(_positive("scale_max"))}
    if field == "sqnr_db":
        noise = sa.func.sum(_double("err_sq")) / sa.func.nullif(sa.func.sum(_double("sum_sq")), 0)
        return {"low": noise, "high": noise}
    if field == "headroom":
        merged = sa.func.max(_row_value(field) / largest)
    elif field.endswith("_ratio") and field.removesuffix("_ratio") in _COUNTS:
        merged = sa.func.max(_row_value(field))
    else:
        merged = getattr(sa.func, FIELD_BY_NAME[field].merge)(_row_value(field))
    return {"low": merged, "high": merged}


def _double(name: str) -> sa.ColumnElement[Any]:
    """A column as a double: PostgreSQL would multiply two float4 into a float4, and sum bigints into decimals."""
    return sa.cast(schema.stats.c[name], sa.Double)


def _positive(name: str) -> sa.ColumnElement[Any]:
    return sa.case((schema.stats.c[name] > 0, _double(name)))


def in_unit(field: str, low: Floats, high: Floats, largest: Floats | float = 1.0) -> tuple[Floats, Floats]:
    """Low and high in the field's unit, from what SQL computed; headroom is below `largest`, the format's maximum."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if field == "scale_exp2":
            return np.log2(low), np.log2(high)
        if field == "sqnr_db":  # from err_sq / sum_sq: the largest is the lowest ratio
            return -10 * np.log10(high), -10 * np.log10(low)
        if field == "headroom":
            return np.log2(largest) - np.log2(high), np.log2(largest) - np.log2(low)
    return low, high


@dataclass(frozen=True)
class Formats:
    """What the slots of a run were quantised to: incarnations that do it alike share an epoch."""

    epochs: dict[int, int]
    largest: list[dict[int, float]]

    def of(self, slots: Floats, epochs: Floats) -> Floats:
        """The largest value of the format of each (slot, epoch); NaN where it is not known."""
        pairs = zip(slots.tolist(), epochs.tolist(), strict=True)
        return np.array([self.largest[int(epoch)].get(int(slot), math.nan) for slot, epoch in pairs])
