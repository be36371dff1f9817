"""What Prometheus sees: counters of this process, and a few numbers for each of the runs seen last.

docs/metrics.md is the catalogue. A run appears by its name, a layer only while something is wrong with it, and of a run
at most fifty: the labels stay few whatever is trained.
Everything is kept in one `Metrics` behind one lock; a scrape copies it and formats the copy. Counters start at 0 with
the process, as Prometheus expects; what is said of a run's progress comes from the database (`observe_database`).
"""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fp8core.records import Role
from fp8scope_collector.messages import Batch, Source
from fp8scope_collector.storage.findings import SEVERITIES, FindingsNow
from fp8scope_collector.storage.overview import RunState

MAX_RUNS = 50
ROLES = tuple(Role)
COUNTED = ("numel", "overflow", "underflow", "nonfinite")  # fields that are summed for each role
COMMIT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
DROP_REASONS = ("ring_full", "spool_full", "spool_error")  # shown from 0, before the first drop
FINDINGS_PER_RUN = 50  # open ones that have a series of their own
MAX_FINDINGS = 1000  # of all runs
MAX_DROP_REASONS = 16  # of a run; agents name them, so the rest is one: "other"
Outcome = Literal["committed", "duplicate", "refused"]


@dataclass
class _Newest:
    """The newest step of a rank: its worst values by role, NaN where nothing was said."""

    incarnation: int
    step: int
    overflow_ratio: npt.NDArray[np.float64]
    headroom_bits: npt.NDArray[np.float64]


@dataclass
class _RunTotals:
    run: str
    roles: set[int] = field(default_factory=set)  # indices into ROLES
    elements: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(COUNTED), len(ROLES))))
    ranks: dict[int, _Newest] = field(default_factory=dict)


