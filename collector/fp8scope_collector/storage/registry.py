"""Gives an opening source its rows: run, source, slots and recipes, all within the caller's transaction.

Slots are numbered once a run, by (layer, role), so that the same layer has the same number on all ranks and in all
incarnations; a rank that holds other layers (pipeline parallelism) appends its own. The run's row is locked first:
ranks that open at the same time, on several collectors too, take turns. Numbers never change, so what one rank has
got is good for all that bring the same catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from fp8scope_collector.messages import Opening, Source, run_label
from fp8scope_collector.storage import audit, schema

Insert = Callable[[sa.Table], Any]  # the dialect's insert(), which has on_conflict_do_...
Key = tuple[int, int, int, bytes]  # a run, when it was made (SQLite gives ids of deleted runs again), life, catalogue
Numbers = MutableMapping[Key, npt.NDArray[np.int64]]  # the run's numbers of a catalogue that is in the database


class ContradictionError(Exception):
    """What a source says about itself contradicts what is stored; the text names both."""


class TooManyRunsError(Exception):
    """A token has made as many runs as it may."""


def register(
    connection: sa.Connection, insert: Insert, opening: Opening, numbers: Numbers, *, now_unix_ns: int
) -> tuple[Source, Key]:
    """The source that `opening` describes: the one with its uuid, or a new one; and where to keep its `run_slot`.

    A new source keeps the incarnation it asks for unless another process life of its rank has it; then it gets the
    one after the highest. The run takes over configuration, tags and notes of its newest source.

    `numbers` has what earlier transactions of the caller, committed, returned.

    Raises:
        ContradictionError: the uuid is another rank's or run's, its catalogue has changed, a layer has another shape
            in this run, or a slot has another format or recipe in this incarnation.
        TooManyRunsError: the run is new, and its token may make no more.
    """
    run_id, created_unix_ns = _lock_run(connection, insert, opening, now_unix_ns)
    known = _find_source(connection, opening, run_id, now_unix_ns) or _add_source(
        connection, opening, run_id, now_unix_ns
    )
    catalogue = opening.catalogue
    key = (run_id, created_unix_ns, known.incarnation, catalogue.digest)
    if (run_slot := numbers.get(key)) is None:
        run_slot = _intern_slots(connection, opening, run_id)
        _record_recipes(connection, opening, run_id, known.incarnation, run_slot.tolist())
    source = Source(
        id=known.id,
        run_id=run_id,
        run=opening.run_label,
        rank=opening.rank,
        incarnation=known.incarnation,
        up_to_seq=known.up_to_seq,
        finished=known.outcome is not None,
        run_slot=run_slot,
        role=catalogue.role,
        log2_max=catalogue.log2_max,
    )
    return source, key


@dataclass(frozen=True)
class _Known:
    id: int
    incarnation: int
    up_to_seq: int
    outcome: str | None


def _lock_run(connection: sa.Connection, insert: Insert, opening: Opening, now_unix_ns: int) -> tuple[int, int]:
    """The run's id and when it was made."""
    run, sender = schema.run, opening.sender
    made = connection.execute(
        insert(run)
        .values(project=opening.project, name=opening.run, created_unix_ns=now_unix_ns, token_id=sender.token_id)
        .on_conflict_do_nothing(index_elements=["project", "name"])
    ).rowcount
    if made and sender.max_runs is not None:
        of_token = sa.select(sa.func.count()).select_from(run).where(run.c.token_id == sender.token_id)
        if (count := connection.execute(of_token).scalar_one()) > sender.max_runs:
            raise TooManyRunsError(
                f"run {opening.run_label!r} is new, and {sender.actor} has made {count - 1} runs; it may make "
                f"{sender.max_runs}: delete one, or make a token that may make more"
            )
    own = (run.c.project == opening.project, run.c.name == opening.run)
    row = connection.execute(sa.select(run.c.id, run.c.created_unix_ns).where(*own).with_for_update()).one()
    return row.id, row.created_unix_ns


def _find_source(connection: sa.Connection, opening: Opening, run_id: int, now_unix_ns: int) -> _Known | None:
    """The source with this uuid, seen again just now."""
    source, run = schema.source, schema.run
    catalogue, slots = opening.catalogue, len(opening.catalogue.slots)
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
    before = row.catalogue_slots
    if before is not None and (slots < before or catalogue.sha256(before) != row.catalogue_sha256):
        raise ContradictionError(
            f"source_uuid {opening.source_uuid!r} opened with {before} slots, and says now {slots} of which the first "
            f"{before} are not the same; expected the same catalogue at each connection, or one that has grown at its "
            "end: draw a new uuid for a changed model"
        )
    connection.execute(
        sa.update(source)
        .where(source.c.id == row.id)
        .values(
            last_seen_unix_ns=now_unix_ns,
            catalogue_slots=slots,
            catalogue_sha256=catalogue.sha256(slots),
        )
    )
    return _Known(row.id, row.incarnation, row.up_to_seq, row.outcome)


def _add_source(connection: sa.Connection, opening: Opening, run_id: int, now_unix_ns: int) -> _Known:
    source, slots = schema.source, len(opening.catalogue.slots)
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
            catalogue_slots=slots,
            catalogue_sha256=opening.catalogue.sha256(slots),
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


def _intern_slots(connection: sa.Connection, opening: Opening, run_id: int) -> npt.NDArray[np.int64]:
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
    for spec in opening.catalogue.slots:
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
    return np.array(numbers, np.int64)


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
    for number, spec in zip(numbers, opening.catalogue.slots, strict=True):
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
