"""What is recorded about one slot in one step: the table of fields, for every part of fp8scope.

A *slot* is one (layer, role) of a rank; a *row* is one slot at one step. `FIELDS` is the single source of names,
types, units, definitions and merge rules: the arena's columns, the wire's columns and the database's columns are
made from it. This module imports no torch.

The arena (`fp8core.stats`) keeps a row as `len(COLUMNS)` 64-bit words in one int64 buffer, so that one copy moves
it: integers as they are, float fields as the bit pattern of a float64 (a float32 field is widened; exact). A
non-negative float64 orders like its bits, so an integer max or min on the words is the max or min of the values.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Merge = Literal["max", "min", "sum", "last"]


class Role(enum.StrEnum):
    """Which tensor of a linear layer: x, w or dy."""

    INPUT = "input"
    WEIGHT = "weight"
    GRAD_OUTPUT = "grad_output"


ROLE_ALIASES = {"activation": Role.INPUT, "gradient": Role.GRAD_OUTPUT}


def parse_role(text: str) -> Role:
    """The role called `text`, by its own name or by Transformer Engine's.

    Raises:
        ValueError: no role is called that.
    """
    if text in ROLE_ALIASES:
        return ROLE_ALIASES[text]
    try:
        return Role(text)
    except ValueError:
        known = ", ".join([*Role, *ROLE_ALIASES])
        raise ValueError(f"role {text!r} is unknown; choose one of {known}") from None


@dataclass(frozen=True)
class Field:
    """One statistic of a row: its name everywhere, how it is stored, what it means and how it merges.

    `merge` is how the micro-batches of one step become one row, for the roles input and grad_output. Weight
    rows are overwritten ("last"), whatever `merge` says: a weight does not change within a step.
    """

    name: str
    dtype: Literal["float32", "float64", "uint64"]
    unit: str
    merge: Merge
    definition: str


FIELDS: tuple[Field, ...] = (
    Field("amax", "float32", "as the tensor", "max", "largest finite |x|"),
    Field("scale_min", "float32", "1", "min", "smallest scale of the step's micro-batches; scale multiplies into FP8"),
    Field("scale_max", "float32", "1", "max", "largest scale of the step's micro-batches"),
    Field("numel", "uint64", "elements", "sum", "elements quantised"),
    Field("zeros", "uint64", "elements", "sum", "x == 0"),
    Field("overflow", "uint64", "elements", "sum", "finite x whose |x * scale| rounds beyond the largest finite value"),
    Field("underflow", "uint64", "elements", "sum", "x != 0 and q == 0"),
    Field("subnormal", "uint64", "elements", "sum", "q in the format's subnormal range"),
    Field("nonfinite", "uint64", "elements", "sum", "x is NaN or infinite"),
    Field("sum_sq", "float64", "square of the tensor's", "sum", "sum of x^2 over finite elements"),
    Field("err_sq", "float64", "square of the tensor's", "sum", "sum of (x - q * inv_scale)^2 over finite elements"),
)
FIELD_BY_NAME = {field.name: field for field in FIELDS}

# Words of an arena row. `writes` counts the micro-batches merged into it; 0 says that the slot was not used.
COLUMNS: tuple[str, ...] = ("writes", *(field.name for field in FIELDS))
WRITES = 0


def is_float(column: str) -> bool:
    """Whether `column`'s words are float64 bit patterns, not integers."""
    return column in FIELD_BY_NAME and FIELD_BY_NAME[column].dtype != "uint64"


def empty_row() -> npt.NDArray[np.int64]:
    """The words of a row that nothing was written to, int64 [len(COLUMNS)]: zeros, and +inf where the merge is min."""
    values = [np.inf if name in FIELD_BY_NAME and FIELD_BY_NAME[name].merge == "min" else 0.0 for name in COLUMNS]
    return np.array(values, dtype=np.float64).view(np.int64)


@dataclass(frozen=True)
class Rows:
    """The rows of one step that were written: `slot` [n] int64 and one array [n] for each field."""

    slot: npt.NDArray[np.int64]
    columns: dict[str, npt.NDArray[np.generic]]


def decode_arena(words: npt.NDArray[np.int64]) -> Rows:
    """The written rows of an arena, each field in its own dtype; `words` is int64 [slots, len(COLUMNS)].

    Raises:
        ValueError: `words` has another shape or dtype.
    """
    if words.ndim != 2 or words.shape[1] != len(COLUMNS) or words.dtype != np.int64:
        raise ValueError(f"arena words are {words.dtype} {list(words.shape)}; expected int64 [slots, {len(COLUMNS)}]")
    slot = np.flatnonzero(words[:, WRITES])
    written = words[slot]
    columns: dict[str, npt.NDArray[np.generic]] = {}
    for index, field in enumerate(FIELDS, start=1):
        column = np.ascontiguousarray(written[:, index])
        columns[field.name] = column.view(np.float64 if is_float(field.name) else np.uint64).astype(field.dtype)
    return Rows(slot=slot, columns=columns)
