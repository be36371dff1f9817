"""Reaches a ClickHouse database, or a chDB folder that another process may have; for the store in `clickhouse`.

A chDB folder is one process's from the first change to `close`. Whoever only reads does so through the process that has
it (`clickhouse_http`, docs/adr/0084), or through one that is started for that (`clickhouse_process`), and leaves when a
collector comes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from clickhouse_connect.driver.exceptions import ClickHouseError
from clickhouse_connect.driver.httputil import get_pool_manager
from urllib3.exceptions import HTTPError

from fp8scope_collector.storage.clickhouse_http import INTERPRETED, USER, Offer, find, holder
from fp8scope_collector.storage.clickhouse_process import read_from
from fp8scope_collector.storage.stats_store import StorageError

PATIENCE_S = 5.0  # with another process that has the chDB folder for a moment
_TRIES = 3  # in a row, of chDB to start while nobody has the folder: somebody may have had it for a moment
_MERGES_NICE = 10
_KEEPS = (  # of memory that it has freed, chDB's allocator: a tenth of a second, and for each thread small pieces only
    "narenas:1,dirty_decay_ms:100,muzzy_decay_ms:0,tcache_max:4096"
)


class Database:
    """One ClickHouse database, or one chDB folder; nothing is opened before it is needed."""

    def __init__(self, url: sa.URL) -> None:
        """`url`: as `ClickHouseStats` takes it."""
        self.url = url
        self.folder = Path(str(url.database)).absolute() if url.get_backend_name() == "chdb" else None
        self.shown = url.render_as_string(hide_password=True)
        if self.folder:
            os.environ.setdefault("JE_MALLOC_CONF", _KEEPS)  # read when chDB is imported
            own = sa.URL.create("clickhousedb", database="default")
            own = own.update_query_dict({"interface": "chdb", "path": str(self.folder)})
            self._engine = sa.create_engine(own, connect_args={"chdb_options": INTERPRETED})
        else:
            self._engine = sa.create_engine(url.set(drivername="clickhousedb").difference_update_query(["cluster"]))
        self.dialect = self._engine.dialect
        self._own = self.folder is None  # whether the pool of `_engine` may keep connections
        self._through: _Through | None = None  # the process that has the folder
        self._finding = threading.Lock()

    @contextlib.contextmanager
    def client(self, *, changing: bool = False) -> Iterator[Any]:
        """clickhouse-connect's client of a pooled connection.

        Raises:
            StorageError: the database cannot be reached or changed, or what ClickHouse says is wrong.
        """
        with self._connection(changing) as connection:
            try:
                yield connection.connection.driver_connection.client  # type: ignore[union-attr]  # the dialect's
            except (ClickHouseError, HTTPError) as error:
                raise self._unavailable(error) from error
            finally:
                if not self._own and connection.engine is self._engine:
                    connection.invalidate()  # the folder is another's in this process, who may close it

    def close(self) -> None:
        """Closes the connections, and leaves a chDB folder to others."""
        if self._through:
            self._through.close()
        self._engine.dispose()
        self._own = self.folder is None

    def _connection(self, changing: bool) -> sa.Connection:
        """A connection of this process, or, where another has the chDB folder and nothing is changed, through that."""
        deadline = time.monotonic() + PATIENCE_S
        failed = 0  # in a row, while nobody had the folder
        while True:
            engine = self._engine
            try:
                engine = engine if self._own else self._reach(changing)
                connection = engine.connect()
                self._own = self._own or changing
                return connection
            except (ClickHouseError, sa.exc.DBAPIError, HTTPError, _HeldError) as error:
                if self._own or not self.folder or not (_is_shut(error) or self._has_left(engine)):
                    raise self._unavailable(error) from error
                failed = failed + 1 if (pid := holder(self.folder)) is None else 0
                if failed == _TRIES or time.monotonic() > deadline:
                    raise self._shut(pid, error) from error
                time.sleep(0.05)

    def _reach(self, changing: bool) -> sa.Engine:
        """Whose connections reach the chDB folder now.

        Raises:
            StorageError: a collector has it, and something is to be changed; it is another user's, or not there.
            _HeldError: a process has it that offers nothing, maybe not yet, or no longer.
        """
        assert self.folder
        try:
            pid = holder(self.folder)
            if pid == os.getpid():
                return self._engine
            if pid is None:
                self._check()
                if changing:
                    return self._engine
                pid = self._start_reading()
            offer = find(self.folder, pid)
        except PermissionError as error:
            raise StorageError(
                f"statistics in {self.shown} are another user's, and this one may not use {error.filename}. Run this "
                "as the user that runs the collector"
            ) from None
        if offer is None:
            raise _HeldError(f"process {pid} has it")
        if changing and offer.gives_way:
            offer.tell_to_leave()
            raise _HeldError(f"process {pid} is about to leave it")
        if changing:
            raise StorageError(
                f"statistics in {self.shown} cannot be changed: a chDB folder belongs to one process at a time, and "
                f"the collector in process {pid} has it. Stop it first; with `--retention` it prunes by itself"
            )
        with self._finding:
            if self._through is None or self._through.offer != offer:
                if self._through:
                    self._through.close()
                self._through = _Through(offer)
            return self._through.engine

    def _start_reading(self) -> int:
        """Sees that a process has the folder to be read from; which one.

        Raises:
            _HeldError: nobody has it, with what chDB says about that.
        """
        assert self.folder
        with self._finding:
            said = read_from(self.folder) if holder(self.folder) is None else ""
        if (pid := holder(self.folder)) is None:
            raise _HeldError(said)
        return pid

    def _has_left(self, engine: sa.Engine) -> bool:
        """Whether the process that the engine goes through has left the folder since its offer was read."""
        assert self.folder
        through = self._through
        return through is not None and engine is through.engine and holder(self.folder) != through.offer.pid

    def _check(self) -> None:
        """Sees that chDB may open the folder: it would make one that is not there, and gives no reason for a failure.

        Raises:
            StorageError: there is no such folder.
            PermissionError: this user may not write to it, which chDB does even to read.
        """
        assert self.folder
        if not self.folder.is_dir():
            raise StorageError(
                f"statistics in {self.shown} cannot be used: there is no folder {str(self.folder)!r}. `fp8scope serve` "
                "makes it; if it has run, give the --db that it had: a relative path begins in the working directory"
            )
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.folder))

    def _shut(self, pid: int | None, error: Exception) -> StorageError:
        """What there is to say when the chDB folder was not opened; process `pid` has it, or None."""
        if pid is None:
            return StorageError(
                f"statistics in {self.shown} cannot be opened: no other process has the folder, but chDB does not "
                f"start in it. It has written the reason to standard error, or says it here: {_first_words(error)}"
            )
        return StorageError(
            f"statistics in {self.shown} cannot be opened: a chDB folder belongs to one process at a time, and process "
            f"{pid} has it and lets no others read: a command that changes it, or a collector that starts or ends. Try "
            "again"
        )

    def _unavailable(self, error: Exception) -> StorageError:
        return StorageError(f"statistics in {self.shown} cannot be used: {_first_words(error)}")


def merge_when_idle() -> None:
    """Gives chDB's merges, the threads of this process that are called so, what others leave of the processors.

    They are a good part of the work, and none of it is urgent; on Linux a thread has a priority of its own.
    """
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it ended, or this is another system
            if (thread / "comm").read_text().strip() == "MergeMutate":
                os.setpriority(os.PRIO_PROCESS, int(thread.name), _MERGES_NICE)


class _HeldError(Exception):
    """Another process has the chDB folder."""


def _is_shut(error: Exception) -> bool:
    """Whether the chDB folder was not opened, because another process has it or chDB does not start in it.

    Not because this process has another folder open, of which chDB opens one at a time.
    """
    text = str(error)
    return isinstance(error, _HeldError) or ("EmbeddedServer" in text and "already initialized" not in text)


def _first_words(error: Exception) -> str:
    """What an error says, on one line and without SQLAlchemy's frame and chDB's stack."""
    return " ".join(str(getattr(error, "orig", error)).partition(", Stack trace")[0].split())


class _Through:
    """Connections to the process that made the offer; not through a proxy, whatever the environment says."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self._sockets = get_pool_manager()
        url = sa.URL.create("clickhousedb", USER, offer.password, "127.0.0.1", offer.port, "default")
        self.engine = sa.create_engine(url, connect_args={"pool_mgr": self._sockets})

    def close(self) -> None:
        """Closes them; clickhouse-connect leaves open what it did not make itself."""
        self.engine.dispose()
        self._sockets.clear()
