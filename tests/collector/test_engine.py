"""Opening databases: settings, migrations, and what users are told when one cannot be used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from fp8scope_collector.storage import engine as engines
from fp8scope_collector.storage.engine import display_url, migrate, newest_version, open_engine
from fp8scope_collector.storage.schema import metadata
from fp8scope_collector.storage.stats_store import StorageError


def test_migrated_tables_are_the_schema(database_url: str) -> None:
    engine = open_engine(database_url)

    migrate(engine)

    with engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": connection.dialect.name == "postgresql"}
        differences = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
        assert [found for found in differences if not _is_comment(found)] == []
        assert _constraints(connection) == _constraints_of_metadata()
    engine.dispose()


def test_migrated_sqlite_is_the_same_sql_as_the_schema(tmp_path: Path) -> None:
    migrated = open_engine(f"sqlite:///{tmp_path}/migrated.db")
    created = open_engine(f"sqlite:///{tmp_path}/created.db")

    migrate(migrated)
    with created.begin() as connection:
        metadata.create_all(connection)

    listing = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'alembic_version' ORDER BY name"
    with migrated.connect() as one, created.connect() as other:
        found = {name: _statement(sql) for name, sql in one.exec_driver_sql(listing)}
        assert found == {name: _statement(sql) for name, sql in other.exec_driver_sql(listing)}
    migrated.dispose()
    created.dispose()


def test_versions_are_those_that_alembic_finds() -> None:
    scripts = ScriptDirectory(str(engines._MIGRATIONS.parent))

    assert engines._known_versions() == {script.revision for script in scripts.walk_revisions()}
    assert newest_version() == scripts.get_current_head()


def test_a_collector_and_its_readers_load_neither_alembic_nor_a_driver_that_they_do_not_need(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/test.db"
    engine = open_engine(url)
    migrate(engine)
    engine.dispose()
    program = f"""
import sys
import fp8scope_collector.cli, fp8scope_collector.server, fp8scope_collector.diagnosis.worker
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.writer import StatsWriter
migrate(open_engine({url!r}))
StatsWriter(open_engine({url!r})).catch_up(now_unix_ns=1)
Reader({url!r}).runs()
print([name for name in ("alembic", "mako", "psycopg", "chdb", "clickhouse_connect") if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)

    assert said.stdout == "[]\n"


def test_migrating_again_changes_nothing(database_url: str) -> None:
    engine = open_engine(database_url)
    migrate(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO run (name, created_unix_ns) VALUES ('kept', 1)")

    migrate(engine)

    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT name FROM run").scalar_one() == "kept"
    engine.dispose()


def test_several_collectors_may_migrate_at_once(database_url: str) -> None:
    code = f"from fp8scope_collector.storage.engine import *; migrate(open_engine({database_url!r}))"

    started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=60)[1] for process in started]

    assert [process.returncode for process in started] == [0] * 3, errors
    open_engine(database_url, read_only=True).dispose()


def test_a_newer_database_is_refused_with_a_sentence(database_url: str) -> None:
    engine = open_engine(database_url)
    migrate(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(StorageError, match=f"version 9999, newer than the {newest_version()} that this fp8scope knows"):
        migrate(engine)
    with pytest.raises(StorageError, match="version 9999, newer than"):
        open_engine(database_url, read_only=True)
    engine.dispose()


def test_a_database_without_tables_says_how_to_create_them(database_url: str) -> None:
    open_engine(database_url).dispose()

    with pytest.raises(StorageError, match=r"has no fp8scope tables; start `fp8scope serve --db .*` once"):
        open_engine(database_url, read_only=True)


def test_a_read_only_engine_cannot_write(database_url: str) -> None:
    engine = open_engine(database_url)
    migrate(engine)
    engine.dispose()

    reader = open_engine(database_url, read_only=True)

    with pytest.raises(sa.exc.DBAPIError, match=r"(?i)read-?only"), reader.begin() as connection:
        connection.exec_driver_sql("DELETE FROM run")
    reader.dispose()


def test_the_writing_side_of_sqlite_is_durable(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/test.db")

    with engine.connect() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }

    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nonsense", "is malformed; expected sqlite:///PATH or postgresql://"),
        ("mysql://host/name", "is of kind 'mysql'; expected sqlite:///PATH"),
        ("sqlite://", "an in-memory SQLite database is lost at exit"),
        ("sqlite:////nowhere/at/all.db", "its directory '/nowhere/at' does not exist"),
        ("postgresql://nobody@127.0.0.1:1/x", "cannot open database postgresql://nobody@127.0.0.1:1/x: .*refused"),
    ],
)
def test_an_unusable_url_is_explained(url: str, sentence: str) -> None:
    with pytest.raises(StorageError, match=sentence):
        open_engine(url)


def test_a_missing_file_is_not_created_by_a_reader(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist; check the path, or start `fp8scope serve"):
        open_engine(f"sqlite:///{tmp_path}/test.db", read_only=True)

    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_explained(tmp_path: Path) -> None:
    (tmp_path / "test.db").write_text("certainly not a database, but long enough to look like a file of one" * 20)

    with pytest.raises(StorageError, match="file is not a database"):
        open_engine(f"sqlite:///{tmp_path}/test.db")


def test_passwords_are_not_shown() -> None:
    url = sa.make_url("postgresql+psycopg://me:secret@host/base?connect_timeout=5")

    assert display_url(url) == "postgresql://me:***@host/base"


def _is_comment(difference: Any) -> bool:
    """Whether only the prose about a column differs: a reworded definition needs no migration."""
    return isinstance(difference, list) and all(change[0] == "modify_comment" for change in difference)


def _constraints(connection: sa.Connection) -> set[tuple[str, str]]:
    inspector = sa.inspect(connection)
    found = set()
    for table in inspector.get_table_names():
        if table != "alembic_version":
            names = [inspector.get_pk_constraint(table), *inspector.get_unique_constraints(table)]
            names += inspector.get_foreign_keys(table)
            found |= {(table, str(constraint["name"])) for constraint in names}
    return found


def _constraints_of_metadata() -> set[tuple[str, str]]:
    return {
        (table.name, str(constraint.name)) for table in metadata.tables.values() for constraint in table.constraints
    }


def _statement(sql: str) -> str:
    """The statement's parts in alphabetical order: neither their order nor how ALTER TABLE lays them out matters."""
    return "\n".join(sorted(filter(None, map(str.strip, re.split(r",\s|\n", sql)))))
