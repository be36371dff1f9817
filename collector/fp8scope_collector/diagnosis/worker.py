"""The process that diagnoses, beside the collector that started it: `python -m fp8scope_collector.diagnosis.worker`.

It reads one line of settings from standard input and looks at all runs every few seconds until standard input ends,
which it does when the collector does, however that happens. A process of its own, that lets ingest go first: it reads
what the collector has committed, and whatever goes wrong here stops neither ingest nor training (docs/adr/0063, 0065).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import sqlalchemy as sa
import structlog

from fp8scope_collector.diagnosis.live import RUN_BUDGET_S, Lease, News, Watcher
from fp8scope_collector.diagnosis.notify import Notifier
from fp8scope_collector.diagnosis.priority import Demand, step_aside, step_back
from fp8scope_collector.diagnosis.settings import Settings
from fp8scope_collector.logs import log_to_stderr
from fp8scope_collector.memory import forget_start, share_heap_with_arrow
from fp8scope_collector.storage.stats_store import StorageError

REST = 1  # times the processor time of a look, before the next: at most half a core, where one is idle
REST_ASIDE = 12  # the same where that is not enough to follow and it is late anyway
LATE_S = 15.0
LONGEST_REST_S = 20.0  # shorter than the lease
log = structlog.get_logger()


def work(settings: Settings, stop: threading.Event) -> None:
    """Looks at all runs every `every_s` seconds until `stop`, as long as no other collector does.

    Raises:
        StorageError: the database cannot be used.
    """
    watcher = Watcher(settings.db)
    lease = Lease(settings.db, f"{socket.gethostname()}-{os.getpid()}")
    notifier = Notifier(settings.webhook) if settings.webhook else None
    step_back()
    aside = ThreadPoolExecutor(1, "fp8scope-aside", step_aside)
    demand, overrun = Demand(), False

    def look() -> tuple[list[News], bool]:
        return watcher.look(lambda: not stop.is_set() and lease.hold(), 0.0 if overrun else RUN_BUDGET_S)

    try:
        while not stop.is_set():
            started, used_before_s = time.monotonic(), time.process_time()
            more = False
            try:
                if lease.hold():
                    news, more = aside.submit(look).result() if overrun else look()
                    if notifier:
                        notifier.tell(news)
                    demand.looked(*watcher.steps(), time.process_time() - used_before_s)
                    overrun = more and too_much(demand)
                took_s, used_s = time.monotonic() - started, time.process_time() - used_before_s
                rest_s = min((REST_ASIDE if overrun else REST) * used_s, LONGEST_REST_S)
                rest_s = rest_s if more else max(settings.every_s - took_s, rest_s)
                while overrun and rest_s > settings.every_s and not stop.wait(settings.every_s):
                    rest_s -= settings.every_s
                    demand.came(watcher.steps()[0])
                    overrun = too_much(demand)
                stop.wait(rest_s if overrun or not more else min(rest_s, REST * used_s))
            except sa.exc.DBAPIError as error:
                log.warning("diagnosis waits for the database", error=" ".join(str(error.orig).split()))
                stop.wait(settings.every_s)
    finally:
        aside.shutdown()
        lease.release()
        if notifier:
            notifier.close()
        watcher.close()


def too_much(demand: Demand) -> bool:
    """Whether half a core could not follow what comes, and findings are late as it is."""
    return demand.cores > 1 / (1 + REST) and demand.late_s > LATE_S


def main() -> None:
    """Runs the process."""
    log_to_stderr()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the collector's, which ends standard input then
    settings = Settings.from_line(sys.stdin.buffer.readline())
    stop = threading.Event()

    def wait_for_the_collector() -> None:
        sys.stdin.buffer.read()
        stop.set()

    threading.Thread(target=wait_for_the_collector, daemon=True).start()
    share_heap_with_arrow()
    forget_start()
    try:
        work(settings, stop)
    except StorageError as error:
        log.error("diagnosis cannot use the database", error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
