"""Live diagnosis: what it writes down is what a replay says, however the rows came and whoever was restarted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import structlog

import faults
from fp8core import AmaxScaling, DelayedScaling
from fp8core.records import FIELDS, Role
from fp8scope_collector.diagnosis.book import Change
from fp8scope_collector.diagnosis.engine import diagnose, is_over
from fp8scope_collector.diagnosis.finding import Finding
from fp8scope_collector.diagnosis.live import PATIENCE_S, REDO_ROWS, Lease, Watcher, judged_ranks
from fp8scope_collector.diagnosis.report import evidence
from fp8scope_collector.diagnosis.source import open_run
from fp8scope_collector.diagnosis.thresholds import GAP_ROWS, SILENT_S
from fp8scope_collector.diagnosis.window import Window
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.acknowledge import Acknowledger
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.sql_stats import SqlStats
from fp8scope_collector.storage.stats_store import StorageError
from recordings import Job

LAYER = "blocks.1.mlp.fc1"
SECOND = 10**9


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.ns = 1_700_000_000 * SECOND

    def __call__(self) -> int:
        return self.ns

    def wait(self, seconds: float) -> None:
        self.ns += int(seconds * SECOND)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storable(noisy: Window) -> Window:
    """`noisy` with every row whole: counts on the wire cannot be missing in some rows only."""
    counts = {field.name for field in FIELDS if field.dtype == "uint64"}
    there = ~np.isnan(noisy["numel"])
    fields = {
        name: np.where(there, np.nan_to_num(values) if name in counts else values, np.nan)
        for name, values in noisy.fields.items()
    }
    return replace(noisy, fields=fields)


def told(finding: Finding) -> tuple[Any, ...]:
    """All of a finding that is stored."""
    slot = finding.slot
    return (
        *(finding.rule, slot.layer if slot else "", slot.role if slot else None, str(finding.severity)),
        *(finding.ranks, finding.first_step, finding.last_step, finding.first_row, finding.last_row, finding.rows),
        *(finding.worst_step, evidence(finding)),
    )


def stored(engine: sa.Engine, url: str, name: str = "gpt") -> list[tuple[Any, ...]]:
    """What live diagnosis has written of a run, but for what was rewritten; as `told`."""
    with engine.connect() as connection:
        rows = {row.id: row for row in connection.execute(sa.select(schema.finding))}
    reader = Reader(url)
    found = [f for f in reader.findings(reader.run(name).id, limit=10_000) if f.ending != "rewritten"]
    reader.close()
    return sorted(
        (
            *(f.rule, f.layer, f.role, f.severity, f.ranks, f.first_step, f.last_step),
            *(rows[f.id].first_row, rows[f.id].last_row, f.rows, f.worst_step, f.evidence),
        )
        for f in found
    )


def replayed(url: str, name: str = "gpt") -> list[tuple[Any, ...]]:
    found = diagnose(open_run(url, name).pieces())
    assert found.omitted == 0
    return sorted(map(told, found.findings))


def look(watcher: Watcher, clock: Clock, seconds: float = 2.0) -> list[Change]:
    """One pass, or as many as it takes until all is judged."""
    clock.wait(seconds)
    changes: list[Change] = []
    more = True
    while more:
        news, more = watcher.look()
        changes += [change for each in news for change in each.changes]
    return changes


@pytest.mark.parametrize("restarts", [False, True])
def test_rows_that_come_bit_by_bit_give_the_findings_of_a_replay(
    restarts: bool, storable: Window, engine: sa.Engine, database_url: str, clock: Clock
) -> None:
    """Two ranks that take turns being ahead; with `restarts` every few passes another process goes on."""
    rng = np.random.default_rng(1)
    job = Job(engine, storable, now_unix_ns=clock())
    watcher = Watcher(database_url, unix_ns=clock)
    sent = [0, 0]
    while min(sent) < storable.steps.size:
        for rank in range(2):
            end = min(storable.steps.size, sent[rank] + int(rng.integers(0, 18)))
            if end > sent[rank] and storable.present[rank, sent[rank] : end].any():
                job.send(sent[rank], end, rank=rank, now_unix_ns=clock())
            sent[rank] = end
        look(watcher, clock, 1.0)
        if restarts and rng.random() < 0.3:
            watcher.close()
            watcher = Watcher(database_url, unix_ns=clock)
    job.finish(now_unix_ns=clock())
    look(watcher, clock)
    watcher.close()

    found = stored(engine, database_url)

    assert len({finding[0] for finding in found}) >= 14, "the rows make most rules speak"
    assert found == replayed(database_url)


REAL = {
    "NaN": (AmaxScaling(), faults.nan_in_a_batch(6), 1),
    "weights diverge": (AmaxScaling(), faults.changed_weight_of_a_rank(6, LAYER), 2),
    "spike": (DelayedScaling(), faults.spike_in_one_step(6, LAYER), 1),
}


@pytest.mark.parametrize("name", REAL)
def test_a_fault_in_training_is_written_down_as_a_replay_says_it(
    name: str, engine: sa.Engine, database_url: str, clock: Clock
) -> None:
    recipe, fault, ranks = REAL[name]
    recording = faults.record(recipe, fault, steps=14, ranks=ranks)
    job = Job(engine, recording, now_unix_ns=clock())
    watcher = Watcher(database_url, unix_ns=clock)
    for start in range(0, 14, 2):
        job.send(start, start + 2, now_unix_ns=clock())
        look(watcher, clock)

    found = stored(engine, database_url)

    assert found
    assert found == replayed(database_url)


def quiet(steps: int, ranks: int = 1, **bad: list[int]) -> Window:
    """Rows in which nothing is wrong but what `bad` says: nonfinite elements at these step indices."""
    slots = faults_slots()
    shape = (ranks, steps, len(slots))
    fields = {
        **{name: np.zeros(shape) for name in ("zeros", "overflow", "underflow", "nonfinite")},
        "amax": np.full(shape, 400.0),
        "numel": np.full(shape, 1e4),
        **{name: np.ones(shape) for name in ("scale_min", "scale_max")},
    }
    for steps_of in bad.values():
        fields["nonfinite"][:, steps_of, 0] = 5
    losses = faults.ScalarSeries(np.arange(steps), np.full(steps, 3.0))
    return Window(np.arange(steps), tuple(range(ranks)), slots, fields, {"loss": losses})


def faults_slots() -> tuple[Any, ...]:
    from fp8scope_collector.storage.readmodels import Slot

    return tuple(
        Slot(i, "fc", role, "Fp8Linear", 8, 8, "E4M3FN", repr(AmaxScaling()), 0) for i, role in enumerate(Role)
    )


def states(url: str) -> list[tuple[str, int, str | None]]:
    reader = Reader(url)
    found = sorted((f.rule, f.first_step, f.ending) for f in reader.findings())
    reader.close()
    return found


def test_an_episode_is_opened_once_closed_when_it_is_over_and_the_next_one_is_another(
    engine: sa.Engine, database_url: str, clock: Clock
) -> None:
    window = quiet(120, nonfinite=[10, 12, 60])
    job = Job(engine, window, now_unix_ns=clock())
    watcher = Watcher(database_url, unix_ns=clock)
    kinds = []
    for start in range(0, 100, 2):
        job.send(start, start + 2, now_unix_ns=clock())
        kinds += [(change.kind, change.finding.first_step, start + 1) for change in look(watcher, clock)]
        if start == 10:
            Acknowledger(database_url).acknowledge(1, by="ada", reason="seen")
    reader = Reader(database_url)

    first, second = sorted(reader.findings(), key=lambda f: f.first_step)

    assert kinds == [("opened", 10, 11), ("closed", 10, 29), ("opened", 60, 61), ("closed", 60, 77)]
    assert (first.acknowledged_by, second.acknowledged_by) == ("ada", "")
    assert first.closed_unix_ns is not None
    assert first.opened_unix_ns < first.closed_unix_ns < second.opened_unix_ns


def test_a_run_that_ends_closes_what_was_open_and_a_resumed_one_opens_it_again(
    engine: sa.Engine, database_url: str, clock: Clock
) -> None:
    window = quiet(60, nonfinite=list(range(10, 25)))
    job = Job(engine, window, now_unix_ns=clock())
    job.send(0, 20, now_unix_ns=clock())
    watcher = Watcher(database_url, unix_ns=clock)
    look(watcher, clock)
    job.finish(failed=True, now_unix_ns=clock())
    ended = look(watcher, clock)
    at_end = states(database_url)
    resumed = Job(engine, window, incarnation=2, now_unix_ns=clock())
    resumed.send(20, 30, now_unix_ns=clock())
    again = look(watcher, clock)
    resumed.send(30, 60, now_unix_ns=clock())
    cleared = look(watcher, clock)

    assert [change.kind for change in ended] == ["closed"]
    assert at_end == [("nonfinite", 10, "ended")]
    assert [change.kind for change in again] == ["reopened"]
    assert [change.kind for change in cleared] == ["closed"]
    assert states(database_url) == [("nonfinite", 10, "cleared")]
    assert stored(engine, database_url) == replayed(database_url)


def test_steps_that_a_resumed_run_does_again_take_their_findings_with_them(
    engine: sa.Engine, database_url: str, clock: Clock
) -> None:
    Job(engine, quiet(60, nonfinite=[10, 50]), now_unix_ns=clock()).send(now_unix_ns=clock())
    watcher = Watcher(database_url, unix_ns=clock)
    look(watcher, clock)
    before = states(database_url)
    resumed = Job(engine, quiet(90, nonfinite=[70]), incarnation=2, now_unix_ns=clock())
    for start in range(40, 90, 10):
        resumed.send(start, start + 10, now_unix_ns=clock())
        look(watcher, clock)

    assert before == [("nonfinite", 10, "cleared"), ("nonfinite", 50, None)]
    assert states(database_url) == [
        ("nonfinite", 10, "cleared"),
        ("nonfinite", 50, "rewritten"),
        ("nonfinite", 70, "cleared"),
    ]
    assert stored(engine, database_url) == replayed(database_url)


def test_a_rank_that_is_behind_is_waited_for_and_judged_anew_when_it_comes_late(
    engine: sa.Engine, database_url: str, clock: Clock
) -> None:
    window = quiet(60, ranks=2, nonfinite=[30])
    job = Job(engine, window, now_unix_ns=clock())
    watcher = Watcher(database_url, unix_ns=clock)
    job.send(0, 20, now_unix_ns=clock())
    look(watcher, clock)
    job.send(20, 50, rank=0, now_unix_ns=clock())
    waited = look(watcher, clock, 1)
    for _ in range(3):
        missed = look(watcher, clock, PATIENCE_S / 2)
    job.send(20, 60, rank=1, now_unix_ns=clock())
    job.send(50, 60, rank=0, now_unix_ns=clock())
    look(watcher, clock)

    assert waited == []
    assert {(change.finding.rule, change.finding.ranks) for change in missed} == set()
    assert ("rank-missing", 20, "rewritten") in states(database_url)
    assert stored(engine, database_url) == replayed(database_url)
    assert [row[4] for row in stored(engine, database_url)] == [(0, 1)]


def test_a_killed_rank_is_found_with_its_number(engine: sa.Engine, database_url: str, clock: Clock) -> None:
    job = Job(engine, quiet(40, ranks=2), now_unix_ns=clock())
    watcher = Watcher(database_url, unix_ns=clock)
    job.send(0, 20, now_unix_ns=clock())
    job.finish(rank=1, failed=True, now_unix_ns=clock())
    job.send(20, 30, rank=0, now_unix_ns=clock())

    (change,) = look(watcher, clock)

    assert (change.kind, change.finding.rule, change.finding.ranks) == ("opened", "rank-missing", (1,))
    assert change.finding.first_step == 20


def test_a_deleted_run_is_forgotten_and_its_number_is_another_run_s(
    engine: sa.Engine, database_url: str, clock: Clock
) -> None:
    job = Job(engine, quiet(40, nonfinite=[5]), now_unix_ns=clock())
    watcher = Watcher(database_url, unix_ns=clock)
    job.send(0, 20, now_unix_ns=clock())
    look(watcher, clock)
    with engine.begin() as connection:
        connection.execute(sa.delete(schema.stats))
        connection.execute(sa.delete(schema.run))
    empty = look(watcher, clock)
    clock.wait(1)
    Job(engine, quiet(40, nonfinite=[7]), name="other", now_unix_ns=clock()).send(now_unix_ns=clock())
    look(watcher, clock)

    assert empty == []
    assert [finding[5] for finding in stored(engine, database_url, "other")] == [7]


def test_two_that_judge_at_once_write_each_finding_once(engine: sa.Engine, database_url: str, clock: Clock) -> None:
    job = Job(engine, quiet(60, nonfinite=[10, 50]), now_unix_ns=clock())
    watchers = [Watcher(database_url, unix_ns=clock) for _ in range(2)]
    for start in range(0, 60, 5):
        job.send(start, start + 5, now_unix_ns=clock())
        for watcher in watchers:
            look(watcher, clock, 0.1)

    assert states(database_url) == [("nonfinite", 10, "cleared"), ("nonfinite", 50, None)]


def test_a_run_that_takes_several_looks_goes_on_where_the_last_one_ended(
    engine: sa.Engine, database_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8scope_collector.diagnosis.live.PIECE_CELLS", 1)  # 18 rows, a quarter of the context
    job = Job(engine, quiet(200, nonfinite=[30, 90]), now_unix_ns=clock())
    job.send(now_unix_ns=clock())
    watcher, reader = Watcher(database_url, unix_ns=clock), Reader(database_url)

    judged, steps = [], []
    for _ in range(12):
        watcher.look(budget_s=0.0)
        judged.append(reader.judged_step(reader.run("gpt").id))
        steps.append(watcher.steps())
    assert judged == [min(18 * looks, 200) - 1 for looks in range(1, 13)]
    assert steps == [(199, step) for step in judged]

    job.finish(now_unix_ns=clock())
    look(watcher, clock)
    assert stored(engine, database_url) == replayed(database_url)
    reader.close()
    watcher.close()


def test_between_pieces_no_transaction_is_open(tmp_path: Path) -> None:
    """SQLite's log begins anew only when nobody reads it; judging a piece takes as long as ingest leaves time for."""
    engine = open_engine(f"sqlite:///{tmp_path}/test.db")
    migrate(engine)
    Job(engine, quiet(40)).send()
    pieces = open_run(f"sqlite:///{tmp_path}/test.db", "gpt").pieces(piece_rows=10)

    next(pieces)
    with engine.connect() as connection:
        connection.rollback()
        busy, frames, _ = connection.connection.driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()  # type: ignore[union-attr]
    rest = sum(piece.steps.size for piece in pieces)

    assert (busy, frames, rest) == (0, 0, 30)


