"""Findings as they are read, and acknowledged: the table, the command line, the reader."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from fp8core.records import Role
from fp8scope_collector.decode import decode_open
from fp8scope_collector.limits import Limits
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.acknowledge import AcknowledgeError, Acknowledger
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.stats_store import StorageError
from fp8scope_collector.storage.writer import StatsWriter

Run = Callable[..., Any]


@pytest.fixture
def engine(database_url: str, wire: Any) -> Iterator[sa.Engine]:
    """A database with the runs gpt and other, each with findings."""
    engine = open_engine(database_url)
    migrate(engine)
    writer = StatsWriter(engine)
    for number, name in enumerate(["gpt", "other"]):
        source = writer.register(decode_open(wire.open(name), Limits()), now_unix_ns=1)
        with engine.begin() as connection:
            for row in [
                {"rule": "overflow", "slot": 3, "severity": "critical", "first_step": 7, "opened_unix_ns": 10},
                {"rule": "underflow", "slot": 5, "severity": "warning", "first_step": 8, "opened_unix_ns": 11},
                {"rule": "underflow", "slot": 5, "severity": "warning", "first_step": 90, "opened_unix_ns": 12},
                {"rule": "loss-spike", "slot": -1, "severity": "info", "first_step": 9, "opened_unix_ns": 13},
            ]:
                values = {
                    "run_id": source.run_id,
                    "ranks_json": "[0, 2]",
                    "last_step": row["first_step"],
                    "first_row": row["first_step"],
                    "last_row": row["first_step"],
                    "rows": 1,
                    "worst": 0.5,
                    "worst_step": row["first_step"],
                    "numbers_json": json.dumps({"ratio": 0.5}),
                    "note": "",
                    "says": "it clips",
                    "evidence": "50 %",
                    "cause": "a scale",
                    "remedy": "another",
                    "change": "AmaxScaling()",
                    "updated_unix_ns": 20 + number,
                    **({"closed_unix_ns": 30, "ending": "cleared"} if row["first_step"] == 8 else {}),
                    **row,
                }
                connection.execute(sa.insert(schema.finding).values(values))
    yield engine
    engine.dispose()


def test_findings_come_worst_first_then_the_newest(engine: sa.Engine, database_url: str) -> None:
    reader = Reader(database_url)
    run_id = reader.run("gpt").id

    own = reader.findings(run_id)
    warnings = reader.findings(run_id, severity="warning", open_only=True)
    everywhere = reader.findings(open_only=True, severity="critical")

    assert [(f.rule, f.first_step, f.is_open) for f in own] == [
        ("overflow", 7, True),
        ("underflow", 90, True),
        ("underflow", 8, False),
        ("loss-spike", 9, True),
    ]
    assert [f.first_step for f in warnings] == [7, 90]
    assert sorted(f.run for f in everywhere) == ["gpt", "other"]
    assert (own[0].layer, own[0].role, own[0].ranks, own[0].tensor) == (
        *("blocks.1.fc", Role.INPUT, (0, 2)),
        "input of blocks.1.fc",
    )
    assert (own[3].slot, own[3].role, own[3].tensor, own[3].numbers) == (None, None, "the run", {"ratio": 0.5})
    reader.close()


def test_an_acknowledgement_says_who_when_and_why_and_changes_nothing_else(
    engine: sa.Engine, database_url: str
) -> None:
    reader = Reader(database_url)
    before = {f.id: f for f in reader.findings()}
    chosen = next(iter(before))
    acknowledger = Acknowledger(database_url, clock=lambda: 77)

    answer = acknowledger.acknowledge(chosen, by="ada", reason="a bad batch,\n skipped")
    after = {f.id: f for f in reader.findings()}
    acknowledger.withdraw(chosen)
    restored = {f.id: f for f in reader.findings()}

    told = (answer.acknowledged_unix_ns, answer.acknowledged_by, answer.acknowledged_reason)
    assert told == (77, "ada", "a bad batch, skipped")
    assert after[chosen] == answer
    assert {k: v for k, v in after.items() if k != chosen} == {k: v for k, v in before.items() if k != chosen}
    assert restored == before
    reader.close()
    acknowledger.close()


def test_what_cannot_be_acknowledged_is_a_sentence(engine: sa.Engine, database_url: str) -> None:
    acknowledger = Acknowledger(database_url)

    with pytest.raises(AcknowledgeError, match="finding 999999 is unknown"):
        acknowledger.acknowledge(999999, by="ada", reason="because")
    with pytest.raises(AcknowledgeError, match="the reason is ''; expected 1 to 4,096 printable"):
        acknowledger.acknowledge(1, by="ada", reason=" ")
    with pytest.raises(AcknowledgeError, match="who is"):
        acknowledger.acknowledge(1, by="a" * 257, reason="because")
    acknowledger.close()


def test_a_database_that_is_not_there_is_not_made(tmp_path: Any) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        Acknowledger(f"sqlite:///{tmp_path}/none.db")

    assert list(tmp_path.iterdir()) == []


def test_the_command_line_lists_and_acknowledges(engine: sa.Engine, database_url: str, run: Run) -> None:
    listed = json.loads(run("findings", "gpt", "--json", "--db", database_url).stdout)
    number = str(listed[0]["id"])

    told = run("ack", number, "--by", "ada", "--reason", "known", "--db", database_url).stderr
    table = run("findings", "gpt", "--db", database_url).stdout.splitlines()
    silent = run("ack", number, "--db", database_url, fails=True).stderr

    assert [finding["rule"] for finding in listed] == ["overflow", "underflow"]
    assert told == f"finding {number} (overflow, input of blocks.1.fc) is acknowledged by ada\n"
    assert [line.split()[:3] for line in table[1:]] == [
        [number, "critical", "overflow"],
        [str(listed[1]["id"]), "warning", "underflow"],
    ]
    assert ["acknowledged" in line for line in table[1:]] == [True, False]
    assert silent == "fp8scope: the reason is ''; expected 1 to 4,096 printable characters\n"
