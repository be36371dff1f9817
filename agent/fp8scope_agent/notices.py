"""Sentences for the user, each cause once, through the logger `fp8scope`; and the counts of what was dropped."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("fp8scope")


class Notices:
    """Warns once per cause, so that a trouble that lasts does not fill the log."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def warn(self, cause: str, sentence: str) -> None:
        """Say `sentence`, unless `cause` was named before."""
        if cause not in self._said:
            self._said.add(cause)
            logger.warning("%s", sentence)


class Drops:
    """Rows and histograms that are lost, by reason: running totals. Locked only when something is lost."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, reason: str, rows: int) -> None:
        """Count `rows` more; what has no rows (a record of scalars alone) counts as one."""
        with self._lock:
            self._rows[reason] = self._rows.get(reason, 0) + max(rows, 1)

    def add_histograms(self, reason: str, histograms: int) -> None:
        """Count that many histograms more, apart from rows."""
        self.add(f"{reason}_histograms", histograms)

    def totals(self) -> dict[str, int]:
        """The totals so far."""
        with self._lock:
            return dict(self._rows)
