"""Gives an opening source its rows: run, source, slots and recipes, all within the caller's transaction.

Slots are numbered once a run, by (layer, role), so that the same layer has the same number on all ranks and in all
incarnations; a rank that holds other layers (pipeline parallelism) appends its own. The run's row is locked first:
ranks that open at the same time, on several collectors too, take turns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from fp8core.formats import FORMATS
from fp8core.records import Role
from fp8scope_collector.messages import Opening, SlotSpec, Source, run_label
from fp8scope_collector.storage import audit, schema

Insert = Callable[[sa.Table], Any]  # the dialect's insert(), which has on_conflict_do_...


class ContradictionError(Exception):
    """What a source says about itself contradicts what is stored; the text names both."""


class TooManyRunsError(Exception):
    """A token has made as many runs as it may."""


def register(connection: sa.Connection, insert: Insert, opening: Opening, *, now_unix_ns: int) -> Source:
    """The source that `opening` describes: the one with its uuid, or a new one.

    A new source keeps the incarnation it asks for unless another process life of its rank has it; then it gets the
    one after the highest. The run takes over configuration, tags and notes of its newest source.

    Raises:
        ContradictionError: the uuid is another rank's or run's, its catalogue has changed, a layer has another shape
            in this run, or a slot has another format or recipe in this incarnation.
        TooManyRunsError: the run is new, and its token may make no more.
    """
    run_id = _lock_run(connection, insert, opening, now_unix_ns)
    known = _find_source(connection, opening, run_id, now_unix_ns) or _add_source(
        connection, opening, run_id, now_unix_ns
    )
    run_slot = _intern_slots(connection, opening, run_id)
    _record_recipes(connection, opening, run_id, known.incarnation, run_slot)
    roles = tuple(Role)
    return Source(
        id=known.id,
        run_id=run_id,
        run=opening.run_label,
        rank=opening.rank,
        incarnation=known.incarnation,
        up_to_seq=known.up_to_seq,
        finished=known.outcome is not None,
        run_slot=np.array(run_slot, np.int64),
        role=np.array([roles.index(spec.role) for spec in opening.slots], np.int8),
        log2_max=np.log2([FORMATS[spec.format].max for spec in opening.slots]),
    )


@dataclass(frozen=True)
class _Known:
    id: int
    incarnation: int
    up_to_seq: int
    outcome: str | None


def _lock_run(connection: sa.Connection, insert: Insert, opening: Opening, now_unix_ns: int) -> int:
    run, sender = schema.run, opening.sender
    made = connection.execute(
        insert(run)
        .values(project=opening.project, name=opening.run, created_unix_ns=now_unix_ns, token_id=sender.token_id)
        .on_conflict_do_nothing(index_elements=["project", "name"])
    ).rowcount
    if made and sender.max_runs is not None:
        own = sa.select(sa.func.count()).select_from(run).where(run.c.token_id == sender.token_id)
        if (count := connection.execute(own).scalar_one()) > sender.max_runs:
            raise TooManyRunsError(
                f"run {opening.run_label!r} is new, and {sender.actor} has made {count - 1} runs; it may make "
                f"{sender.max_runs}: delete one, or make a token that may make more"
            )
    found = sa.select(run.c.id).where(run.c.project == opening.project, run.c.name == opening.run)
    run_id: int = connection.execute(found.with_for_update()).scalar_one()
    return run_id


def _find_source(connection: sa.Connection, opening: Opening, run_id: int, now_unix_ns: int) -> _Known | None:
    """The source with this uuid, seen again just now."""
    source, run = schema.source, schema.run
    row = connection.execute(
        sa.select(source, run.c.project, run.c.name)
        .join(run, run.c.id == source.c.run_id)
        .where(source.c.source_uuid == opening.source_uuid)
    ).one_or_none()
    if row is None:
        return None
    if (row.run_id, row.rank) != (run_id, opening.rank):
        raise ContradictionError(
            f"source_uuid {opening.source_uuid!r} is rank {row.rank} of run {run_label(row.project, row.name)!r}; this "
            f"stream says rank {opening.rank} of run {opening.run_label!r}: draw a new uuid for each process"
        )
    if row.catalogue_slots is not None:
        known = opening.slots[: row.catalogue_slots]
        if len(known) < row.catalogue_slots or _catalogue_sha256(known) != row.catalogue_sha256:
            raise ContradictionError(
                f"source_uuid {opening.source_uuid!r} opened with {row.catalogue_slots} slots, and says now "
                f"{len(opening.slots)} of which the first {row.catalogue_slots} are not the same; expected the same "
                "catalogue at each connection, or one that has grown at its end: draw a new uuid for a changed model"
            )
    connection.execute(
        sa.update(source)
        .where(source.c.id == row.id)
        .values(
            last_seen_unix_ns=now_unix_ns,
            catalogue_slots=len(opening.slots),
            catalogue_sha256=_catalogue_sha256(opening.slots),
        )
    )
    return _Known(row.id, row.incarnation, row.up_to_seq, row.outcome)


def _add_source(connection: sa.Connection, opening: Opening, run_id: int, now_unix_ns: int) -> _Known:
    source = schema.source
    lives = set(
        connection.scalars(
            sa.select(source.c.incarnation).where(source.c.run_id == run_id, source.c.rank == opening.rank)
        )
    )
    incarnation = max(lives) + 1 if opening.incarnation in lives else opening.incarnation
    source_id = connection.execute(
        sa.insert(source)
        .values(
            run_id=run_id,
            rank=opening.rank,
            incarnation=incarnation,
            source_uuid=opening.source_uuid,
            world_size=opening.world_size,
            started_unix_ns=opening.started_unix_ns,
            first_seen_unix_ns=now_unix_ns,
            last_seen_unix_ns=now_unix_ns,
            clock_skew_ns=opening.sent_unix_ns - now_unix_ns,
            agent_version=opening.agent_version,
            environment_json=opening.environment_json,
            catalogue_slots=len(opening.slots),
            catalogue_sha256=_catalogue_sha256(opening.slots),
        )
        .returning(source.c.id)
    ).scalar_one()
    audit.record(
        connection,
        at_unix_ns=now_unix_ns,
        actor=opening.sender.actor,
        action="open",
        subject=opening.run_label,
        rank=opening.rank,
        incarnation=incarnation,
        source_id=source_id,
    )
    said = {
        "config_json": opening.config_json,
        "tags_json": "" if opening.tags_json == "[]" else opening.tags_json,
        "notes": opening.notes,
    }
    if news := {column: text for column, text in said.items() if text}:
        connection.execute(sa.update(schema.run).where(schema.run.c.id == run_id).values(news))
    return _Known(source_id, incarnation, up_to_seq=0, outcome=None)


def _catalogue_sha256(slots: Sequence[SlotSpec]) -> str:
    return hashlib.sha256(repr([(spec.layer, str(spec.role), spec.format) for spec in slots]).encode()).hexdigest()


def _intern_slots(connection: sa.Connection, opening: Opening, run_id: int) -> list[int]:
    """The run's numbers of the catalogue's slots; new ones are appended."""
    slot = schema.slot
    rows = connection.execute(
        sa.select(slot.c.layer, slot.c.role, slot.c.slot, slot.c.in_features, slot.c.out_features).where(
            slot.c.run_id == run_id
        )
    ).all()
    known = {(row.layer, row.role): row for row in rows}
    numbers: list[int] = []
    new: list[dict[str, Any]] = []
    for spec in opening.slots:
        if row := known.get((spec.layer, spec.role.value)):
            if (row.in_features, row.out_features) != (spec.in_features, spec.out_features):
                raise ContradictionError(
                    f"layer {spec.layer!r} has in_features={row.in_features}, out_features={row.out_features} in run "
                    f"{opening.run_label!r}; rank {opening.rank} says in_features={spec.in_features}, "
                    f"out_features={spec.out_features}: give another model another run name"
                )
            numbers.append(row.slot)
        else:
            numbers.append(len(known) + len(new))
            new.append(
                {
                    "run_id": run_id,
                    "slot": numbers[-1],
                    "layer": spec.layer,
                    "role": spec.role.value,
                    "module_class": spec.module_class,
                    "in_features": spec.in_features,
                    "out_features": spec.out_features,
                }
            )
    if new:
        connection.execute(sa.insert(slot), new)
    return numbers


def _record_recipes(
    connection: sa.Connection, opening: Opening, run_id: int, incarnation: int, numbers: list[int]
) -> None:
    recipe = schema.slot_recipe
    rows = connection.execute(
        sa.select(recipe.c.slot, recipe.c.format, recipe.c.recipe, recipe.c.margin).where(
            recipe.c.run_id == run_id, recipe.c.incarnation == incarnation
        )
    ).all()
    known = {row.slot: row for row in rows}
    new: list[dict[str, Any]] = []
    for number, spec in zip(numbers, opening.slots, strict=True):
        if (row := known.get(number)) is None:
            new.append(
                {
                    "run_id": run_id,
                    "incarnation": incarnation,
                    "slot": number,
                    "format": spec.format,
                    "recipe": spec.recipe,
                    "margin": spec.margin,
                }
            )
        elif (row.format, row.recipe, row.margin) != (spec.format, spec.recipe, spec.margin):
            raise ContradictionError(
                f"layer {spec.layer!r} {spec.role} is {row.format}, {row.recipe}, margin {row.margin} in incarnation "
                f"{incarnation} of run {opening.run_label!r}; rank {opening.rank} says {spec.format}, {spec.recipe}, "
                f"margin {spec.margin}: all ranks of an incarnation must quantise a layer alike"
            )
    if new:
        connection.execute(sa.insert(recipe), new)
