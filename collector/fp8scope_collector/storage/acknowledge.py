"""Says of findings that somebody has seen them: who, when and why. The one thing that a dashboard writes.

It changes the three columns `acknowledged_*` of findings and nothing else, in a transaction of its own. An
acknowledgement is of one episode: when the same thing comes back later, that is another finding.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import sqlalchemy as sa

from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import display_url, open_engine
from fp8scope_collector.storage.findings import read_findings
from fp8scope_collector.storage.readmodels import StoredFinding
from fp8scope_collector.storage.stats_store import StorageError

LONGEST_NAME, LONGEST_REASON = 256, 4096


class AcknowledgeError(Exception):
    """A finding that cannot be acknowledged so; the text is for the user."""


class Acknowledger:
    """Acknowledges findings of one database; safe to use from several threads.

    Raises:
        StorageError: the database is missing, empty, unreachable or of another version.
    """

    def __init__(self, url: str, *, clock: Callable[[], int] = time.time_ns) -> None:
        open_engine(url, read_only=True).dispose()  # missing or of another version: say so, and make nothing
        self._engine = open_engine(url)
        self._clock = clock

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()

    def acknowledge(self, finding_id: int, *, by: str, reason: str) -> StoredFinding:
        """The finding, acknowledged; an earlier acknowledgement is replaced.

        Raises:
            AcknowledgeError: there is no such finding, or `by` or `reason` is empty or too long.
            StorageError: the database does not take it.
        """
        return self._write(
            finding_id,
            acknowledged_unix_ns=self._clock(),
            acknowledged_by=_checked("who", by, LONGEST_NAME),
            acknowledged_reason=_checked("the reason", reason, LONGEST_REASON),
        )

    def withdraw(self, finding_id: int) -> StoredFinding:
        """The finding as if nobody had acknowledged it.

        Raises: as `acknowledge`.
        """
        return self._write(finding_id, acknowledged_unix_ns=None, acknowledged_by=None, acknowledged_reason=None)

    def _write(self, finding_id: int, **values: object) -> StoredFinding:
        finding = schema.finding
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.update(finding).where(finding.c.id == finding_id).values(values))
                found = read_findings(connection, ids=[finding_id])
        except sa.exc.DBAPIError as error:
            where, reason = display_url(self._engine.url), " ".join(str(error.orig).split())
            raise StorageError(f"cannot acknowledge in database {where}: {reason}") from error
        if not found:
            raise AcknowledgeError(f"finding {finding_id} is unknown; `fp8scope findings` lists them")
        return found[0]


def _checked(what: str, text: str, longest: int) -> str:
    text = " ".join(text.split())
    if not text or len(text) > longest or not text.isprintable():
        raise AcknowledgeError(f"{what} is {text[:40]!r}; expected 1 to {longest:,} printable characters")
    return text
