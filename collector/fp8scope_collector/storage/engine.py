"""Opens the database: SQLite (a file, the default) or PostgreSQL, its settings, and the version of its tables.

The one thing to know: an acknowledgement means durable, so the writing side runs SQLite with `synchronous=FULL` and
starts every transaction with BEGIN IMMEDIATE; a read-only engine can write nothing on either database. Everything that
is wrong with a database is a `StorageError`, whose text is meant for the user.

Tables change by alembic (`migrations/`). `migrate` is what `fp8scope serve` runs when it starts; readers only check,
and do not load alembic, which takes 10 MiB of each process.
"""

from __future__ import annotations

import importlib.util
import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fp8scope_collector.storage.sql_stats import SqlStats
from fp8scope_collector.storage.stats_store import StatsStore, StorageError

DEFAULT_URL = "sqlite:///fp8scope.db"
BUSY_TIMEOUT_S = 5.0
_MIGRATIONS = Path(__file__).parent.parent / "migrations" / "versions"
_MIGRATION_LOCK = 0x66703873636F7065  # "fp8scope": the advisory lock that one migrating collector holds on PostgreSQL
_STATS_PACKAGES = {"chdb": "chdb", "clickhouse": "clickhouse_connect"}  # by kind of URL
_POSTGRESQL_DEFAULTS = {  # libpq: notice a dead server in seconds, not hours
    "application_name": "fp8scope",
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}


def open_engine(url: str, *, read_only: bool = False) -> sa.Engine:
    """An engine for the database at `url`, connected to once so that what is wrong shows here.

    A writable engine creates a missing SQLite file, but no tables: see `migrate`. A read-only one expects the file
    and the current tables, and cannot change them.

    Raises:
        StorageError: the URL is malformed or of another database, nothing answers there, or (read-only) the tables
            are missing, older or newer than this version's.
    """
    parsed = _parse_url(url)
    stats = parsed.query.get("stats")
    parsed = parsed.difference_update_query(["stats"])
    engine = (
        _sqlite_engine(parsed, read_only) if parsed.get_backend_name() == "sqlite" else _postgresql(parsed, read_only)
    )
    try:
        with engine.connect() as connection:
            if read_only:
                _check_version(connection)
    except StorageError:
        engine.dispose()
        raise
    except sa.exc.DBAPIError as error:
        engine.dispose()
        raise StorageError(f"cannot open database {display_url(engine.url)}: {_reason(error)}") from error
    engine.update_execution_options(fp8scope_stats=stats)
    return engine


def open_stats(engine: sa.Engine) -> StatsStore:
    """Where the statistics are: where `?stats=` of the database's URL said, or else in the database itself.

    Raises:
        StorageError: the URL is malformed, of a database that cannot hold them, or needs a package that is missing.
    """
    url = engine.get_execution_options()["fp8scope_stats"]
    if url is None:
        return SqlStats(engine.dialect.name)
    expected = "expected chdb:///FOLDER or clickhouse://USER:PASSWORD@HOST:8123/DATABASE"
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise StorageError(f"stats={url!r} in the database's URL is malformed; {expected}") from None
    if (kind := parsed.drivername) not in _STATS_PACKAGES or not parsed.database:
        raise StorageError(f"stats={parsed.render_as_string()!r} in the database's URL is no such URL; {expected}")
    if (
        importlib.util.find_spec(_STATS_PACKAGES[kind]) is None
        or importlib.util.find_spec("clickhouse_connect") is None
    ):
        raise StorageError(f"statistics in {kind} need a package: run `pip install 'fp8scope-collector[{kind}]'`")
    from fp8scope_collector.storage.clickhouse import ClickHouseStats  # the package is an extra

    return ClickHouseStats(parsed)


def migrate(engine: sa.Engine) -> None:
    """Brings the tables up to this version, creating them in an empty database; several collectors may start at once.

    Raises:
        StorageError: the tables were written by a newer version, or the database cannot be written.
    """
    try:
        with engine.begin() as connection:  # SQLite: BEGIN IMMEDIATE is the lock
            if engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            if (found := _version(connection)) is not None and found not in _known_versions():
                raise StorageError(_newer(connection, found))
            if found != newest_version():
                upgrade(connection)
    except sa.exc.DBAPIError as error:
        raise StorageError(f"cannot create the tables in {display_url(engine.url)}: {_reason(error)}") from error


