"""What the collector has, and what it gets next: the sender's position in a spool, across connections.

A `Stream` is one connection and knows the wire; this outlives it. Exactly once rests on three facts: the sequence
numbers are the agent's, the collector says at each connection up to which it has committed, and nothing is
forgotten before it is acknowledged.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from .segments import FINISH, HISTOGRAMS, Record
from .spool import Acked, SpoolReader, read_acked

DEFAULT_WINDOW = 8
_REFUSED_FILES = 16


class Delivery:
    """The position of one source: `acked` is committed, `pending` is under way, the rest waits in the spool."""

    def __init__(self, folder: Path, *, refused_seqs: tuple[int, ...] = (), dropped_rows: Mapping[str, int]) -> None:
        self.acked = read_acked(folder)
        self.pending: deque[Record] = deque()
        self.refused_seqs = list(refused_seqs)
        self.finished = False
        self._folder = folder
        self._reader = SpoolReader(folder)
        self._dropped_rows = dict(dropped_rows)
        self._window = DEFAULT_WINDOW
        self._one_at_a_time_to = 0
        self._takes_histograms = True
        self._passed_over_to = 0
        self._next: Record | None = None

    @property
    def dropped_rows(self) -> dict[str, int]:
        """Rows that were spooled but cannot be delivered, by reason."""
        totals = {**self._dropped_rows}
        damaged = {
            "spool_damaged": self._reader.damaged_rows,
            "spool_damaged_histograms": self._reader.damaged_histograms,
        }
        return {**totals, **{reason: max(rows, totals.get(reason, 0)) for reason, rows in damaged.items() if rows}}

    def set_window(self, batches: int) -> None:
        """How many records may be unacknowledged, as the collector says."""
        self._window = batches

    def resume(self, up_to_seq: int, *, takes_histograms: bool = True) -> None:
        """Begin a connection: the collector has committed everything up to `up_to_seq`, and may know no histograms."""
        self.pending.clear()
        self._takes_histograms = takes_histograms
        self._reader.seek(min(self.acked.seq, up_to_seq))
        self._next = self._reader.next()
        while self._next is not None and self._next.seq <= up_to_seq:
            self._count(self._next)
            self._next = self._reader.next()

    def take(self) -> Record | None:
        """The next record to send, now pending; None where there is none, or the window is full."""
        if not self.more() or self._next is None or len(self.pending) >= self._window_for(self._next):
            return None
        record, self._next = self._next, None
        self.pending.append(record)
        return record

    def more(self) -> bool:
        """Whether there is a record to send, now or when the window has room."""
        while self._next is None or self._next.seq in self.refused_seqs or self._pass_over(self._next):
            self._next = self._reader.next()
            if self._next is None:
                return False
        return True

    def acknowledge(self, up_to_seq: int) -> None:
        """The collector has committed everything up to `up_to_seq`."""
        while self.pending and self.pending[0].seq <= up_to_seq:
            self._count(self.pending.popleft())

    def save(self) -> None:
        """Note the position on disk and delete what is not needed any more."""
        with contextlib.suppress(OSError):  # costs a resend, which the collector recognises
            self._reader.forget(self.acked)
        if self.finished:
            self._reader.forget_all()

    def refuse(self, *, sure: bool = True) -> Record | None:
        """The collector refused something that is pending: the record that it was, set aside, or None.

        With several pending nobody knows which it was: they are sent one at a time from now on, until they are
        through. `sure` is False where the same record deserves another try.
        """
        if len(self.pending) != 1:
            self._one_at_a_time_to = max([self._one_at_a_time_to, *(record.seq for record in self.pending)])
            return None
        record = self.pending[0]
        if not sure:
            return None
        self.refused_seqs.append(record.seq)
        self._drop("refused", record)
        if len(self.refused_seqs) <= _REFUSED_FILES:
            with contextlib.suppress(OSError):
                (self._folder / f"refused-{record.seq}.pb").write_bytes(record.payload)
        return record

    def _pass_over(self, record: Record) -> bool:
        """Whether it is a histogram and this collector knows none: the rows are worth more than waiting for another."""
        if self._takes_histograms or record.kind != HISTOGRAMS:
            return False
        if record.seq > self._passed_over_to:
            self._passed_over_to = record.seq
            self._drop("not_taken", record)
        return True

    def _drop(self, reason: str, record: Record) -> None:
        if record.kind == HISTOGRAMS:
            reason += "_histograms"
        self._dropped_rows[reason] = self._dropped_rows.get(reason, 0) + (record.rows or 1)

    def _window_for(self, record: Record) -> int:
        return 1 if record.seq <= self._one_at_a_time_to else self._window

    def _count(self, record: Record) -> None:
        if record.seq > self.acked.seq:
            self.acked = Acked(record.seq, self.acked.rows + (record.rows if record.kind != HISTOGRAMS else 0))
        self.finished |= record.kind == FINISH
