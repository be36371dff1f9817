"""Copies a database while collectors write to it: SQLite by its backup interface, PostgreSQL by its own pg_dump.

The copy is of one moment, and has its name only when it is complete. Statistics in ClickHouse or chDB are not in it;
`beside` says how they are copied, always after this: what they have and the copy does not know is recognised when it is
sent again, and what it says is committed is there.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from fp8scope_collector.config import ConfigError
from fp8scope_collector.storage.engine import open_engine, open_stats

PAGES = 2_048  # copied between two reports


def back_up(url: str, out: Path, report: Callable[[int, int], None]) -> int:
    """Writes a copy of the database at `url` to `out`, replacing what is there; its size in bytes.

    Raises:
        StorageError: the database cannot be opened.
        ConfigError: pg_dump is missing or fails.
        OSError: `out` cannot be written.
    """
    engine = open_engine(url, read_only=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        unfinished.touch(mode=0o600)  # it holds hashes of tokens
        if engine.dialect.name == "sqlite":
            _copy_sqlite(engine, unfinished, report)
        else:
            _dump_postgresql(engine.url, unfinished)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
        engine.dispose()
    return out.stat().st_size


def beside(url: str) -> str | None:
    """What to do about statistics that a copy of the database does not have; None where it has them.

    Raises:
        StorageError: as `open_engine` and `open_stats`.
    """
    engine = open_engine(url, read_only=True)
    store = open_stats(engine)
    engine.dispose()
    return store.backup_hint


def _copy_sqlite(engine: sa.Engine, out: Path, report: Callable[[int, int], None]) -> None:
    """Copies from one read transaction: else each write of a collector would make SQLite start over."""
    with closing(sqlite3.connect(f"file:{engine.url.database}?mode=ro", uri=True)) as source:
        source.isolation_level = None
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM sqlite_master").fetchone()  # the snapshot begins with the first reading
        with closing(sqlite3.connect(out)) as target:
            source.backup(target, pages=PAGES, sleep=0, progress=lambda _, left, total: report(total - left, total))
            if (found := target.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise ConfigError(f"the copy is damaged, and so may be the database: {found}")


def _dump_postgresql(url: sa.URL, out: Path) -> None:
    shown = f"pg_dump --format custom --file {out.name} {url.database}"
    if (program := shutil.which("pg_dump")) is None:
        raise ConfigError(
            f"pg_dump is not on the PATH; install PostgreSQL's client programs, or run `{shown}` where they are"
        )
    options = {"--host": url.host, "--port": url.port, "--username": url.username, "--dbname": url.database}
    arguments = [f"{option}={value}" for option, value in options.items() if value is not None]
    environment = os.environ | ({"PGPASSWORD": url.password} if url.password else {})  # never in the arguments
    result = subprocess.run(
        [program, "--format=custom", f"--file={out}", "--no-password", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise ConfigError(f"pg_dump failed: {' '.join(result.stderr.split())}")
