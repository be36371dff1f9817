"""Which runs there are and what is said of each, and the sentence where one is unknown."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from fp8scope_collector.storage import schema
from fp8scope_collector.storage.reader import Reader, RunNotFound
from fp8scope_collector.storage.stats_store import StorageError
from random_runs import NOW, SECOND, insert_run, insert_source


@pytest.mark.parametrize(
    ("outcomes", "seen_s_ago", "state"),
    [
        ([None, None], 5, "running"),
        ([None, None], 61, "stale"),
        ([None, None], 901, "crashed"),
        (["finished", None], 901, "crashed"),
        (["finished", None], 5, "running"),
        (["finished", "finished"], 500, "finished"),
        (["finished", "failed"], 500, "failed"),
    ],
)
def test_state_follows_the_newest_incarnation(
    engine: sa.Engine, reader: Reader, outcomes: list[str | None], seen_s_ago: int, state: str
) -> None:
    with engine.begin() as connection:
        run_id = insert_run(connection, "gpt", project="llm", tags_json='["a", "b"]')
        old = insert_source(connection, run_id, 0, 1, outcome="failed", last_seen_unix_ns=NOW - 1000 * SECOND, rows=5)
        connection.execute(schema.drop.insert().values(source_id=old, reason="spool_full", rows=7))
        for rank, outcome in enumerate(outcomes):
            seen = NOW - seen_s_ago * SECOND
            insert_source(connection, run_id, rank, 2, outcome=outcome, last_seen_unix_ns=seen, last_step=9, rows=1)

    run = reader.run("llm/gpt")

    assert run.state == state
    assert (run.ref, run.ranks, run.incarnations, run.rows, run.dropped_rows) == ("llm/gpt", 2, 2, 7, 7)
    assert (run.first_step, run.last_step, run.tags) == (None, 9, ("a", "b"))


def test_a_broken_run_does_not_break_the_list(engine: sa.Engine, reader: Reader) -> None:
    with engine.begin() as connection:
        broken = insert_run(connection, "broken", tags_json="{not json")
        insert_run(connection, "good", created_unix_ns=NOW)

    assert [run.name for run in reader.runs()] == ["good", "broken"]
    assert reader.slots(broken) == []
    assert reader.progress(broken) is None
    assert reader.heatmap(broken, "amax").low.shape == (0, 0)
    assert reader.top(broken) == []
    assert reader.series(broken, 0, ["amax"]).step.size == 0
    assert reader.scalars(broken) == []
    assert list(reader.rows(broken)) == []


def test_unknown_and_ambiguous_names_say_which_there_are(engine: sa.Engine, reader: Reader) -> None:
    with pytest.raises(RunNotFound, match="run 'gpt' is unknown; the database has no runs"):
        reader.run("gpt")
    with engine.begin() as connection:
        for project in ("a", "b"):
            insert_run(connection, "gpt", project=project)

    with pytest.raises(RunNotFound, match=r"run 'x' is unknown; there are: a/gpt, b/gpt"):
        reader.run("x")
    with pytest.raises(RunNotFound, match=r"run 'gpt' is in 2 projects; say 'a/gpt' or 'b/gpt'"):
        reader.run("gpt")
    with pytest.raises(ValueError, match="quantity 'bias' is unknown; choose one of scale_exp2"):
        reader.heatmap(1, "bias")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="field 'bias' is unknown; choose one of amax"):
        reader.series(1, 0, ["bias"])


def test_missing_database_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        Reader(f"sqlite:///{tmp_path / 'none.db'}")
