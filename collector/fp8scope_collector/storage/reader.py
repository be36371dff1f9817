"""What the dashboard and the command line read: runs, slots, heat maps, series, scalars, raw rows.

`Reader` answers in frozen values with numpy arrays, over all ranks and over the lives of a resumed run (see `history`).
Long ranges come in columns of a power of two of steps whose smallest and largest value, of any rank at any of those
steps, are both kept, so that no spike is lost. They are read from rollups where these hold the steps, and raw elsewhere
(see `cover`); no query returns more than it says.

Ratios are shares of elements, 0 to 1. A missing field, a tensor of zeros (no headroom) and a step without rows are NaN.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import sqlalchemy as sa

from fp8core.records import FIELDS, Role
from fp8scope_collector.storage import curves, maps, samples, schema, spread
from fp8scope_collector.storage.engine import display_url, open_engine, open_stats
from fp8scope_collector.storage.findings import read_findings
from fp8scope_collector.storage.history import (
    FIRST_STEP,
    LAST_STEP,
    Life,
    Span,
    history,
    int_div,
    lives_of,
    owned_spans,
)
from fp8scope_collector.storage.quantities import (
    QUANTITIES,
    SPREAD_FIELDS,
    Floats,
    Ints,
    Quantity,
    check_fields,
    field_of,
)
from fp8scope_collector.storage.readmodels import (
    HeatMap,
    Histograms,
    Progress,
    Ranks,
    RunNotFound,
    RunSummary,
    Scalar,
    Series,
    Severity,
    Slot,
    Spread,
    State,
    StoredFinding,
    SystemState,
    Worst,
)
from fp8scope_collector.storage.run_list import STALE_AFTER_S, run_list
from fp8scope_collector.storage.run_view import RunView
from fp8scope_collector.storage.stats_store import StorageError, row_schema
from fp8scope_collector.storage.system import read_configuration, read_system

__all__ = [
    "QUANTITIES",
    "STALE_AFTER_S",
    "HeatMap",
    "Histograms",
    "Progress",
    "Quantity",
    "Ranks",
    "Reader",
    "RunNotFound",
    "RunSummary",
    "Scalar",
    "Series",
    "Severity",
    "Slot",
    "Spread",
    "State",
    "StorageError",
    "StoredFinding",
    "SystemState",
    "Worst",
]


class Reader:
    """Reads one database; safe to use from several threads.

    Raises:
        StorageError: the database is missing, empty, unreachable or of another version.
    """

    def __init__(self, url: str, *, clock: Callable[[], int] = time.time_ns) -> None:
        self._engine = open_engine(url, read_only=True)
        self._store = open_stats(self._engine)
        self._clock = clock

    @property
    def url(self) -> str:
        """The database's address, as it may be shown: without a password."""
        return display_url(self._engine.url)

    def close(self) -> None:
        """Closes the connections."""
        self._store.close()
        self._engine.dispose()

    def runs(self) -> list[RunSummary]:
        """All runs, the one heard from last first."""
        with self._connect() as connection:
            return run_list(connection, now_unix_ns=self._clock())

    def run(self, ref: str) -> RunSummary:
        """The run called `ref`: a name, or project/name.

        Raises:
            RunNotFound: none is, or several projects have a run of that name.
        """
        runs = self.runs()
        exact = [run for run in runs if run.ref == ref]
        found = exact or [run for run in runs if run.name == ref]
        if len(found) == 1:
            return found[0]
        if found:
            choices = " or ".join(sorted(repr(run.ref) for run in found))
            raise RunNotFound(f"run {ref!r} is in {len(found)} projects; say {choices}")
        names = ", ".join(run.ref for run in runs[:10]) + (", ..." if len(runs) > 10 else "")
        raise RunNotFound(f"run {ref!r} is unknown; " + (f"there are: {names}" if runs else "the database has no runs"))

    def slots(self, run_id: int) -> list[Slot]:
        """The slots of a run, in model order."""
        with self._connect() as connection:
            return self._slots(connection, run_id)

    def _slots(self, connection: sa.Connection, run_id: int) -> list[Slot]:
        slot, recipe = schema.slot.c, schema.slot_recipe.c
        rows = connection.execute(sa.select(schema.slot).where(slot.run_id == run_id).order_by(slot.slot)).all()
        incarnations = sa.select(recipe.incarnation).where(recipe.run_id == run_id).distinct()
        how: dict[int, Any] = {}
        for incarnation in sorted(connection.scalars(incarnations), reverse=True):
            if len(how) < len(rows):
                own = sa.select(recipe.slot, recipe.format, recipe.recipe, recipe.margin)
                for found in connection.execute(own.where(recipe.run_id == run_id, recipe.incarnation == incarnation)):
                    how.setdefault(found.slot, found)
        return [
            Slot(
                slot=row.slot,
                layer=row.layer,
                role=Role(row.role),
                module_class=row.module_class,
                in_features=row.in_features,
                out_features=row.out_features,
                format=how[row.slot].format if row.slot in how else "",
                recipe=how[row.slot].recipe if row.slot in how else "",
                margin=how[row.slot].margin if row.slot in how else 0,
            )
            for row in rows
        ]

    def progress(self, run_id: int) -> Progress | None:
        """How far the run is; None before its first row. Costs a few seeks for each rank."""
        with self._connect() as connection:
            lives = lives_of(connection, run_id)
            if not lives:
                return None
            seen = sa.select(schema.source.c.id, schema.source.c.last_seen_unix_ns, schema.source.c.finished_unix_ns)
            sending = {
                row.id
                for row in connection.execute(seen.where(schema.source.c.run_id == run_id))
                if row.finished_unix_ns is None and self._clock() - row.last_seen_unix_ns < STALE_AFTER_S * 1e9
            }
            stride = RunView(connection, self._store, run_id).stride
        last_step = max(life.last_step for life in lives)
        return Progress(
            first_step=min(life.first_step for life in lives),
            last_step=last_step,
            settled_step=min((life.last_step for life in lives if life.source_id in sending), default=last_step),
            stride=stride,
            lives=len(lives),
        )

    def heatmap(
        self,
        run_id: int,
        quantity: Quantity,
        *,
        roles: Sequence[Role] = tuple(Role),
        first_step: int = FIRST_STEP,
        last_step: int = LAST_STEP,
        max_columns: int = 500,
        width: int | None = None,
    ) -> HeatMap:
        """One quantity of all slots of `roles` over the recorded steps of [first_step, last_step].

        The columns have the smallest power of two of steps that makes at most `max_columns` of them, and not less than
        the usual distance of recorded steps; a live view passes the `width` that it already shows, and as `first_step`
        the first step that may have changed.

        Raises:
            ValueError: the quantity is unknown.
        """
        return self.heatmaps(
            run_id,
            [quantity],
            roles=roles,
            first_step=first_step,
            last_step=last_step,
            max_columns=max_columns,
            width=width,
        )[0]

    def heatmaps(
        self,
        run_id: int,
        quantities: Sequence[Quantity],
        *,
        roles: Sequence[Role] = tuple(Role),
        first_step: int = FIRST_STEP,
        last_step: int = LAST_STEP,
        max_columns: int = 500,
        width: int | None = None,
    ) -> list[HeatMap]:
        """Several quantities as `heatmap` answers each, for the cost of one pass over the rows."""
        with self._view(run_id) as view:
            slots = self._numbers(view.connection, run_id, roles)
            return maps.heatmaps(
                view,
                quantities,
                slots,
                first_step=first_step,
                last_step=last_step,
                max_columns=max_columns,
                width=width,
            )

    def top(self, run_id: int, *, last_steps: int = 100, limit: int = 10, by: Quantity = "overflow") -> list[Worst]:
        """The tensors with the most extreme `by` within the last steps, worst first.

        Largest amax, spread or ratio above zero, smallest headroom or SQNR; for scale_exp2 the largest change within
        those steps. From 64 `last_steps` on, up to 15 more, so that they begin with a bucket.

        Raises:
            ValueError: the quantity is unknown.
        """
        field = field_of(by)
        with self._view(run_id) as view:
            if not view.lives:
                return []
            end = max(life.last_step for life in view.lives)
            start = max(0, end - last_steps + 1)
            found = maps.Extremes(view, field, start // 16 * 16 if last_steps >= 64 else start, end)
            low_is_bad = by in ("headroom", "sqnr_db")
            value = found.low if low_is_bad else found.high - found.low if by == "scale_exp2" else found.high
            badness = -value if low_is_bad else np.where(value > 0, value, np.nan)
            step, rank = found.low_at if low_is_bad else found.high_at
            order = np.argsort(-badness, kind="stable")[:limit]
            worst = [int(i) for i in order if not np.isnan(badness[i])]
            slot = schema.slot.c
            query = sa.select(slot.slot, slot.layer, slot.role).where(slot.run_id == run_id, slot.slot.in_(worst))
            named = {row.slot: row for row in view.connection.execute(query)}
        return [
            Worst(
                slot=i,
                layer=named[i].layer,
                role=Role(named[i].role),
                value=float(value[i]),
                last_step=int(found.last[i]),
                step=int(step[i]),
                rank=int(rank[i]),
            )
            for i in worst
        ]

    def series(
        self,
        run_id: int,
        slot: int,
        fields: Sequence[str],
        *,
        first_step: int = FIRST_STEP,
        last_step: int = LAST_STEP,
        max_points: int = 750,
    ) -> Series:
        """Fields of one slot, at most `max_points` entries with their minimum and maximum over ranks and steps.

        A field is one of `FIELDS`, or scale_exp2, headroom (bits), overflow_ratio, underflow_ratio, subnormal_ratio,
        nonfinite_ratio, sqnr_db, spread.

        Raises:
            ValueError: a field is unknown.
        """
        check_fields(fields)
        with self._view(run_id) as view:
            return curves.series(view, slot, fields, first_step=first_step, last_step=last_step, max_points=max_points)

    def spread(
        self,
        run_id: int,
        slot: int,
        field: str,
        *,
        first_step: int = FIRST_STEP,
        last_step: int = LAST_STEP,
        max_points: int = 750,
    ) -> Spread:
        """How a field of one slot lies over the ranks: extremes with rank and step, exact at every resolution; median.

        A field is one that `series` knows, of those that rollups have places of: amax, scale_exp2, headroom, sqnr_db
        and the ratios.

        Raises:
            ValueError: the field is unknown, or has no places.
        """
        if field not in SPREAD_FIELDS:
            raise ValueError(f"field {field!r} has no spread; choose one of {', '.join(SPREAD_FIELDS)}")
        with self._view(run_id) as view:
            return spread.spread(view, slot, field, first_step=first_step, last_step=last_step, max_points=max_points)

    def ranks(
        self,
        run_id: int,
        slot: int,
        field: str,
        *,
        first_step: int = FIRST_STEP,
        last_step: int = LAST_STEP,
        max_columns: int = 200,
    ) -> Ranks:
        """A field of one slot on each rank, as far as raw rows are kept: one recorded step of each of the columns.

        A field is one that `series` knows. With very many ranks there are fewer columns: it costs by rows read, a few
        seeks for each, and reads 16,384 at most.

        Raises:
            ValueError: the field is unknown.
        """
        check_fields([field])
        with self._view(run_id) as view:
            return spread.ranks(view, slot, field, first_step=first_step, last_step=last_step, max_columns=max_columns)

    def histograms(
        self,
        run_id: int,
        slot: int,
        first_step: int = FIRST_STEP,
        last_step: int = LAST_STEP,
        max_columns: int = 200,
    ) -> Histograms:
        """How the magnitudes of one slot were distributed over steps, where it was sampled; all ranks added up."""
        with self._view(run_id) as view:
            return spread.histograms(view, slot, first_step=first_step, last_step=last_step, max_columns=max_columns)

    def extras(
        self, run_id: int, slot: int, first_step: int = FIRST_STEP, last_step: int = LAST_STEP
    ) -> dict[str, tuple[Ints, Ints, Floats]]:
        """The numbers of one slot that its library reports and no column has: by name (steps, ranks, values)."""
        with self._view(run_id) as view:
            spans = owned_spans(view.lives, first_step, last_step)
            found: dict[str, list[tuple[int, int, float]]] = {}
            for extra in samples.extras(view.connection, spans, slot):
                found.setdefault(extra.name, []).append((extra.step, view.rank_of[extra.source_id], extra.value))
        sorted_by_step = {name: list(zip(*sorted(rows), strict=True)) for name, rows in sorted(found.items())}
        return {
            name: (np.array(step, np.int64), np.array(rank, np.int64), np.array(value, np.float64))
            for name, (step, rank, value) in sorted_by_step.items()
        }

    def scalars(
        self,
        run_id: int,
        names: Sequence[str] | None = None,
        *,
        first_step: int = FIRST_STEP,
        last_step: int = LAST_STEP,
        max_points: int = 750,
    ) -> list[Scalar]:
        """The named numbers of the training loop (all, or `names`), each by its lowest rank, sorted by name."""
        scalar = schema.scalar.c
        with self._connect() as connection:
            lives: dict[str, list[Life]] = {}
            for name, life in self._scalar_lives(connection, run_id):
                if names is None or name in names:
                    lives.setdefault(name, []).append(life)
            found: list[Scalar] = []
            for name, reporting in sorted(lives.items()):
                rank = min(life.rank for life in reporting)
                spans = owned_spans([life for life in reporting if life.rank == rank], first_step, last_step)
                if not spans:
                    continue
                width = maps.column_width(*maps.extent(spans), max_points, 1)
                span = history(spans)
                bucket = int_div(scalar.step, width)
                inside = sa.and_(
                    scalar.source_id == span.c.source_id,
                    scalar.name == name,
                    scalar.step.between(span.c.first_step, span.c.last_step),
                )
                aggregates = [sa.func.min(scalar.step), sa.func.max(scalar.step), sa.func.count()]
                aggregates += [sa.func.min(scalar.value), sa.func.max(scalar.value), sa.func.count(scalar.value)]
                query = sa.select(*aggregates).join_from(span, schema.scalar, inside).group_by(bucket).order_by(bucket)
                first, last, count, low, high, there = _columns(connection.execute(query).all(), 6)
                steps, lasts, counts, missing = (c.astype(np.int64) for c in (first, last, count, count - there))
                found.append(Scalar(name, steps, lasts, counts, low, high, missing))
        return found

    def findings(
        self, run_id: int | None = None, *, open_only: bool = False, severity: Severity = "info", limit: int = 1000
    ) -> list[StoredFinding]:
        """What diagnosis found, of one run or of all, from `severity` on: worst first, then the newest."""
        with self._connect() as connection:
            return read_findings(connection, run_id, open_only=open_only, severity=severity, limit=limit)

    def judged_step(self, run_id: int) -> int | None:
        """The step up to which the collector's diagnosis has judged a run; None: it never looked at it."""
        with self._connect() as connection:
            judged = schema.judged.c
            return connection.scalar(sa.select(judged.step).where(judged.run_id == run_id, judged.step >= 0))

    def system(self) -> SystemState:
        """How large the database is, and what it knows of the agents."""
        with self._connect() as connection:
            return read_system(connection)

    def configuration(self, run_id: int) -> dict[str, str]:
        """What the run was started with, by name: its configuration and, as `environment.NAME`, where it runs."""
        with self._connect() as connection:
            return read_configuration(connection, run_id)

    def rows(self, run_id: int, *, batch_rows: int = 50_000) -> Iterator[pa.RecordBatch]:
        """Every stored row of all ranks and incarnations, in batches; memory does not grow with the run.

        Columns: run, incarnation, rank, layer, role, step, then `FIELDS` by name; ordered by incarnation, rank, step
        and model order.
        """
        label = next(run.ref for run in self.runs() if run.id == run_id)
        names = [field.name for field in FIELDS]
        values = row_schema(names)
        key = [pa.field(name, pa.string() if name in ("layer", "role") else pa.int64()) for name in _ROW_KEY]
        layout = pa.schema([pa.field("run", pa.string()), *key, *(values.field(name) for name in names)])
        slots = self.slots(run_id)
        layers, roles = (pa.array([getattr(slot, of) for slot in slots], pa.string()) for of in ("layer", "role"))
        with self._connect() as connection:
            for life in lives_of(connection, run_id):
                span = Span(life.source_id, life.incarnation, life.first_step, life.last_step)
                for batch in self._store.rows(connection, [span], names, batch_rows=batch_rows):
                    count, slot = batch.num_rows, batch.column("slot")
                    own = [pa.repeat(value, count) for value in (label, life.incarnation, life.rank)]
                    named = [layers.take(slot), roles.take(slot), batch.column("step")]
                    columns = [*own, *named, *(batch.column(name) for name in names)]
                    yield pa.RecordBatch.from_arrays(
                        [column.cast(field.type) for column, field in zip(columns, layout, strict=True)], schema=layout
                    )

    @contextlib.contextmanager
    def _view(self, run_id: int) -> Iterator[RunView]:
        with self._connect() as connection:
            yield RunView(connection, self._store, run_id)

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sa.Connection]:
        """A connection; what the database refuses is a `StorageError`."""
        try:
            with self._engine.connect() as connection:
                yield connection
        except sa.exc.DBAPIError as error:
            reason = " ".join(str(error.orig).split())
            raise StorageError(f"cannot read database {display_url(self._engine.url)}: {reason}") from error

    def _scalar_lives(self, connection: sa.Connection, run_id: int) -> Iterator[tuple[str, Life]]:
        """Each name that a source reported, with the steps it has there; names are found by seeks."""
        source, scalar = schema.source.c, schema.scalar.c

        def next_name(source_id: Any, *above: Any) -> Any:
            query = sa.select(sa.func.min(scalar.name)).where(scalar.source_id == source_id, *above)
            return query.scalar_subquery()

        first = sa.select(source.id.label("source_id"), next_name(source.id).label("name"))
        names = first.where(source.run_id == run_id).cte("names", recursive=True)
        following = next_name(names.c.source_id, scalar.name > names.c.name)
        names = names.union_all(sa.select(names.c.source_id, following).where(names.c.name.is_not(None)))
        here = sa.and_(scalar.source_id == names.c.source_id, scalar.name == names.c.name)
        ends = [sa.select(end(scalar.step)).where(here).scalar_subquery() for end in (sa.func.min, sa.func.max)]
        query = (
            sa.select(names.c.name, source.id, source.rank, source.incarnation, *ends)
            .join_from(names, schema.source, source.id == names.c.source_id)
            .where(names.c.name.is_not(None))
        )
        for name, *life in connection.execute(query).all():
            yield name, Life(*life)

    def _numbers(self, connection: sa.Connection, run_id: int, roles: Sequence[Role]) -> Ints:
        """The numbers of the slots with these roles, ascending: model order."""
        slot = schema.slot.c
        query = sa.select(slot.slot).where(slot.run_id == run_id, slot.role.in_([*roles])).order_by(slot.slot)
        return np.array(connection.execute(query).scalars().all(), dtype=np.int64)


_ROW_KEY = ("incarnation", "rank", "layer", "role", "step")


def _columns(rows: Sequence[Any], count: int) -> list[Floats]:
    """Rows as float64 columns, null as NaN."""
    columns = zip(*rows, strict=True) if rows else [()] * count
    return [np.array(column, dtype=np.float64) for column in columns]
