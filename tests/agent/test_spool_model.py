"""Any order of writing, reading, acknowledging, restarting and filling up: the spool agrees with a list in memory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fp8scope_agent.segments import HISTOGRAMS, STATS, Record
from fp8scope_agent.spool import Acked, SpoolReader, SpoolWriter, read_acked, spool_bytes

MAX_BYTES = 2000
KINDS = (STATS, STATS, HISTOGRAMS)


class SpoolMachine(RuleBasedStateMachine):
    """`written` is every record in order; `read` those that the reader handed out since it last sought."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.writer = SpoolWriter(self.folder, max_bytes=MAX_BYTES, segment_bytes=400)
        self.reader = SpoolReader(self.folder)
        self.written: list[Record] = []
        self.position = 0  # number of the last record that was read or sought
        self.gone: set[int] = set()  # given up by the writer, as its count says

    @rule(size=st.integers(0, 300), gap=st.integers(1, 3), rows=st.integers(1, 50), kind=st.sampled_from(KINDS))
    def append(self, size: int, gap: int, rows: int, kind: int) -> None:
        seq = (self.written[-1].seq if self.written else 0) + gap
        record = Record(seq, kind, rows, bytes([seq % 256]) * size)
        before = self.writer.dropped_rows, self.writer.dropped_histograms
        self.writer.append(record)
        self.written.append(record)
        lost = {STATS: self.writer.dropped_rows - before[0], HISTOGRAMS: self.writer.dropped_histograms - before[1]}
        acked_seq = read_acked(self.folder).seq
        for old in self.written:  # of each kind the oldest go first, and a histogram that finds no room goes itself
            if lost[old.kind] > 0 and old.seq not in self.gone and old.seq > acked_seq:
                self.gone.add(old.seq)
                lost[old.kind] -= old.rows
        assert lost == {STATS: 0, HISTOGRAMS: 0}
        rows_left = [item for item in self.written if item.kind == STATS and item.seq not in self.gone]
        if any(item.kind == STATS and item.seq in self.gone for item in self.written) and kind == STATS:
            last_gone = max(item.seq for item in self.written if item.kind == STATS and item.seq in self.gone)
            assert all(item.seq > last_gone or item.seq <= acked_seq for item in rows_left)

    @rule()
    def read(self) -> None:
        record = self.reader.next()
        left = [item for item in self.written if item.seq > self.position and item.seq not in self.gone]
        if record is None:
            assert left == []
            return
        # A record that the writer gave up may still be read from a segment that is open: only the order is certain.
        assert record in self.written
        assert record == left[0] or record.seq in self.gone
        self.position = record.seq

    @precondition(lambda self: self.position > read_acked(self.folder).seq)
    @rule()
    def acknowledge(self) -> None:
        self.reader.forget(Acked(self.position, 0))

    @rule()
    def restart_the_sender(self) -> None:
        self.reader.close()
        self.reader = SpoolReader(self.folder)
        self.position = read_acked(self.folder).seq
        self.reader.seek(self.position)

    @invariant()
    def the_bound_holds(self) -> None:
        assert spool_bytes(self.folder) <= MAX_BYTES

    @invariant()
    def nothing_is_damaged(self) -> None:
        assert self.reader.damaged_rows == 0

    def teardown(self) -> None:
        self.reader.close()
        shutil.rmtree(self.folder)


TestSpool = SpoolMachine.TestCase
TestSpool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
