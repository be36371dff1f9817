"""A database of each kind for a benchmark, with the durability that it has by default."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from fp8scope_collector.storage.engine import open_engine, open_stats

ENGINES = ("sqlite", "postgresql", "clickhouse")


@dataclass(frozen=True)
class Database:
    """A database to give to `fp8scope serve`, and how large it is."""

    url: str
    size_bytes: Callable[[], int]
    folder: Path

    def note(self, name: str, number: int) -> None:
        """Keeps a number beside the database, as long as that is kept."""
        (self.folder / name).write_text(str(number))

    def noted(self, name: str) -> int:
        """The number that was noted."""
        return int((self.folder / name).read_text())


@contextlib.contextmanager
def database(engine: str, keep: Path | None = None) -> Iterator[Database]:
    """An empty database of that kind, gone afterwards; or the one in the folder `keep`, which stays.

    Raises:
        FileNotFoundError: its programs are not on this machine.
    """
    with contextlib.ExitStack() as stack:
        folder = (
            keep.absolute() if keep else Path(stack.enter_context(tempfile.TemporaryDirectory("", "fp8scope-bench-")))
        )
        folder.mkdir(parents=True, exist_ok=True)
        if engine == "postgresql":
            url = stack.enter_context(_postgresql(folder))
            yield Database(url, lambda: _postgresql_bytes(url), folder)
        else:
            stats = f"?stats=chdb:///{folder}/stats" if engine == "clickhouse" else ""
            url = f"sqlite:///{folder}/bench.db{stats}"
            yield Database(url, lambda: (folder / "bench.db").stat().st_size + _statistics_bytes(url), folder)


def _statistics_bytes(url: str) -> int:
    """What is beside the relational database; parts that were merged into others stay for minutes and do not count."""
    engine = open_engine(url, read_only=True)
    with contextlib.closing(open_stats(engine)) as store:
        size: int = store.size_bytes()
    engine.dispose()
    return size


@contextlib.contextmanager
def _postgresql(folder: Path) -> Iterator[str]:
    """A server in `folder` with its own settings but for the address."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise FileNotFoundError("PostgreSQL is not installed; run `make test-deps`")
    account: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses root
        entry = pwd.getpwnam("postgres")
        account = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        shutil.chown(folder, entry.pw_uid, entry.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    if not (data / "PG_VERSION").exists():
        initdb = [found[-1].with_name("initdb"), "-D", data, "-U", "postgres", "--auth=trust", "--encoding=UTF8"]
        subprocess.run([*map(str, initdb)], **account, cwd=folder, check=True, capture_output=True)
    server = subprocess.Popen(
        [found[-1], "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder],
        **account,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
    try:
        for _ in range(200):
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(url).close()
                break
            time.sleep(0.1)
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # ends although a reader may still be connected
        server.wait(30)


def _postgresql_bytes(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
        assert row
        return int(row[0])
