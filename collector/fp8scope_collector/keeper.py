"""What a collector does to its database beside writing: notes how old steps are, and takes out what is too old.

A thread of its own with a connection of its own: a prune of hours holds up neither the writer, which it lets in after
each small transaction, nor anybody else. What fails is logged and tried again the next time.
"""

from __future__ import annotations

import threading
import time

import sqlalchemy as sa
import structlog

from fp8scope_collector.storage.retention import note_milestones, prune
from fp8scope_collector.storage.stats_store import StatsStore

KEEP_S = 60.0

log = structlog.get_logger()


class Keeper:
    """Runs until `close`; with `retention_s` raw rows of that age are deleted."""

    def __init__(self, engine: sa.Engine, store: StatsStore, retention_s: int | None) -> None:
        self._engine = engine
        self._store = store
        self._retention_s = retention_s
        self._closing = threading.Event()
        threading.Thread(target=self._run, name="fp8scope-keeper", daemon=True).start()

    def close(self) -> None:
        """Stops after the transaction that is under way; does not wait for it."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(KEEP_S):
            try:
                self._keep()
            except _ClosingError:
                return
            except Exception as error:
                log.error("upkeep failed; it is tried again", error=" ".join(str(error).split()))

    def _keep(self) -> None:
        note_milestones(self._engine, now_unix_ns=time.time_ns())
        if self._retention_s is None:
            return
        pruned = prune(
            self._engine,
            self._store,
            older_than_ns=self._retention_s * 10**9,
            now_unix_ns=time.time_ns(),
            actor="collector",
            report=self._go_on,
        )
        for each in pruned:
            log.info("pruned", run=each.run, rows=each.rows)

    def _go_on(self, _done: int, _total: int) -> None:
        if self._closing.is_set():
            raise _ClosingError


class _ClosingError(Exception):
    """The collector ends."""
