"""What a rule looks at: `Window`, the recorded rows of a stretch of a run as arrays.

Axes are [ranks, steps, slots] and only recorded steps are there: with every=10 they are ten apart. A window begins with
`fresh` rows of context that were judged before; findings are about the rows from there on. The context is always
`LOOKBACK` rows, or as many as there are since the process life began, so that what a rule says of a row does not
depend on where a run was cut into windows. Of these a rule gets as many as it looks at (`Window.recent`).

Every field is float64 with NaN for what is missing: counts are exact up to 2**53.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from fp8core.formats import FORMATS
from fp8core.recipes import Recipe, parse_recipe
from fp8core.records import Role
from fp8scope_collector.storage.readmodels import Slot

LOOKBACK = 72  # rows; no rule looks back further
LOOKBACK_SCALARS = 128  # values of each scalar

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

    def recent(self, rows: int) -> Window:
        """The fresh rows with at most `rows` of context: views, that share what is derived of each row."""
        first = max(0, self.fresh - rows)
        part = replace(
            self,
            steps=self.steps[first:],
            fields={name: values[:, first:] for name, values in self.fields.items()},
            first_row=self.first_row + first,
            fresh=self.fresh - first,
        )
        derived = ("present", "rank_present", "amax_exp2", "scale_exp2", "headroom")
        vars(part).update({name: getattr(self, name)[:, first:] for name in derived})
        vars(part)["_tensors"] = self._tensors
        return part

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
    def amax_exp2(self) -> Floats:
        """log2 of a step's largest magnitude; NaN for a tensor of zeros, or with infinity."""
        return log2(self["amax"])

    @cached_property
    def scale_exp2(self) -> Floats:
        """log2 of the smallest scale of a step."""
        return log2(self["scale_min"])

    @cached_property
    def headroom(self) -> Floats:
        """Bits between the largest scaled magnitude of a step and the format's maximum; NaN for a tensor of zeros."""
        exponents, apart = self.scale_exp2, self["scale_min"] != self["scale_max"]
        if apart.any():  # a scale for each row or block
            exponents = np.where(apart, log2(self["scale_max"]), exponents)
        return np.log2(self.largest) - self.amax_exp2 - exponents

    @property
    def largest(self) -> Floats:
        """The largest value of each slot's format, [slots]; NaN where the format is not known."""
        return self._tensors.largest

    @property
    def normal_bits(self) -> Floats:
        """Powers of two that each slot's format covers with full precision, [slots]: 14.8 for E4M3FN, 29.8 for E5M2."""
        return self._tensors.normal_bits

    def ratio(self, count: str) -> Floats:
        """The share of a step's elements that `count` counts."""
        with np.errstate(invalid="ignore", divide="ignore"):
            share: Floats = self[count] / self["numel"]
        return share

    def of_recipe(self, what: Callable[[Recipe | None], float]) -> Floats:
        """A number of each slot's recipe, [slots]; `what` gets None where its text is not one of ours."""
        return np.array([what(recipe) for recipe in self._tensors.recipes])[self._tensors.recipe_index]

    def under(self, *kinds: type[Recipe]) -> Bools:
        """Which slots are scaled by a recipe of these kinds, [slots]."""
        which: Bools = self.of_recipe(lambda recipe: isinstance(recipe, kinds)) == 1
        return which

    def of_role(self, role: Role) -> Bools:
        """Which slots have this role, [slots]."""
        which: Bools = self._tensors.roles == str(role)
        return which

    @property
    def margins(self) -> Floats:
        """Bits of headroom that each slot's recipe leaves, [slots]."""
        return self._tensors.margins

    @cached_property
    def _tensors(self) -> _Tensors:
        return _tensors_of(self.slots)


@dataclass(frozen=True)
class _Tensors:
    """What rules ask of slots, as arrays; `recipes` are the distinct ones, `recipe_index` says which a slot has."""

    largest: Floats
    normal_bits: Floats
    margins: Floats
    roles: npt.NDArray[np.str_]
    recipes: tuple[Recipe | None, ...]
    recipe_index: Ints


