"""What was recorded and is not yet at the collector, on disk: a folder of segments for one source.

The training process appends (`SpoolWriter`), the sender process tails and forgets (`SpoolReader`); neither waits for
the other, and they share nothing but the folder:

    source.pb                  the serialised Open of the wire: who this is, and what its slots are
    00000000000000000001.seg   records of rows, scalars and the end (see `segments`)
    00000000000000000034.hist  records of histograms, which are large and worth less: they go first when room is short
    acked                      everything up to this number is committed at the collector
    closed                     the writer has ended: nothing comes any more

All records of a source are numbered in one sequence, and written and read in its order, whichever series they are in.
Nobody appends to a file that an earlier process wrote: each process life has a folder of its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from .segments import (
    BAD_SUFFIX,
    HISTOGRAMS,
    HISTOGRAMS_SUFFIX,
    ROWS_SUFFIX,
    Record,
    SegmentReader,
    scan,
    segment_size,
    segments,
    serialise,
)

SEGMENT_BYTES = 8 << 20
SOURCE_FILE = "source.pb"
ACKED_FILE = "acked"
CLOSED_FILE = "closed"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader sees the old content or the new, never a part.

    Raises:
        OSError: the disk refused it; the old content is still there.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Acked:
    """Everything up to `seq` is committed at the collector, `rows` rows of it since the source began."""

    seq: int = 0
    rows: int = 0


def read_acked(folder: Path) -> Acked:
    """The acknowledged position; the beginning where nothing is known."""
    try:
        seq, rows = (folder / ACKED_FILE).read_text().split()
        return Acked(int(seq), int(rows))
    except (OSError, ValueError):
        return Acked()


def spool_bytes(folder: Path) -> int:
    """What the segments of `folder` take on disk."""
    return sum(segment_size(path) for path in segments(folder, ROWS_SUFFIX, HISTOGRAMS_SUFFIX, BAD_SUFFIX))


@dataclass(frozen=True)
class Waiting:
    """What is in a spool and not acknowledged."""

    records: int
    rows: int
    histograms: int


def waiting(folder: Path) -> Waiting:
    """What a sender would have to send; reads the whole spool."""
    acked_seq = read_acked(folder).seq
    paths = segments(folder, ROWS_SUFFIX, HISTOGRAMS_SUFFIX)
    left = [(record.kind, record.rows) for path in paths for record in _above(path, acked_seq)]
    rows = sum(rows for kind, rows in left if kind != HISTOGRAMS)
    return Waiting(len(left), rows, histograms=sum(rows for _, rows in left) - rows)


def claim_folder(root: Path, project: str, run: str, rank: int) -> tuple[Path, int]:
    """A new, empty folder for this process life, and its incarnation: one above the highest there.

    Raises:
        OSError: the folder cannot be made.
    """
    name = "+".join(_safe_name(part) for part in (project, run) if part)
    parent = root / name / f"rank-{rank}"
    parent.mkdir(parents=True, exist_ok=True)
    incarnation = max((int(path.name) for path in parent.iterdir() if path.name.isdigit()), default=0) + 1
    while True:
        folder = parent / str(incarnation)
        try:
            folder.mkdir()
        except FileExistsError:
            incarnation += 1
        else:
            return folder, incarnation


def _safe_name(text: str) -> str:
    """`text` as a file name: readable where it is harmless, and different texts stay different."""
    name = quote(text, safe="")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) <= 100:
        return name
    return name[:80] + "~" + hashlib.sha256(text.encode()).hexdigest()[:16]


class SpoolWriter:
    """Appends the records of one process life, and keeps the folder under `max_bytes`.

    Where room is short the oldest segments of histograms are given up first, then the oldest segments of rows; a new
    histogram never costs rows, and is itself given up instead. `dropped_rows` and `dropped_histograms` count what was;
    they may include what the sender had in flight at that moment.
    """

    def __init__(self, folder: Path, *, max_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.folder = folder
        self.dropped_rows = 0
        self.dropped_histograms = 0
        self._max_bytes = max_bytes
        self._segment_bytes = min(segment_bytes, max_bytes // 4)
        self._open: dict[str, _OpenSegment] = {}  # by suffix

    def append(self, record: Record) -> None:
        """Write one record, so that it outlives this process.

        Raises:
            OSError: the disk refused it (full, gone). Nothing of it is left behind, and the next append may succeed.
        """
        data = serialise(record)
        suffix = HISTOGRAMS_SUFFIX if record.kind == HISTOGRAMS else ROWS_SUFFIX
        segment = self._open.get(suffix)
        if segment is not None and segment.size + len(data) > self._segment_bytes:
            self._close_segment(suffix)
            segment = None
        if segment is None:
            if not self._make_room(max(len(data), self._segment_bytes), for_rows=suffix == ROWS_SUFFIX):
                self.dropped_histograms += record.rows or 1
                return
            path = self.folder / f"{record.seq:020d}{suffix}"
            segment = self._open[suffix] = _OpenSegment(path, _create(path))
        try:
            _write_all(segment.file, data)
        except OSError:
            self._undo(suffix, segment)
            raise
        segment.size += len(data)

    def close(self) -> None:
        """Say that nothing comes any more.

        Raises:
            OSError: the disk refused it; the sender then waits for the end of the process.
        """
        for suffix in list(self._open):
            self._close_segment(suffix)
        (self.folder / CLOSED_FILE).touch()

    def _close_segment(self, suffix: str) -> None:
        os.close(self._open.pop(suffix).file)

    def _make_room(self, need_bytes: int, *, for_rows: bool) -> bool:
        """Delete until `need_bytes` more fit beside what the open segments may grow to; whether that was possible."""
        total_bytes = need_bytes + spool_bytes(self.folder)
        total_bytes += sum(max(self._segment_bytes - segment.size, 0) for segment in self._open.values())
        acked_seq = read_acked(self.folder).seq
        victims = segments(self.folder, BAD_SUFFIX) + segments(self.folder, HISTOGRAMS_SUFFIX)
        victims += segments(self.folder, ROWS_SUFFIX) if for_rows else []
        for path in victims:
            if total_bytes <= self._max_bytes:
                return True
            open_segment = self._open.get(path.suffix)
            if open_segment is not None and open_segment.path == path:
                total_bytes -= max(self._segment_bytes, open_segment.size)
                self._close_segment(path.suffix)
            else:
                total_bytes -= segment_size(path)
            lost = [(record.kind, record.rows or 1) for record in _above(path, acked_seq)]
            path.unlink(missing_ok=True)
            self.dropped_rows += sum(rows for kind, rows in lost if kind != HISTOGRAMS)
            self.dropped_histograms += sum(rows for kind, rows in lost if kind == HISTOGRAMS)
        return for_rows or total_bytes <= self._max_bytes

    def _undo(self, suffix: str, segment: _OpenSegment) -> None:
        """Take back what a failed write left. Where even that fails, a new segment leaves the torn tail behind."""
        try:
            os.ftruncate(segment.file, segment.size)
        except OSError:
            self._close_segment(suffix)


@dataclass
class _OpenSegment:
    path: Path
    file: int
    size: int = 0


class SpoolReader:
    """Reads one source's records in the order of their numbers, while they are being written, and forgets them.

    `damaged_rows` and `damaged_histograms` count what could not be read: exact where a header was readable, else 1
    for the record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows = _Series(SegmentReader(folder, ROWS_SUFFIX))
        self._histograms = _Series(SegmentReader(folder, HISTOGRAMS_SUFFIX))
        self._after = 0  # the last record handed out

    @property
    def damaged_rows(self) -> int:
        """Rows that could not be read."""
        return self._rows.damaged

    @property
    def damaged_histograms(self) -> int:
        """Histograms that could not be read."""
        return self._histograms.damaged

    def seek(self, after_seq: int) -> None:
        """Let the next record be the first above `after_seq`."""
        self._after = after_seq
        for series in (self._rows, self._histograms):
            series.seek(after_seq)

    def next(self) -> Record | None:
        """The next record, or None where there is none yet."""
        both = (self._rows, self._histograms)
        for series in both:
            series.look(self._after)
        # The order matters: what was written before the one head may have come to the other series since we looked.
        for series in both:
            series.look(self._after)
        ready = [series for series in both if series.head is not None]
        if not ready:
            return None
        record = min(ready, key=_head_seq).take()
        self._after = record.seq
        return record

    def forget(self, acked: Acked) -> None:
        """Delete the segments that hold nothing above the acknowledged position, and note it.

        Raises:
            OSError: the position could not be noted; it costs a resend that the collector recognises.
        """
        for series in (self._rows, self._histograms):
            series.reader.forget(acked.seq)
        write_atomically(self.folder / ACKED_FILE, b"%d %d\n" % (acked.seq, acked.rows))

    def forget_all(self) -> None:
        """Delete all segments: the source is finished, and acknowledged to its end."""
        for series in (self._rows, self._histograms):
            series.reader.forget_all()

    def close(self) -> None:
        """Close the segments that are being read."""
        for series in (self._rows, self._histograms):
            series.reader.close()


@dataclass
class _Series:
    """One series and its next record, which is looked at before it is its turn."""

    reader: SegmentReader
    head: Record | None = None
    late: int = 0  # what could not be read when it was its turn, and can be read now that it is too late

    @property
    def damaged(self) -> int:
        return self.reader.damaged_rows + self.late

    def seek(self, after_seq: int) -> None:
        self.head = None
        self.reader.seek(after_seq)

    def look(self, after_seq: int) -> None:
        while self.head is None:
            self.head = self.reader.next()
            if self.head is None:
                return
            if self.head.seq <= after_seq:
                self.late += self.head.rows or 1
                self.head = None

    def take(self) -> Record:
        record = self.head
        assert record is not None
        self.head = None
        return record


def _head_seq(series: _Series) -> int:
    assert series.head is not None
    return series.head.seq


def _above(path: Path, seq: int) -> Iterable[Record]:
    """What can be read in one segment and has a number above `seq`."""
    return (item for item in scan(path) if isinstance(item, Record) and item.seq > seq)


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
