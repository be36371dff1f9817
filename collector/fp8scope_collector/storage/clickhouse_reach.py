"""Reaches a ClickHouse database, or a chDB folder that another process may have; for the store in `clickhouse`.

A chDB folder is one process's from the first change to `close`. Whoever only reads has it for no longer than a query,
since a collector may want it, or else reads through the process that has it (`clickhouse_http`, docs/adr/0084).
"""

from __future__ import annotations

import contextlib
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

from fp8scope_collector.storage.clickhouse_http import USER, Offer, find, holder
from fp8scope_collector.storage.stats_store import StorageError

PATIENCE_S = 5.0  # with another process that has the chDB folder for a moment
_MERGES_NICE = 10


class Database:
    """One ClickHouse database, or one chDB folder; nothing is opened before it is needed."""

    def __init__(self, url: sa.URL) -> None:
        """`url`: as `ClickHouseStats` takes it."""
        self.url = url
        self.folder = Path(str(url.database)).absolute() if url.get_backend_name() == "chdb" else None
        self.shown = url.render_as_string(hide_password=True)
        self._engine = sa.create_engine(
            sa.URL.create("clickhousedb", database="default").update_query_dict(
                {"interface": "chdb", "path": str(self.folder)}
            )
            if self.folder
            else url.set(drivername="clickhousedb").difference_update_query(["cluster"])
        )
        self.dialect = self._engine.dialect
        self._own = self.folder is None  # whether the pool of `_engine` may keep connections
        self._through: tuple[Offer, sa.Engine] | None = None  # the process that has the folder
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
                    connection.invalidate()  # a collector may want the folder

    def close(self) -> None:
        """Closes the connections, and leaves a chDB folder to others."""
        if self._through:
            self._through[1].dispose()
        self._engine.dispose()
        self._own = self.folder is None

    def _connection(self, changing: bool) -> sa.Connection:
        """A connection of this process, or, where another has the chDB folder and nothing is changed, through that."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                engine = self._engine if self._own else self._reach(changing)
                connection = engine.connect()
                self._own = self._own or changing
                return connection
            except (ClickHouseError, sa.exc.DBAPIError, HTTPError, _HeldError) as error:
                if self._own or not self.folder or time.monotonic() > deadline:
                    raise self._unavailable(error) from error
                if not _is_held(error):
                    raise self._unavailable(error) from error
                time.sleep(0.05)

    def _reach(self, changing: bool) -> sa.Engine:
        """Whose connections reach the chDB folder now.

        Raises:
            StorageError: a collector has it, and something is to be changed; or it is another user's.
            _HeldError: a process has it that offers nothing, maybe not yet, or no longer.
        """
        assert self.folder
        try:
            if (pid := holder(self.folder)) in (None, os.getpid()):
                return self._engine
            offer = find(self.folder, int(pid or 0))
        except PermissionError as error:
            raise StorageError(
                f"statistics in {self.shown} are another user's: {error.filename} cannot be read. Run this as the "
                "user that runs the collector"
            ) from None
        if offer is None:
            raise _HeldError(f"process {pid} has it")
        if changing:
            raise StorageError(
                f"statistics in {self.shown} cannot be changed: a chDB folder belongs to one process at a time, and "
                f"the collector in process {pid} has it. Stop it first; with `--retention` it prunes by itself"
            )
        with self._finding:
            if self._through is None or self._through[0] != offer:
                if self._through:
                    self._through[1].dispose()
                self._through = offer, _engine_through(offer)
            return self._through[1]

    def _unavailable(self, error: Exception) -> StorageError:
        if _is_held(error):
            return StorageError(
                f"statistics in {self.shown} cannot be opened: a chDB folder belongs to one process at a time, and "
                "one has it that lets no others read: a command that changes it, or a collector that starts or ends. "
                "Try again"
            )
        return StorageError(f"statistics in {self.shown} cannot be used: {' '.join(str(error).split())}")


def merge_when_idle() -> None:
    """Gives chDB's merges, the threads of this process that are called so, what others leave of the processors.

    They are a quarter of the work, and none of it is urgent; on Linux a thread has a priority of its own.
    """
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it ended, or this is another system
            if (thread / "comm").read_text().strip() == "MergeMutate":
                os.setpriority(os.PRIO_PROCESS, int(thread.name), _MERGES_NICE)


class _HeldError(Exception):
    """Another process has the chDB folder."""


def _is_held(error: Exception) -> bool:
    """Whether another process has the chDB folder; not this one another folder, of which chDB opens one at a time."""
    text = str(error)
    return isinstance(error, _HeldError) or ("EmbeddedServer" in text and "already initialized" not in text)


def _engine_through(offer: Offer) -> sa.Engine:
    """Connections to the process that made the offer; not through a proxy, whatever the environment says."""
    url = sa.URL.create("clickhousedb", USER, offer.password, "127.0.0.1", offer.port, "default")
    return sa.create_engine(url, connect_args={"pool_mgr": get_pool_manager()})