class Metrics(Collector):
    """Takes what happened, from any thread; `collect` gives it to prometheus_client."""

    def __init__(self, version: str) -> None:
        self._lock = threading.Lock()
        self._version = version
        self._rows = 0
        self._bytes = 0
        self._batches: dict[Outcome, int] = {"committed": 0, "duplicate": 0, "refused": 0}
        self._commit_counts = [0] * (len(COMMIT_BUCKETS_S) + 1)
        self._commit_seconds = 0.0
        self._queue_bytes = 0
        self._open_streams = 0
        self._throttled = 0
        self._retries = 0
        self._database_up = True
        self._database_bytes = 0
        self._statistics_bytes = 0
        self._runs: list[RunState] = []
        self._findings: FindingsNow | None = None
        self._totals: OrderedDict[int, _RunTotals] = OrderedDict()  # by run id, least recently active first

    @property
    def database_up(self) -> bool:
        """Whether the last thing that the writer did with the database succeeded."""
        return self._database_up

    @property
    def open_streams(self) -> int:
        """Agents connected now."""
        return self._open_streams

    def observe_batch(self, outcome: Outcome, *, wire_bytes: int) -> None:
        """A batch was committed, recognised as a resend, or refused."""
        with self._lock:
            self._batches[outcome] += 1
            self._bytes += wire_bytes

    def observe_commit(self, seconds: float) -> None:
        """A transaction took so long."""
        with self._lock:
            self._commit_counts[bisect.bisect_left(COMMIT_BUCKETS_S, seconds)] += 1
            self._commit_seconds += seconds

    def observe_source(self, source: Source) -> None:
        """A source opened: the counters of its run exist from here on, at 0."""
        with self._lock:
            self._totals_of(source)

    def observe_rows(self, batch: Batch) -> None:
        """These rows are committed, for the first time."""
        with self._lock:
            self._rows += batch.rows
            if batch.rows:
                totals = self._totals_of(batch.source)
                totals.elements += _sums(batch)
                _merge_newest(totals, batch)

    def observe_queue(self, queue_bytes: int) -> None:
        """So much waits for the writer."""
        with self._lock:
            self._queue_bytes = queue_bytes

    def observe_streams(self, change: int) -> None:
        """A stream opened (+1) or ended (-1)."""
        with self._lock:
            self._open_streams += change

    def observe_throttled(self) -> None:
        """A batch had to wait for its token's rate."""
        with self._lock:
            self._throttled += 1

    def observe_database_up(self, up: bool) -> None:
        """The database took what the writer gave it, or failed to and will be asked again."""
        with self._lock:
            self._database_up = up
            self._retries += not up

    def observe_database(self, runs: Sequence[RunState], database_bytes: int, statistics_bytes: int = 0) -> None:
        """What the database says of the runs seen last, its size, and that of statistics beside it."""
        with self._lock:
            self._runs = list(runs)
            self._database_bytes = database_bytes
            self._statistics_bytes = statistics_bytes

    def observe_findings(self, findings: FindingsNow) -> None:
        """What diagnosis says is wrong now."""
        with self._lock:
            self._findings = findings

    def collect(self) -> Iterable[Metric]:
        """All metrics, as of now."""
        with self._lock:
            return [*self._service(), *self._progress(), *self._elements(), *self._worst(), *self._open_findings()]

    def _totals_of(self, source: Source) -> _RunTotals:
        totals = self._totals.setdefault(source.run_id, _RunTotals(source.run))
        totals.roles.update(source.roles)
        self._totals.move_to_end(source.run_id)
        if len(self._totals) > MAX_RUNS:
            self._totals.popitem(last=False)
        return totals

    def _service(self) -> list[Metric]:
        build = GaugeMetricFamily("fp8scope_build_info", "1, with the collector's version", labels=["version"])
        build.add_metric([self._version], 1)
        batches = CounterMetricFamily(
            "fp8scope_ingest_batches", "Batches by what became of them since this process started", labels=["outcome"]
        )
        for outcome, count in self._batches.items():
            batches.add_metric([outcome], count)
        cumulative = np.cumsum(self._commit_counts).tolist()
        commits = HistogramMetricFamily("fp8scope_commit_seconds", "Time of one transaction of grouped batches")
        bounds = [*map(str, COMMIT_BUCKETS_S), "+Inf"]
        commits.add_metric([], list(zip(bounds, cumulative, strict=True)), self._commit_seconds)
        return [
            build,
            CounterMetricFamily("fp8scope_ingest_rows", "Rows committed since this process started", self._rows),
            batches,
            CounterMetricFamily("fp8scope_ingest_bytes", "Bytes of batches as received, compressed", self._bytes),
            commits,
            GaugeMetricFamily("fp8scope_queue_bytes", "Batches that wait for the writer", self._queue_bytes),
            GaugeMetricFamily("fp8scope_open_streams", "Agents connected now", self._open_streams),
            CounterMetricFamily(
                "fp8scope_throttled_batches", "Batches that their token's rate held up", self._throttled
            ),
            CounterMetricFamily("fp8scope_database_retries", "Uses of the database that failed", self._retries),
            GaugeMetricFamily("fp8scope_database_up", "1 if the last use of the database worked", self._database_up),
            GaugeMetricFamily("fp8scope_database_bytes", "Size of the database", self._database_bytes),
            GaugeMetricFamily(
                "fp8scope_statistics_bytes",
                "Size of statistics in ClickHouse or chDB; 0 where they are in the database",
                self._statistics_bytes,
            ),
        ]

    def _progress(self) -> list[Metric]:
        step = GaugeMetricFamily("fp8scope_run_last_step", "Newest step committed, over all ranks", labels=["run"])
        seen = GaugeMetricFamily(
            "fp8scope_run_last_seen_timestamp_seconds", "When a rank of the run was heard last", labels=["run"]
        )
        active = GaugeMetricFamily("fp8scope_run_active", "1 while the run has not finished or failed", labels=["run"])
        dropped = CounterMetricFamily(
            "fp8scope_agent_dropped_rows", "Rows that agents of the run had to drop", labels=["run", "reason"]
        )
        for state in self._runs:
            if state.last_step is not None:
                step.add_metric([state.run], state.last_step)
            seen.add_metric([state.run], state.last_seen_unix_ns / 1e9)
            active.add_metric([state.run], state.active)
            by_reason = dict.fromkeys(DROP_REASONS, 0)
            for reason, rows in sorted(state.dropped_rows.items()):
                shown = reason if reason in by_reason or len(by_reason) < MAX_DROP_REASONS else "other"
                by_reason[shown] = by_reason.get(shown, 0) + rows
            for reason, rows in by_reason.items():
                dropped.add_metric([state.run, reason], rows)
        return [step, seen, active, dropped]

    def _open_findings(self) -> list[Metric]:
        """A series for each open finding, with the same labels as long as it is open and no worse."""
        labels = ["run", "rule", "severity", "layer", "role"]
        finding = GaugeMetricFamily("fp8scope_finding", "1 while a finding of warning or worse is open", labels=labels)
        count = GaugeMetricFamily("fp8scope_open_findings", "Open findings", labels=["run", "severity"])
        looked = GaugeMetricFamily(
            "fp8scope_diagnosis_last_look_timestamp_seconds", "When runs were looked at last; 0: never"
        )
        if self._findings is None:
            return [finding, count, looked]
        shown = {state.run for state in self._runs}
        series = [each for each in self._findings.worst if each.run in shown]
        for each in sorted(series, key=lambda each: each.severity != "critical")[:MAX_FINDINGS]:
            finding.add_metric([each.run, each.rule, each.severity, each.layer, each.role], 1)
        counts = {(run, severity): n for run, severity, n in self._findings.counts}
        for state in self._runs:
            for severity in SEVERITIES:
                count.add_metric([state.run, severity], counts.get((state.run, severity), 0))
        looked.add_metric([], self._findings.looked_unix_ns / 1e9)
        return [finding, count, looked]

    def _elements(self) -> Sequence[Metric]:
        families = [
            CounterMetricFamily("fp8scope_elements", "Elements quantised", labels=["run", "role"]),
            CounterMetricFamily("fp8scope_overflow_elements", "Elements that a cast clipped", labels=["run", "role"]),
            CounterMetricFamily(
                "fp8scope_underflow_elements", "Elements that a cast made zero", labels=["run", "role"]
            ),
            CounterMetricFamily("fp8scope_nonfinite_elements", "Elements NaN or infinite", labels=["run", "role"]),
        ]
        for totals in self._totals.values():
            for index in sorted(totals.roles):
                for family, sums in zip(families, totals.elements, strict=True):
                    family.add_metric([totals.run, ROLES[index]], float(sums[index]))
        return families

    def _worst(self) -> list[Metric]:
        overflow = GaugeMetricFamily(
            "fp8scope_worst_overflow_ratio", "Largest share of clipped elements of a tensor", labels=["run", "role"]
        )
        headroom = GaugeMetricFamily(
            "fp8scope_lowest_headroom_bits", "Least headroom of a tensor, negative: clipping", labels=["run", "role"]
        )
        for totals in self._totals.values():
            if not totals.ranks:
                continue
            ratios = np.fmax.reduce([newest.overflow_ratio for newest in totals.ranks.values()])
            bits = np.fmin.reduce([newest.headroom_bits for newest in totals.ranks.values()])
            for role, ratio, least in zip(ROLES, ratios.tolist(), bits.tolist(), strict=True):
                if not np.isnan(ratio):
                    overflow.add_metric([totals.run, role], ratio)
                if not np.isnan(least):
                    headroom.add_metric([totals.run, role], least)
        return [overflow, headroom]


