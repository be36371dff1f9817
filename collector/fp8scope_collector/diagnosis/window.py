"""What a rule looks at: `Window`, the recorded rows of a stretch of a run as arrays.

Axes are [ranks, steps, slots] and only recorded steps are there: with every=10 they are ten apart. A window begins with
`fresh` rows of context that were judged before; findings are about the rows from there on. The context is always
`LOOKBACK` rows, or as many as there are since the process life began, so that what a rule says of a row does not
depend on where a run was cut into windows.

Every field is float64 with NaN for what is missing: counts are exact up to 2**53.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fp8core.formats import FORMATS
from fp8core.recipes import Recipe, parse_recipe
from fp8core.records import Role
from fp8scope_collector.storage.readmodels import Slot

LOOKBACK = 128

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# What rules read of a row; `fp8core.records.FIELDS` defines them.
FIELDS_READ = ("amax", "scale_min", "scale_max", "numel", "zeros", "overflow", "underflow", "nonfinite")


@dataclass(frozen=True)
class ScalarSeries:
    """A number of the training loop at the steps that reported it; NaN where it was NaN."""

    steps: Ints
    values: Floats


@dataclass(frozen=True)
class Window:
    """Rows of a run: `fields[name]` is float64 [ranks, steps, slots], `steps` and `slots` say what the axes are.

    `first_row` counts the recorded steps of the run before this window, `life_row` those before the process life that
    the window is of, `incarnation`. `scalars` has the window's steps and the context before them, each at its own
    steps. `silent_s` is how long nothing has been heard of the run, 0 where that is not known.
    """

    steps: Ints
    ranks: tuple[int, ...]
    slots: tuple[Slot, ...]
    fields: Mapping[str, Floats]
    scalars: Mapping[str, ScalarSeries]
    first_row: int = 0
    life_row: int = 0
    fresh: int = 0
    incarnation: int = 0
    silent_s: float = 0.0

    def __getitem__(self, field: str) -> Floats:
        return self.fields[field]

    @cached_property
    def present(self) -> Bools:
        """Whether there is a row, [ranks, steps, slots]."""
        return ~np.isnan(self["numel"])

    @cached_property
    def rank_present(self) -> Bools:
        """Whether a rank has any row at a step, [ranks, steps, 1]."""
        return np.logical_or.reduce(self.present, axis=2, keepdims=True)

    @cached_property
    def age(self) -> Ints:
        """Recorded steps since the process life began, [1, steps, 1]: 0 at its first."""
        return (self.first_row - self.life_row + np.arange(self.steps.size))[None, :, None]

    @cached_property
    def scale_exp2(self) -> Floats:
        """log2 of the smallest scale of a step."""
        return log2(self["scale_min"])

    @cached_property
    def headroom(self) -> Floats:
        """Bits between the largest scaled magnitude of a step and the format's maximum; NaN for a tensor of zeros."""
        return np.log2(self.largest) - log2(self["amax"]) - log2(self["scale_max"])

    @cached_property
    def largest(self) -> Floats:
        """The largest value of each slot's format, [slots]; NaN where the format is not known."""
        return np.array([FORMATS[slot.format].max if slot.format in FORMATS else np.nan for slot in self.slots])

    @cached_property
    def normal_bits(self) -> Floats:
        """Powers of two that each slot's format covers with full precision, [slots]: 14.8 for E4M3FN, 29.8 for E5M2."""
        formats = [FORMATS.get(slot.format) for slot in self.slots]
        return np.array([np.log2(fmt.max / fmt.smallest_normal) if fmt else np.nan for fmt in formats])

    def ratio(self, count: str) -> Floats:
        """The share of a step's elements that `count` counts."""
        with np.errstate(invalid="ignore", divide="ignore"):
            share: Floats = self[count] / self["numel"]
        return share

    @cached_property
    def recipes(self) -> tuple[Recipe | None, ...]:
        """Each slot's recipe; None where its text is not one of ours."""
        return tuple(_recipe(slot.recipe) for slot in self.slots)

    def under(self, *kinds: type[Recipe]) -> Bools:
        """Which slots are scaled by a recipe of these kinds, [slots]."""
        return np.array([isinstance(recipe, kinds) for recipe in self.recipes], dtype=bool)

    def of_role(self, role: Role) -> Bools:
        """Which slots have this role, [slots]."""
        return np.array([slot.role == role for slot in self.slots], dtype=bool)

    @property
    def margins(self) -> Floats:
        """Bits of headroom that each slot's recipe leaves, [slots]."""
        return np.array([slot.margin for slot in self.slots], dtype=np.float64)


