"""Diagnosis has the processor when nobody else wants it; its transactions do not wait for that.

What holds a lock of the database and waits for a processor holds up ingest with it. So the thread that reads and judges
steps back, and what it writes goes through `Transactions`: a thread that keeps the priority of the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import sqlalchemy as sa

NICE = 19
T = TypeVar("T")


def step_back() -> None:
    """Lets everything else go first from now on: on Linux before this thread alone, elsewhere before the process."""
    os.nice(NICE)


class Transactions:
    """The transactions of one engine, in a thread with the priority that its maker has when it makes it."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fp8scope-transactions")
        self._thread.submit(lambda: None).result()  # it starts now

    @property
    def dialect(self) -> str:
        """The database's kind."""
        return self._engine.dialect.name

    def run(self, work: Callable[[sa.Connection], T]) -> T:
        """What `work` returns of a transaction, which is committed then.

        Raises: what `work` does, and SQLAlchemy's errors.
        """
        return self._thread.submit(self._begin, work).result()

    def close(self) -> None:
        """Ends the thread and closes the connections."""
        self._thread.shutdown()
        self._engine.dispose()

    def _begin(self, work: Callable[[sa.Connection], T]) -> T:
        with self._engine.begin() as connection:
            return work(connection)
