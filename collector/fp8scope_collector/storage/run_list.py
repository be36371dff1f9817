"""The list of runs with their states, aggregated by the database: few rows for each run, however many ranks it has."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from fp8scope_collector.storage import schema
from fp8scope_collector.storage.readmodels import RunSummary, State

STALE_AFTER_S = 60.0
CRASHED_AFTER_S = 900.0


def run_list(connection: sa.Connection, *, now_unix_ns: int) -> list[RunSummary]:
    """All runs, the one heard from last first."""
    source, coverage = schema.source.c, schema.coverage.c
    lives = (
        sa.select(
            source.run_id,
            source.incarnation,
            sa.func.count().label("sources"),
            sa.func.count(sa.case((source.outcome == "failed", 1))).label("failed"),
            sa.func.count(sa.case((source.outcome == "finished", 1))).label("finished"),
            sa.func.max(source.world_size).label("world_size"),
            sa.func.max(source.last_seen_unix_ns).label("last_seen_unix_ns"),
            sa.func.min(coverage.first_step).label("first_step"),
            sa.func.max(source.last_step).label("last_step"),
            sa.cast(sa.func.sum(source.rows), sa.BigInteger).label("rows"),
            sa.func.max(source.outcome_message).label("outcome_message"),
        )
        .outerjoin_from(schema.source, schema.coverage, coverage.source_id == source.id)
        .group_by(source.run_id, source.incarnation)
        .order_by(source.run_id, source.incarnation)
    )
    own: dict[int, list[Any]] = {}
    for life in connection.execute(lives):
        own.setdefault(life.run_id, []).append(life)
    ranks = sa.select(source.run_id, sa.func.count(source.rank.distinct())).group_by(source.run_id)
    drops = sa.select(source.run_id, sa.cast(sa.func.sum(schema.drop.c.rows), sa.BigInteger))
    drops = drops.join(schema.drop, schema.drop.c.source_id == source.id).group_by(source.run_id)
    rank_count = dict(tuple(row) for row in connection.execute(ranks))
    dropped = dict(tuple(row) for row in connection.execute(drops))
    run = schema.run.c
    known = sa.select(run.id, run.project, run.name, run.created_unix_ns, run.tags_json)
    summaries = [
        _summary(row, own.get(row.id, []), rank_count.get(row.id, 0), dropped.get(row.id, 0), now_unix_ns)
        for row in connection.execute(known)
    ]
    return sorted(summaries, key=lambda summary: (-summary.last_seen_unix_ns, summary.ref))


def _summary(run: Any, lives: list[Any], ranks: int, dropped_rows: int, now_unix_ns: int) -> RunSummary:
    last_seen = max((life.last_seen_unix_ns for life in lives), default=run.created_unix_ns)
    newest = lives[-1] if lives else None
    return RunSummary(
        id=run.id,
        project=run.project,
        name=run.name,
        state=_state(newest, (now_unix_ns - last_seen) / 1e9),
        first_step=min((life.first_step for life in lives if life.first_step is not None), default=None),
        last_step=max((life.last_step for life in lives if life.last_step is not None), default=None),
        rows=sum(life.rows for life in lives),
        ranks=ranks,
        world_size=newest.world_size if newest else 0,
        incarnations=newest.incarnation if newest else 0,
        created_unix_ns=run.created_unix_ns,
        last_seen_unix_ns=last_seen,
        dropped_rows=dropped_rows,
        tags=_tags(run.tags_json),
        outcome_message=(newest.outcome_message or "") if newest else "",
    )


def _state(newest: Any, silent_s: float) -> State:
    """By the newest incarnation. A run that is heard again, or is resumed, is running again."""
    if newest and newest.failed:
        return "failed"
    if newest and newest.finished == newest.sources:
        return "finished"
    return "running" if silent_s < STALE_AFTER_S else "stale" if silent_s < CRASHED_AFTER_S else "crashed"


def _tags(tags_json: str) -> tuple[str, ...]:
    """The tags of a run; a damaged list costs the tags, not the list of runs."""
    try:
        tags = json.loads(tags_json)
    except ValueError:
        return ()
    return tuple(str(tag) for tag in tags) if isinstance(tags, list) else ()
