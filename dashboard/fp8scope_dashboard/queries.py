"""What the views ask of the database, cached: one reader for the process.

Answers are frozen, so everybody who looks gets the same ones (`st.cache_resource`), not a copy each.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import streamlit as st

from fp8scope_collector.advisers import (
    ConstantAdvice,
    RefreshAdvice,
    advise_constant,
    advise_refresh,
    histories,
)
from fp8scope_collector.storage.acknowledge import AcknowledgeError, Acknowledger
from fp8scope_collector.storage.history import LAST_STEP
from fp8scope_collector.storage.reader import (
    Histograms,
    Quantity,
    Reader,
    RunSummary,
    Scalar,
    Series,
    Slot,
    StorageError,
    StoredFinding,
    SystemState,
    Worst,
)
from fp8scope_dashboard.charts import panels, tensor
from fp8scope_dashboard.charts.compare import Divergence, aligned, divergence
from fp8scope_dashboard.charts.ranks import RankValues
from fp8scope_dashboard.collector import Service, ask

Ints = panels.Ints
_LATE_STEPS = 32  # a rank that is later than that is seen a minute later
_SIDES = ("low", "high")
_NONE = np.empty(0)
_NO_STEP = _NONE.astype(np.int64)
_NO_VALUES = dict.fromkeys(tensor.FIELDS, _NONE)
NOTHING = Series(_NO_STEP, _NO_STEP, _NO_STEP, _NO_VALUES, _NO_VALUES)


def database_url() -> str:
    """The database of this dashboard."""
    return os.environ.get("FP8SCOPE_DB", "sqlite:///fp8scope.db")


@functools.cache
def _reader(url: str) -> Reader:
    return Reader(url)


def reader() -> Reader:
    """The reader of this process.

    Raises:
        StorageError: the database cannot be read; asked again, it tries again.
    """
    return _reader(database_url())


@st.cache_resource(ttl=1.0, max_entries=4, show_spinner=False)
def _runs(url: str) -> list[RunSummary]:
    return _reader(url).runs()


def runs() -> list[RunSummary]:
    """All runs, at most a second old."""
    return _runs(database_url())


def run(ref: str) -> RunSummary | None:
    """The run called `ref`; None if there is none, or more than one."""
    found = [run for run in runs() if run.ref == ref] or [run for run in runs() if run.name == ref]
    return found[0] if len(found) == 1 else None


@st.cache_resource(ttl=30.0, max_entries=64, show_spinner=False)
def slots(_url: str, run_id: int, incarnations: int) -> list[Slot]:
    """The slots of a run; they change only when it is resumed."""
    return reader().slots(run_id)


def slots_of(run: RunSummary) -> list[Slot]:
    """The slots of a run, in model order."""
    return slots(database_url(), run.id, run.incarnations)


@st.cache_resource(ttl=600.0, max_entries=1000, show_spinner=False)  # a run that grows has other `rows`
def worst(_url: str, run_id: int, rows: int) -> tuple[Worst, str] | None:
    """The tensor with the largest share of NaN and Inf in the newest steps, or of overflow; None: there is neither."""
    kinds: tuple[tuple[Quantity, str], ...] = (("nonfinite", "NaN or Inf"), ("overflow", "overflow"))
    for quantity, name in kinds:
        if found := reader().top(run_id, last_steps=64, limit=1, by=quantity):
            return found[0], name
    return None


@st.cache_resource(ttl=60.0, max_entries=64, show_spinner=False)
def _settled_scalars(url: str, run_id: int, _incarnations: int, first_step: int, last_step: int) -> list[Scalar]:
    return _reader(url).scalars(run_id, first_step=first_step, last_step=last_step, max_points=panels.MAX_POINTS)


@st.cache_resource(ttl=1.5, max_entries=64, show_spinner=False)
def _newest_scalars(
    url: str, run_id: int, _rows: int, first_step: int, last_step: int, max_points: int
) -> list[Scalar]:
    return _reader(url).scalars(run_id, first_step=first_step, last_step=last_step, max_points=max_points)


def scalars(run: RunSummary, first_step: int, last_step: int) -> list[Scalar]:
    """The scalars of a run over a range of steps; of a run that grows, only what is new is read at each tick."""
    url, settled = database_url(), _settled_step(run, first_step, last_step)
    if settled is None:
        return _newest_scalars(url, run.id, run.rows, first_step, last_step, panels.MAX_POINTS)
    old = {scalar.name: scalar for scalar in _settled_scalars(url, run.id, run.incarnations, first_step, settled)}
    most = max((scalar.step for scalar in old.values()), key=len, default=_NO_STEP)
    points = _as_fine_as(most, settled + 1, last_step)
    new = {s.name: s for s in _newest_scalars(url, run.id, run.rows, settled + 1, last_step, points)}
    both = [_joined_scalar(old[name], new[name]) for name in old if name in new]
    alone = [found[name] for found in (old, new) for name in found if (name in old) != (name in new)]
    return sorted([*both, *alone], key=lambda scalar: scalar.name)


def _joined_scalar(old: Scalar, new: Scalar) -> Scalar:
    parts = ("step", "last", "count", "low", "high", "missing")
    return Scalar(old.name, *(np.concatenate([getattr(old, part), getattr(new, part)]) for part in parts))


def _settled_step(run: RunSummary, first_step: int, last_step: int) -> int | None:
    """The last step that no rank writes any more, a round number; None: all of the range is read at once."""
    chunk = max(64, 2 ** int(np.log2(max(1, last_step - first_step + 1))) // 16)
    settled = (last_step - _LATE_STEPS) // chunk * chunk - 1
    ended = run.state in ("finished", "failed")
    return None if ended or settled <= first_step or last_step < (run.last_step or 0) else settled


def _as_fine_as(step: Ints, first_step: int, last_step: int) -> int:
    """How many points make a stretch as fine as the one before, whose points begin at `step`: a seam would show."""
    usual = float(np.median(np.diff(step))) if step.size > 1 else 1.0
    width = int(2 ** round(math.log2(max(1.0, usual))))
    return last_step // width - first_step // width + 1


@st.cache_resource(ttl=60.0, max_entries=256, show_spinner=False)
def _settled_series(
    url: str, run_id: int, _incarnations: int, slot: int, first_step: int, last_step: int, max_points: int
) -> Series:
    return _reader(url).series(
        run_id, slot, tensor.FIELDS, first_step=first_step, last_step=last_step, max_points=max_points
    )


@st.cache_resource(ttl=1.5, max_entries=256, show_spinner=False)
def _newest_series(
    url: str, run_id: int, _rows: int, slot: int, first_step: int, last_step: int, max_points: int
) -> Series:
    return _reader(url).series(
        run_id, slot, tensor.FIELDS, first_step=first_step, last_step=last_step, max_points=max_points
    )


def series(run: RunSummary, slot: int, first_step: int, last_step: int, max_points: int = panels.MAX_POINTS) -> Series:
    """Everything that is recorded about one slot over a range of steps.

    Of a run that grows only what lies above a round number of steps is read at each tick.
    """
    url, settled = database_url(), _settled_step(run, first_step, last_step)
    if settled is None:
        return _newest_series(url, run.id, run.rows, slot, first_step, last_step, max_points)
    old = _settled_series(url, run.id, run.incarnations, slot, first_step, settled, max_points)
    points = _as_fine_as(old.step, settled + 1, last_step)
    new = _newest_series(url, run.id, run.rows, slot, settled + 1, last_step, points)
    return joined(old, new)


@st.cache_resource(ttl=10.0, max_entries=64, show_spinner=False)
def _histograms(url: str, run_id: int, slot: int, first_step: int, last_step: int) -> Histograms:
    return _reader(url).histograms(run_id, slot, first_step, last_step)


def histograms(run: RunSummary, slot: int, first_step: int, last_step: int) -> Histograms:
    """How one slot's magnitudes were distributed where that was sampled; of a run that grows, ten seconds old."""
    return _histograms(database_url(), run.id, slot, first_step, _end(run, last_step))


