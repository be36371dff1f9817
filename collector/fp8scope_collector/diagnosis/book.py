"""A run's findings in the database, kept up to date while its diagnosis goes on.

`Book.write` compares episodes with what is stored and writes the difference in one transaction, together with how far
the run is judged: an episode is inserted once, updated while it goes on, closed when it is over, and opened again where
it goes on after all. It knows its row by the rows it overlaps with, as an episode may still be dated back.
"""

from __future__ import annotations

import json
import math
import string
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from fp8scope_collector.diagnosis.catalogue import BY_NAME
from fp8scope_collector.diagnosis.engine import Episodes, Key, by_badness, is_over, key_of
from fp8scope_collector.diagnosis.finding import Finding, Severity
from fp8scope_collector.diagnosis.priority import Transactions
from fp8scope_collector.diagnosis.report import evidence
from fp8scope_collector.diagnosis.thresholds import MAX_FINDINGS
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.findings import WHOLE_RUN
from fp8scope_collector.storage.readmodels import Ending, Slot

Kind = Literal["opened", "reopened", "worse", "closed"]


@dataclass(frozen=True)
class Change:
    """What became of a finding that is worth telling somebody."""

    kind: Kind
    id: int
    finding: Finding


@dataclass(frozen=True)
class Judged:
    """How far a run is judged: the last step, how many recorded ones there were, and the last step of each source."""

    step: int
    rows: int
    sources: Mapping[int, int]


@dataclass(frozen=True)
class Entry:
    """A finding as its row has it."""

    id: int
    finding: Finding
    ending: Ending | None