def slide(pieces: Iterable[Window]) -> Iterator[Window]:
    """Consecutive pieces of a run, each with the context before it; a new process life begins without any."""
    before: Window | None = None
    for piece in pieces:
        before = follow(before, piece)
        yield before


def follow(before: Window | None, piece: Window) -> Window:
    """A piece with the context that the window before it leaves; none where another process life begins."""
    if before is None or before.life_row != piece.life_row or before.slots != piece.slots:
        return piece
    return _joined(before, piece)


def cut(window: Window, rows: int) -> Iterator[Window]:
    """A window without context as pieces of at most `rows` rows."""
    for start in range(0, window.steps.size, rows):
        steps = window.steps[start : start + rows]
        after = window.steps[start - 1] if start else np.int64(-1)
        yield replace(
            window,
            steps=steps,
            fields={name: values[:, start : start + rows] for name, values in window.fields.items()},
            scalars={name: _between(series, after, steps[-1]) for name, series in window.scalars.items()},
            first_row=window.first_row + start,
        )


def _joined(before: Window, piece: Window) -> Window:
    context = min(LOOKBACK, before.steps.size)
    return replace(
        piece,
        steps=np.concatenate([before.steps[-context:], piece.steps]),
        fields={
            name: np.concatenate([before.fields[name][:, -context:], values], axis=1)
            for name, values in piece.fields.items()
        },
        scalars={
            name: _appended(before.scalars.get(name), piece.scalars.get(name))
            for name in {**before.scalars, **piece.scalars}
        },
        first_row=piece.first_row - context,
        fresh=context,
    )


def tail(window: Window) -> Window:
    """What a window leaves as context, without the memory of the rest."""
    first = max(0, window.steps.size - LOOKBACK)
    return replace(
        window,
        steps=window.steps[first:].copy(),
        fields={name: values[:, first:].copy() for name, values in window.fields.items()},
        scalars={name: _between_last(series) for name, series in window.scalars.items()},
        first_row=window.first_row + first,
        fresh=window.steps.size - first,
    )


def with_ranks(window: Window, ranks: tuple[int, ...]) -> Window:
    """The window with more ranks than it had: they have no rows in it."""
    if ranks == window.ranks:
        return window
    fields = {}
    for name, values in window.fields.items():
        fields[name] = np.full((len(ranks), *values.shape[1:]), np.nan)
        fields[name][[ranks.index(rank) for rank in window.ranks]] = values
    return replace(window, ranks=ranks, fields=fields)


def _appended(before: ScalarSeries | None, series: ScalarSeries | None) -> ScalarSeries:
    parts = [part for part in (before and _between_last(before), series) if part is not None]
    return ScalarSeries(np.concatenate([part.steps for part in parts]), np.concatenate([part.values for part in parts]))


def _between_last(series: ScalarSeries) -> ScalarSeries:
    return ScalarSeries(series.steps[-LOOKBACK:], series.values[-LOOKBACK:])


def _between(series: ScalarSeries, after: np.int64, last: np.int64) -> ScalarSeries:
    inside = (series.steps > after) & (series.steps <= last)
    return ScalarSeries(series.steps[inside], series.values[inside])


def _recipe(text: str) -> Recipe | None:
    try:
        return parse_recipe(text)
    except ValueError:
        return None


def log2(values: Floats) -> Floats:
    """log2 of what is above 0, else NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(values > 0, np.log2(values), np.nan)
