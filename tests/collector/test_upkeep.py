"""Prune, delete, migrate, backup and audit: what is taken out, what stays, and who is said to have done it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fp8scope_collector.decode import decode_open, decode_stats
from fp8scope_collector.limits import Limits
from fp8scope_collector.storage import audit, retention, schema
from fp8scope_collector.storage.engine import migrate, newest_version, open_engine
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.sql_stats import SqlStats
from fp8scope_collector.storage.writer import StatsWriter
from fp8scope_protos.v1 import telemetry_pb2 as pb

Run = Callable[..., Any]
SECOND = 10**9
DAY = 86400 * SECOND
NOW = 1_800_000_000 * SECOND


class Trainer:
    """One rank of a run that commits steps at times that the test chooses."""

    def __init__(
        self, engine: sa.Engine, wire: Any, run: str, rank: int = 0, incarnation: int = 1, at: int = NOW
    ) -> None:
        self._writer = StatsWriter(engine)
        self._wire = wire
        opening = decode_open(wire.open(run, rank=rank, incarnation=incarnation), Limits())
        self.source = self._writer.register(opening, now_unix_ns=at)
        self._seq = 0

    def commit(self, first_step: int, steps: int, at: int) -> None:
        self._seq += 1
        scalars = [pb.Scalar(step=first_step, name="loss", value=1.0)]
        message = self._wire.stats(self._seq, self._wire.columns(first_step, steps=steps), scalars=scalars)
        self._writer.commit([decode_stats(message, self.source, Limits())], now_unix_ns=at)


def steps_of(engine: sa.Engine, source_id: int) -> list[int]:
    stats = schema.stats
    with engine.connect() as connection:
        found = sa.select(stats.c.step).where(stats.c.source_id == source_id).distinct().order_by(stats.c.step)
        return list(connection.scalars(found))


def roll(engine: sa.Engine, below_step: int = 2**40) -> None:
    """Says that the rollups hold all steps below."""
    with engine.begin() as connection:
        connection.execute(sa.update(schema.coverage).values(rolled_step=below_step))


def prune(engine: sa.Engine, **how: Any) -> list[retention.Pruned]:
    defaults = {"older_than_ns": 30 * DAY, "now_unix_ns": NOW, "actor": "me"}
    return retention.prune(engine, SqlStats(engine.dialect.name), **(defaults | how))


def test_prune_takes_whole_lives_that_are_old_and_nothing_of_others(engine: sa.Engine, wire: Any) -> None:
    old, new = (Trainer(engine, wire, name, at=NOW - 40 * DAY) for name in ("old", "new"))
    old.commit(0, 5, NOW - 31 * DAY)
    new.commit(0, 5, NOW - 29 * DAY)

    roll(engine)

    pruned = prune(engine)

    assert pruned == [retention.Pruned("old", 30)]
    assert steps_of(engine, old.source.id) == []
    assert steps_of(engine, new.source.id) == [0, 1, 2, 3, 4]
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(schema.scalar)).scalar_one() == 2
        assert connection.execute(sa.select(sa.func.count()).select_from(schema.run)).scalar_one() == 2
    (entry,) = audit.entries(engine, subject="old")[1:]
    assert (entry.actor, entry.action, entry.detail["rows"]) == ("me", "prune", 30)


def test_prune_of_a_run_that_goes_on_keeps_what_its_slowest_rank_had_not_committed_by_then(
    engine: sa.Engine, wire: Any
) -> None:
    ranks = [Trainer(engine, wire, "long", rank=rank, at=NOW - 40 * DAY) for rank in range(2)]
    for rank, steps in zip(ranks, (20, 11), strict=True):
        rank.commit(0, steps, NOW - 31 * DAY)
    retention.note_milestones(engine, now_unix_ns=NOW - 31 * DAY)
    for rank in ranks:
        rank.commit(20, 10, NOW)
    retention.note_milestones(engine, now_unix_ns=NOW)
    roll(engine)

    pruned = prune(engine)

    assert pruned == [retention.Pruned("long", 11 * 6)] * 2
    assert steps_of(engine, ranks[0].source.id) == list(range(11, 30))
    assert steps_of(engine, ranks[1].source.id) == list(range(20, 30))
    assert prune(engine) == []


def test_prune_keeps_what_the_rollups_do_not_hold_yet(engine: sa.Engine, wire: Any) -> None:
    trainer = Trainer(engine, wire, "old", at=1)
    trainer.commit(0, 10, 1)

    nothing = prune(engine)
    roll(engine, below_step=7)
    pruned = prune(engine)

    assert nothing == []
    assert pruned == [retention.Pruned("old", 42)]
    assert steps_of(engine, trainer.source.id) == [7, 8, 9]


def test_milestones_come_every_ten_minutes_and_only_where_a_run_got_further(engine: sa.Engine, wire: Any) -> None:
    trainer = Trainer(engine, wire, "run", at=NOW)
    for minute, step in [(0, 0), (5, 1), (10, 2), (20, None), (30, 3)]:
        if step is not None:
            trainer.commit(step, 1, NOW + minute * 60 * SECOND)
        for _ in range(2):  # a second collector on the same database
            retention.note_milestones(engine, now_unix_ns=NOW + minute * 60 * SECOND)

    with engine.connect() as connection:
        found = connection.execute(sa.select(schema.milestone.c.reached_unix_ns, schema.milestone.c.step)).all()
    assert [((at - NOW) // SECOND // 60, step) for at, step in found] == [(0, 0), (10, 2), (30, 3)]


def test_a_prune_in_small_transactions_takes_the_same(
    engine: sa.Engine, wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "CHUNK_ROWS", 4)  # fewer than a step has
    trainer = Trainer(engine, wire, "old", at=1)
    trainer.commit(0, 5, 1)
    roll(engine)
    done: list[int] = []

    pruned = prune(engine, report=lambda rows, _: done.append(rows))

    assert pruned == [retention.Pruned("old", 30)]
    assert done[-1] == 30
    assert len(done) >= 5
    assert steps_of(engine, trainer.source.id) == []


def test_delete_takes_a_run_with_everything_and_leaves_the_others(engine: sa.Engine, wire: Any) -> None:
    gone, kept = Trainer(engine, wire, "gone"), Trainer(engine, wire, "kept")
    for trainer in (gone, kept):
        trainer.commit(0, 5, NOW)
        retention.note_milestones(engine, now_unix_ns=NOW)

    rows = retention.delete_run(engine, SqlStats(engine.dialect.name), gone.source.run_id, now_unix_ns=NOW, actor="me")

    assert rows == 30
    with engine.connect() as connection:
        for table in schema.metadata.sorted_tables:
            for column, value in [("run_id", gone.source.run_id), ("source_id", gone.source.id)]:
                if column in table.c:
                    own = sa.select(sa.func.count()).where(table.c[column] == value)
                    assert connection.execute(own).scalar_one() == 0, table.name
        assert connection.scalars(sa.select(schema.run.c.name)).all() == ["kept"]
    assert steps_of(engine, kept.source.id) == [0, 1, 2, 3, 4]
    assert [entry.action for entry in audit.entries(engine, subject="gone")] == ["open", "delete"]


@pytest.mark.parametrize("incremental", [True, False])
def test_a_sqlite_file_shrinks_when_a_run_is_deleted(tmp_path: Path, wire: Any, run: Run, incremental: bool) -> None:
    path = tmp_path / "test.db"
    if not incremental:
        with closing(sqlite3.connect(path)) as made_before:
            made_before.execute("CREATE TABLE something (else_ INTEGER)")
    engine = open_engine(f"sqlite:///{path}")
    migrate(engine)
    for name in ("gone", "kept"):
        trainer = Trainer(engine, wire, name, at=1)
        for block in range(5):
            trainer.commit(block * 1000, 1000, 1)
    engine.dispose()
    before = path.stat().st_size

    said = run("delete", "gone", "--db", f"sqlite:///{path}", "--json")

    assert path.stat().st_size < 0.6 * before
    answer = json.loads(said.stdout)
    assert (answer["run"], answer["rows"]) == ("gone", 30_000)
    assert answer["bytes_after"] < 0.6 * answer["bytes_before"]
    assert ("written anew" in said.stderr) != incremental
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM stats").fetchone() == (30_000,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)


def test_delete_refuses_a_run_that_is_running_unless_forced_and_its_agent_begins_it_anew(
    start_collector: Callable[..., Any], connect: Callable[..., Any], wire: Any, database_url: str, run: Run
) -> None:
    collector = start_collector(database_url)
    opening = wire.open("live")
    stream = connect(collector.grpc, opening)
    stream.send(stats=wire.stats(1, wire.columns(1)))
    stream.wait_ack(1)

    refused = run("delete", "live", "--db", database_url, fails=True)
    forced = run("delete", "live", "--db", database_url, "--force")
    stream.send(stats=wire.stats(2, wire.columns(2)))
    code, sentence = stream.refusal()
    again = connect(collector.grpc, opening)
    again.send(stats=wire.stats(2, wire.columns(2)))
    again.wait_ack(2)

    assert "is running" in refused.stderr
    assert forced.stdout.startswith("run live deleted, 6 rows")
    assert (code.name, sentence) == ("UNAVAILABLE", "the source was deleted from the database; connect again")
    assert again.opened.up_to_seq == 0


def test_a_collector_prunes_by_itself_while_it_is_written_to(
    start_collector: Callable[..., Any],
    connect: Callable[..., Any],
    wire: Any,
    engine: sa.Engine,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = Trainer(engine, wire, "old", at=1)
    old.commit(0, 5, 1)
    roll(engine)
    code = (
        "import sys; from fp8scope_collector import keeper; keeper.KEEP_S = 0.2;"
        "from fp8scope_collector.cli import main; main()"
    )
    collector = start_collector(database_url, "--retention", "30d", program=["-c", code])
    stream = connect(collector.grpc, wire.open("new"))
    for seq in range(1, 6):
        stream.send(stats=wire.stats(seq, wire.columns(seq)))
    stream.wait_ack(5)

    deadline = time.monotonic() + 20
    while steps_of(engine, old.source.id):
        assert time.monotonic() < deadline, "it was not pruned"
        time.sleep(0.05)

    assert collector.terminate() == 0
    assert [event["rows"] for event in collector.events() if event["event"] == "pruned"] == [30]
    assert [entry.actor for entry in audit.entries(engine) if entry.action == "prune"] == ["collector"]
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(schema.stats)).scalar_one() == 30


def test_prune_says_what_it_did(tmp_path: Path, wire: Any, run: Run) -> None:
    url = f"sqlite:///{tmp_path}/test.db"
    engine = open_engine(url)
    migrate(engine)
    Trainer(engine, wire, "old", at=1).commit(0, 5, 1)
    roll(engine)
    engine.dispose()

    did = json.loads(run("prune", "--older-than", "30d", "--run", "old", "--db", url, "--json").stdout)
    again = run("prune", "--older-than", "30d", "--db", url)
    wrong = run("prune", "--older-than", "month", "--db", url, fails=True)

    assert again.stdout == "0 rows older than 30d deleted\n"
    assert (did["rows"], did["runs"]) == (30, {"old": 30})
    assert "--older-than is 'month'; expected 90m, 12h or 30d" in wrong.stderr


def test_migrate_makes_the_tables_once(tmp_path: Path, run: Run) -> None:
    url = f"sqlite:///{tmp_path}/test.db"

    first = json.loads(run("migrate", "--db", url, "--json").stdout)
    second = run("migrate", "--db", url).stdout

    assert first == {"database": url, "from": None, "to": newest_version()}
    assert second == f"{url} is up to date: {newest_version()}\n"


def test_a_backup_under_load_is_one_moment_of_the_database(tmp_path: Path, wire: Any, run: Run) -> None:
    """Each commit has one row a slot and moves the watermark: in a copy that mixes two moments they differ."""
    url, out = f"sqlite:///{tmp_path}/test.db", tmp_path / "copy.db"
    engine = open_engine(url)
    migrate(engine)
    trainer = Trainer(engine, wire, "run")
    for block in range(20):
        trainer.commit(block * 1000, 1000, NOW)
    stop = threading.Event()

    def write() -> None:
        step = 20_000
        while not stop.is_set():
            trainer.commit(step, 1, NOW)
            step += 1

    writing = threading.Thread(target=write)
    writing.start()
    try:
        said = json.loads(run("backup", str(out), "--db", url, "--json").stdout)
    finally:
        stop.set()
        writing.join()
    engine.dispose()

    assert said["bytes"] == out.stat().st_size
    assert out.stat().st_mode & 0o077 == 0, "it holds hashes of tokens"
    with closing(sqlite3.connect(out)) as copy:
        rows, last_step, stored = copy.execute(
            "SELECT rows, last_step, (SELECT count(*) FROM stats) FROM source"
        ).fetchone()
    assert rows == stored == 6 * (last_step + 1) >= 120_000
    assert sorted(path.name for path in tmp_path.iterdir() if "copy" in path.name) == ["copy.db"]


def test_postgresql_is_backed_up_by_its_own_program(
    postgres_url: str, tmp_path: Path, wire: Any, run: Run, require_binary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(postgres_url)
    migrate(engine)
    Trainer(engine, wire, "kept").commit(0, 5, NOW)
    engine.dispose()
    out = tmp_path / "copy.dump"
    monkeypatch.setenv("PATH", str(require_binary("pg_dump").parent), prepend=os.pathsep)

    run("backup", str(out), "--db", postgres_url)

    listing = subprocess.run([require_binary("pg_restore"), "--list", out], capture_output=True, text=True, check=True)
    assert "TABLE DATA public stats" in listing.stdout
    monkeypatch.setenv("PATH", "")
    assert "pg_dump is not on the PATH" in run("backup", str(out), "--db", postgres_url, fails=True).stderr
    assert out.stat().st_size > 0, "the old one stays"


def test_the_audit_log_says_who_made_which_token_and_sent_which_run(
    start_collector: Callable[..., Any], connect: Callable[..., Any], wire: Any, tmp_path: Path, run: Run
) -> None:
    url = f"sqlite:///{tmp_path}/test.db"
    secret = run("token", "create", "--name", "node", "--db", url).stdout.strip()
    collector = start_collector(url, "--auth", "tokens")
    stream = connect(collector.grpc, wire.open("gpt", project="team"), token=secret)
    stream.send(finish=wire.finish(1))
    stream.wait_ack(1)
    run("token", "revoke", "node", "--db", url)
    run("delete", "gpt", "--db", url)

    found = json.loads(run("audit", "--db", url, "--json").stdout)
    of_run = run("audit", "team/gpt", "--db", url).stdout

    me = audit.this_user()
    assert [(entry["actor"], entry["action"], entry["subject"]) for entry in found] == [
        (me, "token create", "node"),
        ("token node", "open", "team/gpt"),
        (me, "token revoke", "node"),
        (me, "delete", "team/gpt"),
    ]
    assert found[1]["detail"] == {"rank": 0, "incarnation": 1, "source_id": 1}
    assert len(of_run.splitlines()) == 2
    assert secret.removeprefix("fp8s_") not in json.dumps(found)


def test_the_role_of_the_operations_page_reads_and_cannot_write(
    postgres_server: Any, postgres_url: str, wire: Any
) -> None:
    engine = open_engine(postgres_url)
    migrate(engine)
    Trainer(engine, wire, "run").commit(0, 5, NOW)
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    statements = page[page.index("CREATE ROLE viewer") :].partition("```")[0]
    database = engine.url.database
    statements = statements.replace("DATABASE fp8scope ", f"DATABASE {database} ").replace(
        "ROLE fp8scope ", "ROLE postgres "
    )
    statements = statements.replace("'...'", "'secret'")
    with postgres_server.connect(database) as admin:
        for statement in filter(str.strip, statements.split(";")):
            admin.execute(statement)
    try:
        reader_url = f"postgresql://viewer:secret@127.0.0.1:{postgres_server.port}/{database}"
        reader = Reader(reader_url)
        assert [found.ref for found in reader.runs()] == ["run"]
        reader.close()
        as_writer = open_engine(reader_url)
        with as_writer.connect() as connection:
            for attempt in ("DELETE FROM stats", "SELECT * FROM token"):
                with pytest.raises(sa.exc.DBAPIError, match=r"permission denied|read-only transaction"):
                    connection.execute(sa.text(attempt))
                connection.rollback()
        as_writer.dispose()
    finally:
        with postgres_server.connect(database) as admin:
            admin.execute("DROP OWNED BY viewer")
            admin.execute("DROP ROLE viewer")
        engine.dispose()
