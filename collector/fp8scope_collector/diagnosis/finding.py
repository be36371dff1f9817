"""What a rule says: `Finding`, a stretch of rows of one tensor in which something was wrong; and how rules make them.

A rule marks rows, `findings` makes stretches of the marked rows, `merged` joins two stretches of one tensor. Joining is
associative, so that the engine gets the same episodes however the run was cut.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fp8scope_collector.diagnosis.thresholds import GAP_ROWS
from fp8scope_collector.diagnosis.window import Bools, Floats, Window
from fp8scope_collector.storage.readmodels import Slot


class Severity(enum.IntEnum):
    """How bad: info is worth knowing, a warning costs precision or data, critical breaks the training."""

    INFO = 1
    WARNING = 2
    CRITICAL = 3

    def __str__(self) -> str:
        return self.name.lower()


_SEVERITIES = {int(severity): severity for severity in Severity}


@dataclass(frozen=True, slots=True)
class Finding:
    """Rows of one tensor (of the whole run where `slot` is None) in which a rule found something.

    `first_row` and `last_row` count recorded steps from the run's start, `rows` those of them (of each rank) that were
    marked. `numbers` and `note` are of the worst row, `worst` says how bad it was in a unit of the rule's own.
    `opens` is False for rows that go on with what an earlier finding began but would not begin one.
    """

    rule: str
    severity: Severity
    slot: Slot | None
    ranks: tuple[int, ...]
    first_step: int
    last_step: int
    first_row: int
    last_row: int
    rows: int
    worst: float
    worst_step: int
    numbers: Mapping[str, float]
    note: str = ""
    opens: bool = True


@dataclass(frozen=True)
class Rule:
    """A rule: its name for ever, what it says to people, and the function that looks.

    `check` looks at `reach` rows before a row, and no more are handed to it.
    `evidence` is a format string over `Finding.numbers`. `remedies` are by recipe, with "" for the others; they may
    name {layer} and {role}. `changes` are what can be written down of them as code, by recipe or by role; see
    `diagnosis.changes`.
    """

    name: str
    says: str
    cause: str
    remedies: Mapping[str, str]
    evidence: str
    reach: int
    check: Callable[[Window], Iterable[Finding]] = field(repr=False)
    changes: Mapping[str, str] = field(default_factory=dict)

    def remedy(self, slot: Slot | None) -> str:
        """What to do about it for this tensor."""
        recipe = slot.recipe.partition("(")[0] if slot else ""
        text = self.remedies.get(recipe, self.remedies[""])
        return text.format(layer=slot.layer if slot else "", role=slot.role if slot else "")

    def change(self, slot: Slot | None) -> str:
        """The remedy as code for this tensor; empty where it cannot be written down."""
        choices = (slot.recipe.partition("(")[0], str(slot.role), "") if slot else ("",)
        text = next((self.changes[choice] for choice in choices if choice in self.changes), "")
        return text.format(
            layer=slot.layer if slot else "",
            role=str(slot.role) if slot else "",
            recipe=(slot.recipe if slot else "") or "AmaxScaling()",
        )


def findings(
    window: Window,
    rule: str,
    bad: Bools,
    worst: Floats,
    *,
    severity: Severity | npt.NDArray[np.int_] = Severity.WARNING,
    still: Bools | None = None,
    late: int = 0,
    numbers: Mapping[str, Floats] | None = None,
    note: Callable[[int, int], str] = lambda step, slot: "",
    of_run: bool = False,
) -> Iterator[Finding]:
    """A finding for each stretch of marked rows from `window.fresh` on.

    Arrays are [ranks, steps, slots]. A first axis of one entry is about all ranks together; with `of_run` the last axis
    has one entry, and the finding names no tensor. `severity` may differ by row: an episode has its worst. `still`
    marks rows that go on with an episode without beginning one.
    `note(step index, slot index)` describes the worst row.
    """
    bad = bad[:, window.fresh :]
    active = bad if still is None else bad | still[:, window.fresh :]
    tensors = np.argwhere(active.any(axis=1))
    if not tensors.size:
        return
    of, row = np.nonzero(active[tensors[:, 0], :, tensors[:, 1]])
    rank, slot = tensors[of].T
    opening = bad[rank, row, slot]
    row = row + window.fresh
    # Stretches begin at another tensor, after a gap, and at their first row that opens an episode.
    begins = np.flatnonzero(np.r_[True, (np.diff(of) != 0) | (np.diff(row) > GAP_ROWS)])
    index = np.arange(row.size)
    opened = np.minimum.reduceat(np.where(opening, index, row.size), begins)
    begins = np.union1d(begins, opened[opened < row.size])
    ends = np.r_[begins[1:], row.size]
    # The worst row of each is the first of equally bad ones; NaN is worse than all.
    how_bad = np.where(opening, worst[rank, row, slot], -np.inf)
    most = np.repeat(np.maximum.reduceat(how_bad, begins), ends - begins)
    is_worst = opening & ((how_bad == most) | np.isnan(how_bad))
    at = np.minimum.reduceat(np.where(is_worst, index, row.size), begins)
    levels = np.broadcast_to(np.asarray(severity), worst.shape)[rank, row, slot]
    level = np.maximum.reduceat(np.where(opening, levels, Severity.INFO), begins)
    begun = opening[begins]
    last = row[ends - 1]
    at = np.where(begun, row[np.minimum(at, row.size - 1)], last)
    rank, slot, first = rank[begins], slot[begins], row[begins] - np.where(begun, late, 0)
    names = [*(numbers or {})]
    columns = [values[rank, at, slot].tolist() for values in (numbers or {}).values()]
    together = bad.shape[0] != len(window.ranks)
    ranks_of = [window.ranks] if together else [(number,) for number in window.ranks]
    steps = window.steps
    of_each = (
        *(rank, slot, first, last, at, level, ends - begins, begun, worst[rank, at, slot]),
        *(steps[first], steps[last], steps[at]),
    )
    for i, each in enumerate(zip(*(values.tolist() for values in of_each), strict=True)):
        which, tensor, since, until, peak, bad_as, rows, opens, how, first_step, last_step, worst_step = each
        yield Finding(
            rule=rule,
            severity=_SEVERITIES[bad_as],
            slot=None if of_run else window.slots[tensor],
            ranks=ranks_of[which],
            first_step=first_step,
            last_step=last_step,
            first_row=window.first_row + since,
            last_row=window.first_row + until,
            rows=rows,
            worst=how if opens else -math.inf,
            worst_step=worst_step,
            numbers={name: column[i] for name, column in zip(names, columns, strict=True)} if opens else {},
            note=note(peak, tensor) if opens else "",
            opens=opens,
        )


def merged(earlier: Finding, later: Finding) -> Finding:
    """Two findings of one rule and tensor as one; of equally bad rows the earlier step's is told."""
    one, other = (earlier, later) if earlier.first_row <= later.first_row else (later, earlier)
    worst = other if (other.worst, -other.worst_step) > (one.worst, -one.worst_step) else one
    return Finding(  # not `replace`: where a whole run is in trouble this is what diagnosis does most of the time
        rule=one.rule,
        severity=max(one.severity, other.severity),
        slot=one.slot,
        ranks=one.ranks if one.ranks == other.ranks else tuple(sorted({*one.ranks, *other.ranks})),
        first_step=one.first_step,
        last_step=max(one.last_step, other.last_step),
        first_row=one.first_row,
        last_row=max(one.last_row, other.last_row),
        rows=one.rows + other.rows,
        worst=worst.worst,
        worst_step=worst.worst_step,
        numbers=worst.numbers,
        note=worst.note,
        opens=one.opens or other.opens,
    )