@lru_cache(maxsize=16)  # a run's windows have the same slots again and again
def _tensors_of(slots: tuple[Slot, ...]) -> _Tensors:
    formats = [FORMATS.get(slot.format) for slot in slots]
    recipes = {text: number for number, text in enumerate(dict.fromkeys(slot.recipe for slot in slots))}
    return _Tensors(
        largest=np.array([fmt.max if fmt else np.nan for fmt in formats]),
        normal_bits=np.array([np.log2(fmt.max / fmt.smallest_normal) if fmt else np.nan for fmt in formats]),
        margins=np.array([slot.margin for slot in slots], dtype=np.float64),
        roles=np.array([str(slot.role) for slot in slots]),
        recipes=tuple(_recipe(text) for text in recipes),
        recipe_index=np.array([recipes[slot.recipe] for slot in slots], dtype=np.int64),
    )


class Context:
    """The last rows of a run that its next ones are judged with, in arrays that are written over again and again.

    So there are never two copies of them: they are most of what a process that diagnoses keeps. A window that came from
    here is good until the next one is asked for.
    """

    def __init__(self) -> None:
        self.last: Window | None = None  # without what is derived of its rows
        self._room: dict[str, Floats] = {}

    def follow(self, piece: Window) -> Window:
        """A piece with the context of the pieces before it; none where another process life begins."""
        last = self.last
        if last is None or last.life_row != piece.life_row or last.slots != piece.slots:
            self.last = piece
        else:
            context = min(LOOKBACK, last.steps.size)
            self.last = replace(
                piece,
                steps=np.concatenate([last.steps[-context:], piece.steps]),
                fields={
                    name: self._behind(name, last.fields[name][:, -context:], values)
                    for name, values in piece.fields.items()
                },
                scalars={
                    name: _appended(last.scalars.get(name), piece.scalars.get(name))
                    for name in {**last.scalars, **piece.scalars}
                },
                first_row=piece.first_row - context,
                fresh=context,
            )
        return replace(self.last)

    def take_in(self, ranks: tuple[int, ...]) -> None:
        """From now on there are these ranks, of which the new ones have no rows yet."""
        if self.last is None or ranks == self.last.ranks:
            return
        fields = {}
        for name, values in self.last.fields.items():
            fields[name] = np.full((len(ranks), *values.shape[1:]), np.nan)
            fields[name][[ranks.index(rank) for rank in self.last.ranks]] = values
        self.last = replace(self.last, ranks=ranks, fields=fields)

    def _behind(self, name: str, rows: Floats, values: Floats) -> Floats:
        """`rows`, which may lie there already, and `values` behind them, in the field's room."""
        ranks, new, slots = values.shape
        size = rows.shape[1] + new
        room = self._room.get(name)
        if room is None or room.shape[::2] != (ranks, slots) or room.shape[1] < size:
            room = self._room[name] = np.empty((ranks, size, slots))
        room[:, : size - new] = rows
        room[:, size - new : size] = values
        return room[:, :size]


def slide(pieces: Iterable[Window]) -> Iterator[Window]:
    """Consecutive pieces of a run, each with the context before it: good until the next."""
    yield from map(Context().follow, pieces)


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


def _appended(before: ScalarSeries | None, series: ScalarSeries | None) -> ScalarSeries:
    parts = [part for part in (before and _between_last(before), series) if part is not None]
    return ScalarSeries(np.concatenate([part.steps for part in parts]), np.concatenate([part.values for part in parts]))


def _between_last(series: ScalarSeries) -> ScalarSeries:
    return ScalarSeries(series.steps[-LOOKBACK_SCALARS:], series.values[-LOOKBACK_SCALARS:])


def _between(series: ScalarSeries, after: np.int64, last: np.int64) -> ScalarSeries:
    inside = (series.steps > after) & (series.steps <= last)
    return ScalarSeries(series.steps[inside], series.values[inside])


def _recipe(text: str) -> Recipe | None:
    try:
        return parse_recipe(text)
    except ValueError:
        return None


def log2(values: Floats) -> Floats:
    """log2 of what is above 0 and finite, else NaN: an infinite amax has no level, and is the rule nonfinite's."""
    with np.errstate(invalid="ignore", divide="ignore"):
        exponents: Floats = np.log2(values)
    exponents[np.isinf(exponents)] = np.nan
    return exponents
