"""Diagnosis has the processor when nobody else wants it; its transactions do not wait for that.

What holds a lock of the database and waits for a processor holds up ingest with it. So the thread that reads and judges
steps back, and what it writes goes through `Transactions`: a thread that keeps the priority of the process. Where
`Demand` says that it could not follow anyway, it steps aside (docs/adr/0065).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import sqlalchemy as sa

NICE = 19
T = TypeVar("T")


def step_back() -> None:
    """Lets everything else go first from now on: on Linux before this thread alone, elsewhere before the process."""
    os.nice(NICE)


def step_aside() -> None:
    """Gives this thread, for ever, only what nobody else wants: on Linux, and where a sandbox allows it.

    A process that is merely nice keeps a processor for milliseconds after another one wants it.
    """
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Demand:
    """How much of a core it would take to judge rows as fast as they come, from one look to the next."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[float, int, int] | None = None
        self._cores = 0.0

    def after(self, committed: int, judged: int, used_s: float) -> float:
        """The cores, after a look for which so many steps were committed and judged in all, and that took `used_s`.

        A look that judged nothing says nothing: the answer is that of the one before, 0 at first.
        """
        now = self._clock()
        if self._last:
            then, had_come, had_judged = self._last
            if judged > had_judged and now > then:
                self._cores = (committed - had_come) / (now - then) * used_s / (judged - had_judged)
        self._last = (now, committed, judged)
        return self._cores


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
