"""What the messages of a stream are once they are checked: values that the rest of the collector trusts."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fp8core.formats import FORMATS
from fp8core.records import Role


@dataclass(frozen=True)
class SlotSpec:
    """One entry of a source's catalogue; its position there is the slot id on the wire."""

    layer: str
    role: Role
    module_class: str
    in_features: int
    out_features: int
    format: str
    recipe: str
    margin: int


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The slots of a source, in the order of their wire ids."""

    slots: tuple[SlotSpec, ...]
    digest: bytes  # of all that the client said of them

    @functools.cached_property
    def role(self) -> npt.NDArray[np.int8]:
        """Index into tuple(Role), by slot."""
        roles = tuple(Role)
        return np.array([roles.index(spec.role) for spec in self.slots], np.int8)

    @functools.cached_property
    def log2_max(self) -> npt.NDArray[np.float64]:
        """log2 of the largest finite value of its format, by slot."""
        return np.log2([FORMATS[spec.format].max for spec in self.slots])

    def sha256(self, slots: int) -> str:
        """What must not change of its first `slots` slots within a process life: layer, role and format."""
        return self._sha256 if slots == len(self.slots) else _sha256(self.slots[:slots])

    @functools.cached_property
    def _sha256(self) -> str:
        return _sha256(self.slots)


def _sha256(slots: tuple[SlotSpec, ...]) -> str:
    return hashlib.sha256(repr([(spec.layer, str(spec.role), spec.format) for spec in slots]).encode()).hexdigest()


@dataclass(frozen=True)
class Sender:
    """Who is behind a stream: for the audit log, and the token whose runs are counted."""

    actor: str = "unknown"
    token_id: int | None = None
    max_runs: int | None = None


@dataclass(frozen=True)
class Opening:
    """Who opens a stream."""

    project: str
    run: str
    rank: int
    world_size: int
    incarnation: int
    source_uuid: str
    started_unix_ns: int
    sent_unix_ns: int
    agent_version: str
    catalogue: Catalogue
    config_json: str
    environment_json: str
    tags_json: str
    notes: str
    sender: Sender = field(default_factory=Sender)

    @property
    def run_label(self) -> str:
        """`project/name`, or `name` where there is no project."""
        return run_label(self.project, self.run)


def run_label(project: str, name: str) -> str:
    """How a run is called on the command line and in metrics: `project/name`, or `name` without a project."""
    return f"{project}/{name}" if project else name


@dataclass(frozen=True, eq=False)
class Source:
    """A registered source: its row in the database, and its catalogue as arrays indexed by wire slot id."""

    id: int
    run_id: int
    run: str
    rank: int
    incarnation: int
    up_to_seq: int
    finished: bool
    run_slot: npt.NDArray[np.int64]  # number of the slot in the run
    role: npt.NDArray[np.int8]  # as in its catalogue
    log2_max: npt.NDArray[np.float64]

    @functools.cached_property
    def roles(self) -> frozenset[int]:
        """Indices into tuple(Role) of the roles that its slots have."""
        return frozenset(np.unique(self.role).tolist())


@dataclass(frozen=True)
class Ending:
    """How a source ended; `outcome` is finished or failed."""

    finished_unix_ns: int
    outcome: str
    message: str


@dataclass(frozen=True, eq=False)
class Histograms:
    """Histograms of some slots at some steps, one entry each; `counts` has the rows' counts one after the other.

    Row i has `bins[i]` of them, for the bins from `first_bin[i]` on.
    """

    step: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]  # wire ids
    first_bin: npt.NDArray[np.int64]
    bins: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


_NO_ROWS: npt.NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Batch:
    """One durable message of a source: rows, scalars, histograms and running totals of drops, or its end.

    `step`, `slot` (wire ids) and each column have one entry a row; an absent column is not in `columns`. Counts are
    int64: a larger uint64 was refused.
    """

    source: Source
    seq: int
    size_bytes: int
    step: npt.NDArray[np.int64] = field(default_factory=lambda: _NO_ROWS)
    slot: npt.NDArray[np.int64] = field(default_factory=lambda: _NO_ROWS)
    columns: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    scalars: tuple[tuple[int, str, float], ...] = ()  # (step, name, value)
    extras: tuple[tuple[int, int, str, float], ...] = ()  # (step, wire slot, name, value)
    histograms: Histograms | None = None
    drops: Mapping[str, int] = field(default_factory=dict)  # reason -> rows
    ending: Ending | None = None
    config_json: str = ""  # the run's configuration from here on; empty: unchanged

    @property
    def rows(self) -> int:
        """Rows of statistics in it."""
        return len(self.step)

    @functools.cached_property
    def run_slot(self) -> npt.NDArray[np.int64]:
        """The numbers of its slots in the run, by row."""
        return self.source.run_slot[self.slot]

    @functools.cached_property
    def ascends(self) -> bool:
        """Whether its rows come by step and slot of the run, each once."""
        return bool(ascending(self.step, self.run_slot).all())

    @property
    def entries(self) -> int:
        """Rows and histograms in it: how much there is to write."""
        return self.rows + (len(self.histograms.step) if self.histograms else 0)


def ascending(step: npt.NDArray[np.int64], slot: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether each (step, slot) is below the one that follows: one value less than there are."""
    below: npt.NDArray[np.bool_] = (step[1:] > step[:-1]) | ((step[1:] == step[:-1]) & (slot[1:] > slot[:-1]))
    return below