def _sums(batch: Batch) -> npt.NDArray[np.float64]:
    """Sums of COUNTED over the batch, by role: float64 [len(COUNTED), len(ROLES)], exact below 2**53."""
    counts = np.zeros((len(COUNTED), batch.rows))
    for own, name in zip(counts, COUNTED, strict=True):
        if name in batch.columns:
            own[:] = batch.columns[name]
    has_role = batch.source.role[batch.slot] == np.arange(len(ROLES), dtype=np.int8)[:, np.newaxis]
    sums: npt.NDArray[np.float64] = counts @ has_role.astype(np.float64).T
    return sums


def _merge_newest(totals: _RunTotals, batch: Batch) -> None:
    """Keeps the worst values of the rank's newest step; a new incarnation starts over, at whatever step it is."""
    source, step = batch.source, int(batch.step.max())
    known = totals.ranks.get(source.rank)
    if known and (known.incarnation, known.step) > (source.incarnation, step):
        return
    newest = _Newest(source.incarnation, step, *_worst_by_role(batch, step))
    if known and (known.incarnation, known.step) == (source.incarnation, step):
        newest.overflow_ratio = np.fmax(newest.overflow_ratio, known.overflow_ratio)
        newest.headroom_bits = np.fmin(newest.headroom_bits, known.headroom_bits)
    totals.ranks[source.rank] = newest


def _worst_by_role(batch: Batch, step: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The largest overflow ratio and the lowest headroom among the rows of `step`, [len(ROLES)] each, else NaN."""
    of_step = batch.step == step
    rows = slice(None) if of_step.all() else of_step
    slot = batch.slot[rows]
    needed = ("overflow", "numel", "amax", "scale_max")
    column = {name: batch.columns[name][rows].astype(np.float64) for name in needed if name in batch.columns}
    absent = np.full(len(slot), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = column.get("overflow", absent) / column.get("numel", absent)
        scaled = column.get("amax", absent) * column.get("scale_max", absent)
        headroom = batch.source.log2_max[slot] - np.log2(scaled)
    role = batch.source.role[slot]
    worst = np.full((2, len(ROLES)), np.nan)
    np.fmax.at(worst[0], role, ratio)
    np.fmin.at(worst[1], role, np.where(np.isfinite(headroom), headroom, np.nan))
    return worst[0], worst[1]
