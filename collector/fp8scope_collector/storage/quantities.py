"""What can be asked of a slot, and how it follows from raw rows and from rollups alike.

Everything has a low and a high: the extremes over the ranks and the steps that one answer stands for. The spread of the
ranks is the exception: it is one number, how many bits lie between the smallest and the largest amax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fp8core.records import FIELD_BY_NAME
from fp8scope_collector.storage.rollups import RATIOS

Quantity = Literal[
    "scale_exp2", "amax", "headroom", "overflow", "underflow", "nonfinite", "subnormal", "sqnr_db", "spread"
]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

SPREAD_FIELDS = ("amax", "scale_exp2", "headroom", "sqnr_db", *RATIOS)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Where a low and a high come from: the fields of a raw row, and the names of a rollup's arrays."""

    fields: tuple[str, ...]
    low: str
    high: str


def source_of(field: str) -> Source:
    """Where a field of `check_fields` comes from."""
    if field == "scale_exp2":
        return Source(("scale_min", "scale_max"), "scale_min.low", "scale_max.high")
    if field == "headroom":
        return Source(("amax", "scale_max"), "peak_exp2.high", "peak_exp2.low")
    if field == "spread":
        return Source(("amax",), "amax.low", "amax.high")
    if field in RATIOS:
        return Source((field.removesuffix("_ratio"), "numel"), f"{field}.low", f"{field}.high")
    fields = ("err_sq", "sum_sq") if field == "sqnr_db" else (field,)
    return Source(fields, f"{field}.low", f"{field}.high")


def field_of(quantity: str) -> str:
    """The field that a quantity is: counts as shares of the elements.

    Raises:
        ValueError: the quantity is unknown.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity {quantity!r} is unknown; choose one of {', '.join(QUANTITIES)}")
    return f"{quantity}_ratio" if f"{quantity}_ratio" in RATIOS else quantity


def check_fields(fields: Sequence[str]) -> None:
    """Refuses what is no field of a slot.

    Raises:
        ValueError: a field is unknown.
    """
    known = [*FIELD_BY_NAME, "scale_exp2", "headroom", *RATIOS, "sqnr_db", "spread"]
    for field in fields:
        if field not in known:
            raise ValueError(f"field {field!r} is unknown; choose one of {', '.join(known)}")


def of_rows(field: str, columns: Mapping[str, Floats], log2_max: Floats | None) -> tuple[Floats, Floats]:
    """Low and high of each raw row, whose extremes `in_unit` takes; headroom needs `log2_max` of each row's format."""
    names = source_of(field).fields
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if field == "scale_exp2":
            return columns["scale_min"], columns["scale_max"]
        if field == "headroom":
            assert log2_max is not None
            headroom = log2_max - np.log2(columns["amax"]) - np.log2(columns["scale_max"])
            headroom[np.isposinf(headroom)] = np.nan
            return headroom, headroom
        if field in RATIOS:
            share = columns[names[0]] / np.where(columns["numel"] == 0, np.nan, columns["numel"])
            return share, share
        if field == "sqnr_db":
            sqnr = -10 * np.log10(columns["err_sq"] / np.where(columns["sum_sq"] == 0, np.nan, columns["sum_sq"]))
            return sqnr, sqnr
    return columns[names[0]], columns[names[0]]


def in_unit(field: str, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Low and high in the field's unit, from extremes of `of_rows`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if field == "scale_exp2":
            return _log2(low), _log2(high)
        if field == "spread":
            bits = _log2(high) - _log2(low)
            return bits, bits
    return low, high


def _log2(values: Floats) -> Floats:
    return np.log2(np.where(values > 0, values, np.nan))