@st.cache_resource(ttl=10.0, max_entries=64, show_spinner=False)
def _ranks(url: str, run_id: int, slot: int, first_step: int, last_step: int) -> RankValues:
    source, steps = _reader(url), {"first_step": first_step, "last_step": last_step}
    return RankValues(
        source.spread(run_id, slot, "amax", **steps, max_points=panels.MAX_POINTS),
        source.series(run_id, slot, ("spread",), **steps, max_points=panels.MAX_POINTS),
        source.ranks(run_id, slot, "amax", **steps),
    )


def ranks(run: RunSummary, slot: int, first_step: int, last_step: int) -> RankValues:
    """How one slot's amax lies over the ranks; of a run that grows, ten seconds old."""
    return _ranks(database_url(), run.id, slot, first_step, _end(run, last_step))


def _end(run: RunSummary, last_step: int) -> int:
    """The last step to ask for: beyond the newest one where the view follows a run, so that the answer can be kept."""
    following = run.state not in ("finished", "failed") and last_step == run.last_step
    return LAST_STEP if following else last_step


def joined(old: Series, new: Series) -> Series:
    """Two stretches of one slot as one."""
    step, last, count = (np.concatenate([getattr(s, n) for s in (old, new)]) for n in ("step", "last", "count"))
    low, high = ({n: np.concatenate([getattr(s, side)[n] for s in (old, new)]) for n in old.low} for side in _SIDES)
    return Series(step, last, count, low, high)


@dataclass(frozen=True)
class Rates:
    """What the database grew by a second, None before two looks at it; `over` says over which time."""

    rows: float | None = None
    bytes: float | None = None
    over: str = "known after a few seconds"


