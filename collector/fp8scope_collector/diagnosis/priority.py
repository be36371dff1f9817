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

NICE = 10  # beside a busy process a tenth of a core; at 19, 1.5 %, findings of the demo came up to 23 s late
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
    """How much of a core it would take to judge rows as fast as they come, and how late diagnosis is."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s = clock()
        self._committed = self._judged = 0
        self._steps_per_s = self._a_step_s = 0.0

    def came(self, committed: int) -> None:
        """So many steps are committed now, in all."""
        now = self._clock()
        if now > self._last_s:
            self._steps_per_s = max(0.0, (committed - self._committed) / (now - self._last_s))
            self._last_s, self._committed = now, committed

    def looked(self, committed: int, judged: int, used_s: float) -> None:
        """A look has taken `used_s` of processor time, and so many steps are committed and judged now, in all."""
        self.came(committed)
        if judged > self._judged:
            self._a_step_s = used_s / (judged - self._judged)
        self._judged = judged

    @property
    def cores(self) -> float:
        """The cores that it would take to follow, as rows came lately and by what the last look took for a step."""
        return self._steps_per_s * self._a_step_s

    @property
    def late_s(self) -> float:
        """For how long what is not judged has been coming, as rows came lately."""
        return (self._committed - self._judged) / self._steps_per_s if self._steps_per_s else 0.0


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