def test_statistics_that_are_away_are_waited_for_with_a_sentence(
    engine: sa.Engine, database_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    Job(engine, quiet(40, nonfinite=[30]), now_unix_ns=clock()).send(now_unix_ns=clock())
    watcher = Watcher(database_url, unix_ns=clock)

    def away(*_: object) -> None:
        raise StorageError("ClickHouse is away")

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
        patch.setattr(SqlStats, "steps", away)
        nothing = look(watcher, clock)
    found = look(watcher, clock)
    watcher.close()

    assert nothing == []
    assert [(line["log_level"], line["error"]) for line in logs] == [("warning", "ClickHouse is away")]
    assert "exc_info" not in logs[0]
    assert [(change.kind, change.finding.rule) for change in found] == [("opened", "nonfinite")]


def test_one_of_two_holds_the_lease_until_it_is_let_go_or_runs_out(
    engine: sa.Engine, database_url: str, clock: Clock
) -> None:
    one, other = (Lease(database_url, name, unix_ns=clock) for name in ("one", "other"))

    held = [one.hold(), other.hold()]
    clock.wait(29)
    renewed = [one.hold(), other.hold()]
    clock.wait(31)
    taken = [other.hold(), one.hold()]
    other.release()
    after = one.hold()

    assert (held, renewed, taken, after) == ([True, False], [True, False], [True, False], True)


def test_a_silent_run_is_said_to_be_so_once_and_given_up_after_a_day(
    engine: sa.Engine, database_url: str, clock: Clock
) -> None:
    job = Job(engine, quiet(40), now_unix_ns=clock())
    job.send(0, 20, now_unix_ns=clock())
    watcher = Watcher(database_url, unix_ns=clock)
    look(watcher, clock)
    silent = look(watcher, clock, SILENT_S)
    still = look(watcher, clock, 60)
    given_up = look(watcher, clock, 90_000)

    known = diagnose(open_run(database_url, "gpt", clock=lambda: clock.ns - 90_000 * SECOND).pieces()).findings
    assert [(change.kind, change.finding.rule) for change in silent] == [("opened", "run-silent")]
    assert [told(finding)[:10] for finding in known] == [told(silent[0].finding)[:10]]
    assert still == []
    assert [change.kind for change in given_up] == ["closed"]


def test_an_episode_older_than_what_is_read_again_goes_on_after_a_restart(
    engine: sa.Engine, database_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8scope_collector.diagnosis.live.REDO_ROWS", 20)
    assert REDO_ROWS > 20
    window = quiet(400, nonfinite=list(range(10, 390)))
    job = Job(engine, window, now_unix_ns=clock())
    job.send(0, 300, now_unix_ns=clock())
    look(Watcher(database_url, unix_ns=clock), clock)
    job.send(300, 400, now_unix_ns=clock())

    changes = look(Watcher(database_url, unix_ns=clock), clock)

    assert changes == []
    assert stored(engine, database_url) == replayed(database_url)


def test_a_run_with_very_many_ranks_has_some_of_them_judged() -> None:
    assert judged_ranks(range(512), 1680) == (0, 43, 85, 128, 170, 213, 256, 298, 341, 383, 426, 468, 511)
    assert judged_ranks(range(512), 24) == tuple(range(512))


def test_numbers_of_a_stored_finding_are_json_without_what_json_has_not(
    engine: sa.Engine, database_url: str, clock: Clock, storable: Window
) -> None:
    Job(engine, storable, now_unix_ns=clock()).send(now_unix_ns=clock())
    look(Watcher(database_url, unix_ns=clock), clock)

    with engine.connect() as connection:
        texts = connection.scalars(sa.select(schema.finding.c.numbers_json)).all()

    assert texts
    for text in texts:
        json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_the_gap_that_ends_an_episode_is_that_of_the_engine() -> None:
    finding = next(iter(diagnose([quiet(12, nonfinite=[5])]).findings))

    assert [is_over(finding, rows) for rows in (5 + GAP_ROWS, 5 + GAP_ROWS + 1)] == [False, True]
