"""What a view shows, as a file: `/download.csv` and `/download.parquet` with the query parameters of the view.

The address of a view and of its file differ in the path alone, so a link to the numbers can be sent around like a link
to the picture. A file has what the chart has: the extremes of each column of steps, not every row; all rows of a run
come from `fp8scope export`. Who may download is decided in front of every route (login.py).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pyarrow as pa
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fp8core.records import Role
from fp8scope_collector.export import Format, table_bytes
from fp8scope_collector.storage.history import FIRST_STEP, LAST_STEP
from fp8scope_collector.storage.reader import HeatMap, Reader, RunNotFound, RunSummary, Series, Slot, StorageError
from fp8scope_dashboard import links, names, queries
from fp8scope_dashboard.charts import panels, tensor

_MEDIA_TYPES: dict[Format, str] = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}


class NothingToDownload(LookupError):  # noqa: N818 - reads as what happened
    """The view has no such run, layer or rows; the text says which."""


def routes() -> list[Route]:
    """The routes, one for each format."""
    return [Route(f"/download.{name}", _answer, methods=["GET"], name=name) for name in _MEDIA_TYPES]


def table(reader: Reader, where: links.Where) -> tuple[str, pa.Table]:
    """A name for the file, and what the view at `where` shows: the runs, a run's heat map, or a tensor's series.

    Raises:
        NothingToDownload: the run, the layer or the rows are not there.
        StorageError: the database cannot be read.
    """
    if not where.run:
        return "runs", _runs(reader.runs())
    try:
        run = reader.run(where.run)
    except RunNotFound as error:
        raise NothingToDownload(str(error)) from None
    slots = reader.slots(run.id)
    first = FIRST_STEP if where.first_step is None else where.first_step
    last = LAST_STEP if where.last_step is None else where.last_step
    if where.layer:
        slot = _slot(run, slots, where)
        series = reader.series(
            run.id,
            slot.slot,
            tensor.FIELDS,
            first_step=first,
            last_step=last,
            max_points=panels.MAX_POINTS,
        )
        return f"{run.name}-{slot.layer}-{slot.role}", _series(series, run, slot)
    try:
        shown = [slot for slot in names.matching(slots, where.filter) if where.role in (None, slot.role)]
    except ValueError as error:
        raise NothingToDownload(str(error)) from None
    heatmap = reader.heatmap(
        run.id,
        where.quantity,
        roles=(where.role,) if where.role else tuple(Role),
        first_step=first,
        last_step=last,
        max_columns=panels.MAX_COLUMNS,
    )
    return f"{run.name}-{where.quantity}", _heatmap(heatmap, run, shown)


def _slot(run: RunSummary, slots: list[Slot], where: links.Where) -> Slot:
    mine = [slot for slot in slots if slot.layer == where.layer]
    if not mine:
        raise NothingToDownload(f"layer {where.layer!r} is not in run {run.ref!r}")
    return next((slot for slot in mine if slot.role == where.role), mine[0])


def _runs(runs: list[RunSummary]) -> pa.Table:
    fields = ("state", "first_step", "last_step", "rows", "ranks", "world_size", "incarnations", "dropped_rows")
    columns: dict[str, Any] = {"run": pa.array([run.ref for run in runs], pa.string())}
    columns |= {name: pa.array([getattr(run, name) for run in runs]) for name in fields}
    for name in ("created_unix_ns", "last_seen_unix_ns"):
        times = pa.array([getattr(run, name) for run in runs], pa.timestamp("ns", tz="UTC"))
        columns[name.removesuffix("_unix_ns")] = times
    columns["tags"] = pa.array([", ".join(run.tags) for run in runs], pa.string())
    return pa.table(columns)


def _heatmap(heatmap: HeatMap, run: RunSummary, slots: list[Slot]) -> pa.Table:
    """A row for each layer and column of steps that has data."""
    row_of = {number: row for row, number in enumerate(heatmap.slots.tolist())}
    columns: dict[str, list[Any]] = {name: [] for name in ("run", "layer", "role", "step", "last_step", "low", "high")}
    starts = heatmap.steps.tolist()
    for slot in slots:
        if (row := row_of.get(slot.slot)) is None:
            continue
        for start, low, high in zip(starts, heatmap.low[row].tolist(), heatmap.high[row].tolist(), strict=True):
            if low == low:  # NaN: no rows in this column
                values = (run.ref, slot.layer, slot.role.value, start, start + heatmap.width - 1, low, high)
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
    if not columns["step"]:
        raise NothingToDownload(f"run {run.ref!r} has no rows of these layers in this range")
    renamed = {"low": f"{heatmap.quantity}_min", "high": f"{heatmap.quantity}_max"}
    return pa.table({renamed.get(name, name): values for name, values in columns.items()})


def _series(series: Series, run: RunSummary, slot: Slot) -> pa.Table:
    """A row for each point: the steps that it stands for, and the extremes of every field among them."""
    points = len(series.step)
    if not points:
        raise NothingToDownload(f"{slot.role} of {slot.layer!r} has no rows in this range of run {run.ref!r}")
    columns: dict[str, Any] = {name: [value] * points for name, value in _key(run, slot)}
    columns |= {"step": series.step, "last_step": series.last, "recorded_steps": series.count}
    for name in series.low:
        columns |= {f"{name}_min": series.low[name], f"{name}_max": series.high[name]}
    return pa.table(columns)


def _key(run: RunSummary, slot: Slot) -> list[tuple[str, str]]:
    return [("run", run.ref), ("layer", slot.layer), ("role", slot.role.value)]


async def _answer(request: Request) -> Response:
    file_format: Format = "csv" if request.url.path.endswith(".csv") else "parquet"
    try:
        name, content = await run_in_threadpool(_file, links.parse(dict(request.query_params)), file_format)
    except NothingToDownload as error:
        return PlainTextResponse(f"{error}\n", status_code=404)
    except StorageError as error:
        return PlainTextResponse(f"{error}\n", status_code=503)
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)[:120]
    disposition = f"attachment; filename=\"{plain}.{file_format}\"; filename*=UTF-8''{quote(name, safe='')[:600]}"
    headers = {
        "Content-Disposition": f"{disposition}.{file_format}",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(content, media_type=_MEDIA_TYPES[file_format], headers=headers)


def _file(where: links.Where, file_format: Format) -> tuple[str, bytes]:
    name, found = table(queries.reader(), where)
    return name, table_bytes(found, file_format)