class Book:
    """The findings of one run. `slots` are those of its newest life."""

    def __init__(self, writing: Transactions, reading: sa.Engine, run_id: int, slots: Sequence[Slot]) -> None:
        self._writing = writing
        self._run_id = run_id
        self._insert = sqlite.insert if writing.dialect == "sqlite" else postgresql.insert
        self._entries: dict[Key, list[Entry]] = defaultdict(list)
        self._doubtful: set[int] = set()
        self._count = 0
        by_number = {slot.slot: slot for slot in slots}
        finding, judged = schema.finding, schema.judged
        with reading.connect() as connection:
            rows = connection.execute(sa.select(finding).where(finding.c.run_id == run_id)).all()
            known = connection.execute(sa.select(judged).where(judged.c.run_id == run_id)).one_or_none()
        for row in rows:
            self._count += 1
            if row.ending != "rewritten" and row.rule in BY_NAME and (row.slot == WHOLE_RUN or row.slot in by_number):
                entry = Entry(row.id, _finding_of(row, by_number.get(row.slot)), row.ending)
                self._entries[key_of(entry.finding)].append(entry)
        self.judged = (
            Judged(known.step, known.rows, {int(k): int(v) for k, v in json.loads(known.sources_json).items()})
            if known
            else None
        )

    def entries(self) -> Iterator[Entry]:
        """What is stored and was not rewritten."""
        for entries in self._entries.values():
            yield from entries

    def doubt(self, entries: Sequence[Entry]) -> None:
        """These are looked at anew: what is not found again until `settle` was rewritten by a resumed run."""
        self._doubtful = {entry.id for entry in entries}

    def write(
        self, episodes: Episodes, judged: Judged, *, ended: bool, settled: bool, now_unix_ns: int
    ) -> list[Change]:
        """Stores what changed; what is doubted and was not found again is given up when `settled`.

        Raises:
            sqlalchemy.exc.IntegrityError: the run was deleted.
        """
        updates: list[tuple[Entry, Entry]] = []
        inserts: list[tuple[Finding, Ending | None]] = []
        for key in episodes.all_keys():
            for finding in episodes.of(key):
                ending: Ending | None = "ended" if ended else None
                ending = "cleared" if is_over(finding, judged.rows) else ending
                entry = self._entry_of(key, finding)
                if entry is None:
                    inserts.append((finding, ending))
                elif (entry.finding, entry.ending) != (finding, ending) or entry.id in self._doubtful:
                    self._doubtful.discard(entry.id)
                    updates.append((entry, replace(entry, finding=finding, ending=ending)))
        if ended:
            left = [entry for entry in self.entries() if entry.ending is None]
            updated = {entry.id for entry, _ in updates}
            updates += [(entry, replace(entry, ending="ended")) for entry in left if entry.id not in updated]
        lost = [entry for entry in self.entries() if settled and entry.id in self._doubtful]
        inserts = sorted(inserts, key=lambda each: by_badness(each[0]))[: max(0, MAX_FINDINGS - self._count)]
        if judged == self.judged and not (updates or inserts or lost):
            return []
        new_rows = [self._new_row(finding, ending, now_unix_ns) for finding, ending in inserts]
        changed = [self._changed_row(new, now_unix_ns) for old, new in updates if old != new]

        def store(connection: sa.Connection) -> list[int]:
            self._store_judged(connection, judged, now_unix_ns)
            ids = self._add(connection, new_rows)
            self._update(connection, changed)
            self._close(connection, [old.id for old, new in updates if new.ending and not old.ending], now_unix_ns)
            self._close(connection, [entry.id for entry in lost], now_unix_ns, ending="rewritten")
            return ids

        ids = self._writing.run(store)
        self.judged = judged
        added = [Entry(id_, finding, ending) for id_, (finding, ending) in zip(ids, inserts, strict=True)]
        return list(self._remember(updates, added, lost))

    def _remember(
        self, updates: Sequence[tuple[Entry, Entry]], added: Sequence[Entry], lost: Sequence[Entry]
    ) -> Iterator[Change]:
        self._count += len(added)
        for entry in added:
            self._entries[key_of(entry.finding)].append(entry)
            yield Change("opened", entry.id, entry.finding)
            if entry.ending:
                yield Change("closed", entry.id, entry.finding)
        for old, new in updates:
            of_key = self._entries[key_of(old.finding)]
            of_key[of_key.index(old)] = new
            if old.ending and not new.ending:
                yield Change("reopened", new.id, new.finding)
            elif not old.ending and new.ending:
                yield Change("closed", new.id, new.finding)
            elif new.finding.severity > old.finding.severity:
                yield Change("worse", new.id, new.finding)
        for entry in lost:
            self._entries[key_of(entry.finding)].remove(entry)
            self._doubtful.discard(entry.id)
            if not entry.ending:
                yield Change("closed", entry.id, entry.finding)

    def _entry_of(self, key: Key, finding: Finding) -> Entry | None:
        """The row that has this episode: episodes of one key never overlap, but one may grow at both ends."""
        for entry in self._entries.get(key, ()):
            if entry.finding.first_row <= finding.last_row and finding.first_row <= entry.finding.last_row:
                return entry
        return None

    def _store_judged(self, connection: sa.Connection, judged: Judged, now_unix_ns: int) -> None:
        insert = self._insert(schema.judged).values(
            run_id=self._run_id,
            step=judged.step,
            rows=judged.rows,
            sources_json=json.dumps(dict(judged.sources)),
            updated_unix_ns=now_unix_ns,
        )
        names = ("step", "rows", "sources_json", "updated_unix_ns")
        connection.execute(
            insert.on_conflict_do_update(
                index_elements=["run_id"], set_={name: insert.excluded[name] for name in names}
            )
        )

    def _new_row(self, finding: Finding, ending: Ending | None, now_unix_ns: int) -> dict[str, Any]:
        return _row_of(finding) | {
            "run_id": self._run_id,
            "rule": finding.rule,
            "slot": finding.slot.slot if finding.slot else WHOLE_RUN,
            "opened_unix_ns": now_unix_ns,
            "updated_unix_ns": now_unix_ns,
            "closed_unix_ns": now_unix_ns if ending else None,
            "ending": ending,
        }

    def _add(self, connection: sa.Connection, rows: Sequence[dict[str, Any]]) -> list[int]:
        """Inserts findings, or takes over the rows that another collector or a forgotten life left for them; ids."""
        if not rows:
            return []
        table = schema.finding
        rewritten = table.c.ending == "rewritten"
        anew = ("acknowledged_unix_ns", "acknowledged_by", "acknowledged_reason")
        insert = self._insert(table)
        insert = insert.on_conflict_do_update(
            index_elements=["run_id", "rule", "slot", "first_step"],
            set_={name: insert.excluded[name] for name in rows[0] if name != "opened_unix_ns"}
            | {name: sa.case((rewritten, None), else_=table.c[name]) for name in anew},
        )
        connection.execute(insert, rows)
        key = (table.c.rule, table.c.slot, table.c.first_step)
        stored = connection.execute(sa.select(table.c.id, *key).where(table.c.run_id == self._run_id))
        ids = {(row.rule, row.slot, row.first_step): row.id for row in stored}
        return [ids[row["rule"], row["slot"], row["first_step"]] for row in rows]

    def _changed_row(self, entry: Entry, now_unix_ns: int) -> dict[str, Any]:
        values = {f"b_{name}": value for name, value in _row_of(entry.finding).items()}
        return values | {"b_id": entry.id, "b_ending": entry.ending, "b_now": now_unix_ns}

    def _update(self, connection: sa.Connection, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        table = schema.finding
        ending = sa.bindparam("b_ending", type_=sa.Text)
        statement = sa.update(table).where(table.c.id == sa.bindparam("b_id"))
        statement = statement.values(
            **{name[2:]: sa.bindparam(name) for name in rows[0] if name not in ("b_id", "b_ending", "b_now")},
            ending=ending,
            updated_unix_ns=sa.bindparam("b_now", type_=sa.BigInteger),
            closed_unix_ns=sa.case((ending.is_(None), None), else_=table.c.closed_unix_ns),
        )
        connection.execute(statement, rows)

    def _close(
        self, connection: sa.Connection, ids: Sequence[int], now_unix_ns: int, ending: Ending | None = None
    ) -> None:
        """Writes when findings ended (of those that `_update` has just written their ending)."""
        table = schema.finding
        values: dict[str, Any] = {"closed_unix_ns": sa.func.coalesce(table.c.closed_unix_ns, now_unix_ns)}
        if ending:
            values["ending"] = ending
        for start in range(0, len(ids), 500):
            part = list(ids[start : start + 500])
            connection.execute(sa.update(table).where(table.c.id.in_(part)).values(values))


def _row_of(finding: Finding) -> dict[str, Any]:
    """The columns that change while an episode goes on."""
    rule = BY_NAME[finding.rule]
    return {
        "severity": str(finding.severity),
        "ranks_json": json.dumps(list(finding.ranks)),
        "first_step": finding.first_step,
        "last_step": finding.last_step,
        "first_row": finding.first_row,
        "last_row": finding.last_row,
        "rows": finding.rows,
        "worst": None if math.isnan(finding.worst) else finding.worst,
        "worst_step": finding.worst_step,
        "numbers_json": json.dumps({k: v for k, v in finding.numbers.items() if math.isfinite(v)}),
        "note": finding.note,
        "says": rule.says,
        "evidence": evidence(finding),
        "cause": rule.cause,
        "remedy": rule.remedy(finding.slot),
        "change": rule.change(finding.slot),
    }


def _finding_of(row: sa.Row[Any], slot: Slot | None) -> Finding:
    numbers = dict.fromkeys(_names(BY_NAME[row.rule].evidence), math.nan) | json.loads(row.numbers_json)
    return Finding(
        rule=row.rule,
        severity=Severity[row.severity.upper()],
        slot=slot,
        ranks=tuple(json.loads(row.ranks_json)),
        first_step=row.first_step,
        last_step=row.last_step,
        first_row=row.first_row,
        last_row=row.last_row,
        rows=row.rows,
        worst=math.nan if row.worst is None else row.worst,
        worst_step=row.worst_step,
        numbers=numbers,
        note=row.note,
    )


def _names(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]