def upgrade(connection: sa.Connection, version: str = "head") -> None:
    """Brings the tables up to this version, in the caller's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "fp8scope_collector:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, version)


def stored_version(engine: sa.Engine) -> str | None:
    """The version of the tables in the database; None: there are none."""
    with engine.connect() as connection:
        return _version(connection)


def newest_version() -> str:
    """The version of the tables that this fp8scope makes and needs."""
    return max(_known_versions())


def display_url(url: sa.URL) -> str:
    """The URL for people: without its password and without the settings that `open_engine` adds."""
    if url.get_backend_name() == "sqlite":
        return f"sqlite:///{url.database}"
    kept = {key: value for key, value in url.query.items() if _POSTGRESQL_DEFAULTS.get(key) != value}
    return url.set(query=kept, drivername=url.get_backend_name()).render_as_string(hide_password=True)


def _parse_url(url: str) -> sa.URL:
    expected = "expected sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise StorageError(f"database URL {url!r} is malformed; {expected}") from None
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise StorageError(f"database URL {url!r} is of kind {backend!r}; {expected}")
    if backend == "sqlite" and (not parsed.database or parsed.database == ":memory:"):
        raise StorageError(
            "an in-memory SQLite database is lost at exit and invisible to the dashboard; give sqlite:///PATH"
        )
    return parsed


def _sqlite_engine(url: sa.URL, read_only: bool) -> sa.Engine:
    path = Path(str(url.database))
    if read_only and not path.exists():
        raise StorageError(
            f"database {str(path)!r} does not exist; check the path, or start `fp8scope serve --db sqlite:///{path}`"
        )
    if not read_only and not path.parent.is_dir():
        raise StorageError(f"cannot create database {str(path)!r}: its directory {str(path.parent)!r} does not exist")
    target = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(target, uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False)

    engine = sa.create_engine(url, creator=connect)

    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # the driver's own BEGIN is deferred, and deadlocks; `begin` below decides
        connection.execute("PRAGMA foreign_keys=ON")
        if read_only:
            connection.execute("PRAGMA query_only=ON")
        else:
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # a new file's only: what is deleted can shrink it
            _enter_wal(connection)
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA cache_size=-16384")  # 16 MiB: 64 were not faster

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Write-ahead logging: readers never wait. SQLite does not wait for a lock when it changes this mode, so we do."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _postgresql(url: sa.URL, read_only: bool) -> sa.Engine:
    missing = {key: value for key, value in _POSTGRESQL_DEFAULTS.items() if key not in url.query}
    url = url.set(drivername="postgresql+psycopg").update_query_dict(missing)
    engine = sa.create_engine(url, pool_pre_ping=True)
    if read_only:

        @sa.event.listens_for(engine, "connect")
        def forbid_writing(connection: Any, _record: Any) -> None:
            connection.read_only = True  # psycopg: every transaction is BEGIN READ ONLY

    return engine


def _known_versions() -> set[str]:
    """Each migration's file begins with the version that it makes."""
    return {path.name.partition("_")[0] for path in _MIGRATIONS.glob("[0-9]*.py")}


def _version(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return found


def _check_version(connection: sa.Connection) -> None:
    found = _version(connection)
    head = newest_version()
    where = display_url(connection.engine.url)
    if found is None:
        raise StorageError(
            f"database {where} has no fp8scope tables; start `fp8scope serve --db {where}` once to create them"
        )
    if found not in _known_versions():
        raise StorageError(_newer(connection, found))
    if found != head:
        raise StorageError(
            f"database {where} has tables of version {found}, this fp8scope expects {head}; "
            f"start `fp8scope serve --db {where}` once to upgrade them"
        )


def _newer(connection: sa.Connection, found: str) -> str:
    return (
        f"database {display_url(connection.engine.url)} has tables of version {found}, newer than the "
        f"{newest_version()} that this fp8scope knows; upgrade fp8scope"
    )


def _reason(error: sa.exc.DBAPIError) -> str:
    """The driver's own words, on one line."""
    return " ".join(str(error.orig).split())