@dataclass
class _Looks:
    """Looks at the database's size of the last minute, by whoever looked."""

    seen: list[tuple[float, int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def rates(self, state: SystemState) -> Rates:
        now = time.monotonic()
        with self.lock:
            if not self.seen or now - self.seen[-1][0] > 1:
                self.seen.append((now, state.total_rows, state.database_bytes))
            self.seen = [look for look in self.seen if now - look[0] < 65]
            if len(self.seen) < 2:
                return Rates()
            (start, rows, size), (end, rows_now, size_now) = self.seen[0], self.seen[-1]
        took = end - start
        return Rates((rows_now - rows) / took, (size_now - size) / took, f"over {took:.0f} s")


@st.cache_resource(show_spinner=False)
def _looks(_url: str) -> _Looks:
    return _Looks()


@st.cache_resource(ttl=1.5, max_entries=4, show_spinner=False)
def _system(url: str) -> SystemState:
    return _reader(url).system()


def system() -> tuple[SystemState, Rates]:
    """The database and its agents, and how fast it grows."""
    state = _system(database_url())
    return state, _looks(database_url()).rates(state)


@st.cache_data(ttl=4.0, max_entries=2, show_spinner=False)
def _service(_variable: str) -> Service:
    return ask()


def service() -> Service:
    """What the collector says of itself, at most four seconds old."""
    return _service(os.environ.get("FP8SCOPE_METRICS", ""))


@st.cache_resource(ttl=3600.0, max_entries=16, show_spinner=False)
def _advice(url: str, run_id: int, _tenths: int) -> tuple[list[ConstantAdvice], list[RefreshAdvice]]:
    tensors = histories(_reader(url), run_id)
    return advise_constant(tensors), advise_refresh(tensors)


def advice(run: RunSummary) -> tuple[list[ConstantAdvice], list[RefreshAdvice]]:
    """What the run says about constant scales and kept ones; reads all rows, anew when there are a tenth more."""
    return _advice(database_url(), run.id, int(np.log(max(1, run.rows)) / np.log(1.1)))


@st.cache_data(ttl=30.0, max_entries=64, show_spinner=False)
def configuration(_url: str, run_id: int) -> dict[str, str]:
    """What a run was started with."""
    return reader().configuration(run_id)


@st.cache_data(ttl=600.0, max_entries=200, show_spinner=False)
def _divergence_within(url: str, one: int, other: int, quantity: Quantity, first: int, last: int) -> Divergence | None:
    source = _reader(url)
    maps = [
        source.heatmap(run, quantity, first_step=first, last_step=last, max_columns=last - first + 1)
        for run in (one, other)
    ]
    if not all(heatmap.low.shape[1] for heatmap in maps):
        return None
    return divergence(aligned(maps[0], source.slots(one), maps[1], source.slots(other)))


def divergence_within(one: int, other: int, quantity: Quantity, first: int, last: int) -> Divergence | None:
    """Where two runs begin to differ within these steps, as exactly as the rows say; None where that is not known."""
    return _divergence_within(database_url(), one, other, quantity, first, last)


def shown_database() -> str:
    """The database's address without its password."""
    return reader().url


MOST_FINDINGS = 500


@st.cache_resource(ttl=3.0, max_entries=64, show_spinner=False)
def _judged(url: str, run_id: int) -> int | None:
    return _reader(url).judged_step(run_id)


def judged_step(run_id: int) -> int | None:
    """The step up to which diagnosis has looked at a run while it went on; None: it never did."""
    return _judged(database_url(), run_id)


@st.cache_resource(ttl=1.5, max_entries=16, show_spinner=False)
def _findings(url: str, run_id: int | None) -> list[StoredFinding]:
    return _reader(url).findings(run_id, limit=MOST_FINDINGS)


def findings(run_id: int | None = None) -> list[StoredFinding]:
    """The worst and newest findings of a run, or of all runs."""
    return _findings(database_url(), run_id)


@st.cache_resource(ttl=3.0, max_entries=4, show_spinner=False)
def _open_findings(url: str) -> dict[int, dict[str, int]]:
    counts: dict[int, dict[str, int]] = {}
    for finding in _reader(url).findings(open_only=True, limit=10_000):
        if finding.acknowledged_unix_ns is None:
            of_run = counts.setdefault(finding.run_id, {})
            of_run[finding.severity] = of_run.get(finding.severity, 0) + 1
    return counts


def findings_by_severity() -> dict[int, dict[str, int]]:
    """How many open findings that nobody has acknowledged each run has, by severity."""
    return _open_findings(database_url())


def open_findings() -> dict[int, int]:
    """How many open findings that nobody has acknowledged each run has."""
    return {run_id: sum(counts.values()) for run_id, counts in findings_by_severity().items()}


@st.cache_resource(show_spinner=False)
def _acknowledger(url: str) -> Acknowledger:
    return Acknowledger(url)


def acknowledge(findings: Iterable[int], *, by: str, reason: str) -> str:
    """Writes that somebody has seen findings; a sentence where that could not be done."""
    try:
        for finding in findings:
            _acknowledger(database_url()).acknowledge(finding, by=by, reason=reason)
    except (AcknowledgeError, StorageError) as error:
        return str(error)
    _findings.clear()
    _open_findings.clear()
    return ""
