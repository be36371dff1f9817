"""Which stored steps are a run's history: where a resumed run rewrote steps, the newest process life's rows count.

A source (one process life of one rank) owns the steps from its first to its last, except those that lie between the
first and the last step of a newer life of the same rank. Ownership is by range and not by row, so that a step that the
newer life dropped stays a gap: a row of a forgotten life between rows of the living one would be a lie. `history` makes
a table expression of the owned ranges that queries join their rows with; see docs/adr/0040.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

from fp8scope_collector.storage import schema

FIRST_STEP, LAST_STEP = 0, 2**62


@dataclass(frozen=True)
class Life:
    """One process life of one rank and the steps that it recorded, both ends included."""

    source_id: int
    rank: int
    incarnation: int
    first_step: int
    last_step: int
    rolled_step: int = 0  # rollups hold its rows of the steps below


@dataclass(frozen=True)
class Span:
    """Steps `first_step` to `last_step`, both included, that belong to the life `source_id`."""

    source_id: int
    incarnation: int
    first_step: int
    last_step: int


def lives_of(connection: sa.Connection, run_id: int) -> list[Life]:
    """The sources of a run that have, or had, rows, by incarnation and rank."""
    source, coverage = schema.source.c, schema.coverage.c
    query = (
        sa.select(
            source.id, source.rank, source.incarnation, coverage.first_step, source.last_step, coverage.rolled_step
        )
        .join_from(schema.source, schema.coverage, coverage.source_id == source.id)
        .where(source.run_id == run_id)
        .order_by(source.incarnation, source.rank)
    )
    return [Life(*row) for row in connection.execute(query)]


def owned_spans(lives: Sequence[Life], first_step: int = FIRST_STEP, last_step: int = LAST_STEP) -> list[Span]:
    """The steps that each life owns within [first_step, last_step]; every step of a rank has at most one owner.

    Sorted by source: so they are stored.
    """
    spans: list[Span] = []
    taken: dict[int, list[tuple[int, int]]] = {}
    for life in sorted(lives, key=lambda life: -life.incarnation):
        newer = taken.setdefault(life.rank, [])
        for start, end in without((life.first_step, life.last_step), newer):
            start, end = max(start, first_step), min(end, last_step)
            if start <= end:
                spans.append(Span(life.source_id, life.incarnation, start, end))
        newer.append((life.first_step, life.last_step))
    return sorted(spans, key=lambda span: (span.source_id, span.first_step))


def history(spans: Sequence[Span], epochs: dict[int, int] | None = None) -> sa.CTE:
    """The spans as a table `span(source_id, epoch, first_step, last_step)`; `epochs` numbers incarnations, or all 0."""
    columns = [sa.column(name, sa.BigInteger) for name in ("source_id", "epoch", "first_step", "last_step")]
    rows = [(s.source_id, epochs[s.incarnation] if epochs else 0, s.first_step, s.last_step) for s in spans]
    return sa.values(*columns, name="span").data(rows or [(-1, 0, 0, -1)]).cte("span")


def steps_of(table: sa.FromClause, span: sa.CTE, *, every: int = 1) -> sa.CTE:
    """The distinct steps of each span as a table `walk(source_id, epoch, step)`, found by seeks and not by a scan.

    `table` has columns source_id and step under one key. Of each stretch of `every` steps, the first of which it
    divides, only the first that is there.
    """

    def next_step(source_id: Any, above: Any) -> Any:
        query = sa.select(sa.func.min(table.c.step)).where(table.c.source_id == source_id, table.c.step > above)
        return query.scalar_subquery()

    start = next_step(span.c.source_id, span.c.first_step - 1)
    walk = sa.select(span.c.source_id, span.c.epoch, span.c.last_step, start.label("step")).cte("walk", recursive=True)
    following = next_step(
        walk.c.source_id, int_div(walk.c.step, every) * every + every - 1 if every > 1 else walk.c.step
    )
    return walk.union_all(
        sa.select(walk.c.source_id, walk.c.epoch, walk.c.last_step, following).where(walk.c.step < walk.c.last_step)
    )


class int_div(sa.ColumnElement[int]):  # noqa: N801 - reads as SQL in queries
    """`numerator / denominator` of non-negative integers, rounded down, on every database.

    SQLAlchemy's `//` is silently a true division on dialects that it does not know.
    """

    inherit_cache = True
    type = sa.BigInteger()
    _traverse_internals = [  # noqa: RUF012 - as the base class declares it
        ("numerator", sa.sql.visitors.InternalTraversal.dp_clauseelement),
        ("denominator", sa.sql.visitors.InternalTraversal.dp_plain_obj),
    ]

    def __init__(self, numerator: sa.ColumnElement[int], denominator: int) -> None:
        assert denominator >= 1
        self.numerator, self.denominator = numerator, denominator


@compiles(int_div)
def _int_div_of_an_unknown_dialect(element: int_div, compiler: SQLCompiler, **_: Any) -> str:
    raise sa.exc.CompileError(f"int_div does not know how {compiler.dialect.name} divides integers")


@compiles(int_div, "sqlite", "postgresql")
def _int_div(element: int_div, compiler: SQLCompiler, **options: Any) -> str:
    return f"({compiler.process(element.numerator, **options)} / {element.denominator:d})"


@compiles(int_div, "clickhousedb")
def _int_div_of_clickhouse(element: int_div, compiler: SQLCompiler, **options: Any) -> str:
    return f"intDiv({compiler.process(element.numerator, **options)}, {element.denominator:d})"


def without(interval: tuple[int, int], holes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of an interval of integers, both ends included, when `holes` are cut out of it."""
    pieces = [interval]
    for low, high in holes:
        cut = [((start, min(end, low - 1)), (max(start, high + 1), end)) for start, end in pieces]
        pieces = [piece for pair in cut for piece in pair if piece[0] <= piece[1]]
    return sorted(pieces)
