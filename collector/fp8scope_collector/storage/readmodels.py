"""What the reader answers: frozen values with numpy arrays, one class for each question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fp8core.records import Role
from fp8scope_collector.storage.quantities import Floats, Ints, Quantity

# stale: not ended, and silent for a minute; crashed: for fifteen. Both are running again once they are heard.
State = Literal["running", "stale", "crashed", "finished", "failed"]
Severity = Literal["info", "warning", "critical"]
Ending = Literal["cleared", "ended", "rewritten"]


class RunNotFound(LookupError):  # noqa: N818 - reads as what happened
    """No run, or more than one, has that name; the text says which there are."""


@dataclass(frozen=True)
class RunSummary:
    """One training run. `ref` names it on the command line and in links: project/name, or name without a project."""

    id: int
    project: str
    name: str
    state: State
    first_step: int | None
    last_step: int | None
    rows: int
    ranks: int
    world_size: int
    incarnations: int
    created_unix_ns: int
    last_seen_unix_ns: int
    dropped_rows: int
    tags: tuple[str, ...]
    outcome_message: str

    @property
    def ref(self) -> str:
        """The run's name with its project."""
        return f"{self.project}/{self.name}" if self.project else self.name


@dataclass(frozen=True)
class Slot:
    """One (layer, role) of a run, as the newest incarnation quantised it; `format` is "" where that is not known."""

    slot: int
    layer: str
    role: Role
    module_class: str
    in_features: int
    out_features: int
    format: str
    recipe: str
    margin: int


@dataclass(frozen=True)
class Progress:
    """How far a run is: the live cursor.

    Columns up to `settled_step` do not change any more: every rank that still sends has passed it. `lives` changes
    when a rank starts anew, which may rewrite steps: read everything again. `stride` is the usual distance of steps.
    """

    first_step: int
    last_step: int
    settled_step: int
    stride: int
    lives: int


@dataclass(frozen=True)
class HeatMap:
    """One quantity of slots over columns of steps; column c holds the steps from (first_column + c) * width on.

    `low` and `high` are the extremes over the ranks and the steps of a column, float64 [slots, columns].
    """

    quantity: Quantity
    width: int
    first_column: int
    slots: Ints
    low: Floats
    high: Floats

    @property
    def steps(self) -> Ints:
        """The first step of each column."""
        return (np.arange(self.low.shape[1]) + self.first_column) * self.width


@dataclass(frozen=True)
class Worst:
    """One tensor of a ranking: its most extreme value within the last steps, and the last step that had it recorded.

    `step` and `rank` say where the value was: the earliest step, then the lowest rank (of a change of scale, where it
    was largest).
    """

    slot: int
    layer: str
    role: Role
    value: float
    last_step: int
    step: int = -1
    rank: int = -1


@dataclass(frozen=True)
class Series:
    """Fields of one slot over steps; entry i stands for the recorded steps from step[i] to last[i], `count[i]` of them.

    `low` and `high` have the smallest and largest value that any rank had at any of those steps.
    """

    step: Ints
    last: Ints
    count: Ints
    low: dict[str, Floats]
    high: dict[str, Floats]


@dataclass(frozen=True)
class Scalar:
    """One named number of the training loop over steps, as the lowest rank that reports it sent it; see `Series`.

    `missing` counts the steps whose value was NaN.
    """

    name: str
    step: Ints
    last: Ints
    count: Ints
    low: Floats
    high: Floats
    missing: Ints


@dataclass(frozen=True)
class StoredFinding:
    """An episode of one rule and one tensor, of the whole run where `slot` is None, as the database has it.

    `closed_unix_ns` is None while it is open. `ending` says why it is not: it cleared, the run ended with it, or a
    resumed run has rewritten its steps. `change` does what `remedy` says, as Python or as a setting, where that can
    be written down. `numbers` are the evidence at `worst_step`; what was not finite is missing.
    """

    id: int
    run_id: int
    run: str
    rule: str
    severity: Severity
    slot: int | None
    layer: str
    role: Role | None
    ranks: tuple[int, ...]
    first_step: int
    last_step: int
    rows: int
    worst_step: int
    numbers: Mapping[str, float]
    says: str
    evidence: str
    cause: str
    remedy: str
    change: str
    opened_unix_ns: int
    updated_unix_ns: int
    closed_unix_ns: int | None
    ending: Ending | None
    acknowledged_unix_ns: int | None
    acknowledged_by: str
    acknowledged_reason: str

    @property
    def is_open(self) -> bool:
        """Whether it was still so when it was looked at last."""
        return self.closed_unix_ns is None

    @property
    def tensor(self) -> str:
        """What it is about, in words."""
        return f"{self.role} of {self.layer}" if self.role else "the run"


@dataclass(frozen=True)
class SourceState:
    """One process life of one rank as the collector knows it; `environment` is what the agent said of its machine.

    `clock_skew_s` is the agent's clock less the collector's when it connected. `drops` are rows by reason.
    """

    run: str
    rank: int
    incarnation: int
    agent_version: str
    environment: Mapping[str, str]
    first_seen_unix_ns: int
    last_seen_unix_ns: int
    clock_skew_s: float
    rows: int
    last_step: int | None
    outcome: str
    drops: Mapping[str, int]


@dataclass(frozen=True)
class SystemState:
    """The database (`engine`: sqlite or postgresql; its schema's version) and the newest of its sources."""

    engine: str
    version: str
    database_bytes: int
    total_sources: int
    total_rows: int
    sources: tuple[SourceState, ...]


@dataclass(frozen=True)
class Histograms:
    """The magnitudes of one slot over steps: column c adds up what was sampled in the steps step[c] to last[c].

    Row e of `counts`, int64 [256, columns], has the elements of 2**(e - 127) <= |x| < 2**(e - 126); row 0 zeros and
    what is smaller, row 255 infinities and NaN. `sampled` says how many histograms a column adds up: of all ranks.
    """

    step: Ints
    last: Ints
    sampled: Ints
    counts: Ints


@dataclass(frozen=True)
class Ranks:
    """One field of one slot, rank by rank: row r is rank ranks[r], column i over the steps from step[i] to last[i].

    `low` and `high`, float64 [ranks, columns], are those of the first step that a life of the rank recorded there (they
    differ where a field has a smallest and a largest value within a step); NaN: it has none. Columns of one step show
    every row; of wider ones `Spread` has the extremes of all steps, with their ranks.
    """

    ranks: Ints
    step: Ints
    last: Ints
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Spread:
    """How one field of one slot lies over the ranks: entry i is over the steps from step[i] to last[i].

    `low` and `high` are exact at every resolution, as are the rank and the step that they were at. The median, over
    ranks and steps, is exact where `median_error` is 0; elsewhere the field is amax, and the median is the middle of a
    quarter of a power of two, at most that share of itself off. NaN where there is neither.
    """

    step: Ints
    last: Ints
    low: Floats
    low_rank: Ints
    low_step: Ints
    high: Floats
    high_rank: Ints
    high_step: Ints
    median: Floats
    median_error: float
