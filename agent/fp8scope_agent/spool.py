"""What was recorded and is not yet at the collector, on disk: a folder of append-only segments for one source.

The training process appends (`SpoolWriter`), the sender process tails and forgets (`SpoolReader`); neither waits for
the other, and they share nothing but the folder:

    source.pb                  the serialised Open of the wire: who this is, and what its slots are
    00000000000000000001.seg   records; the file is named by the first sequence number in it
    acked                      everything up to this number is committed at the collector
    closed                     the writer has ended: nothing comes any more

A record is a header with its own checksum, then the payload with another. So a kill at any instant costs at most
the record that was being written, a flipped bit costs at most one record, and the reader counts what it had to
skip. Nobody appends to a file that an earlier process wrote: each process life has a folder of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

SEGMENT_BYTES = 8 << 20
SOURCE_FILE = "source.pb"
ACKED_FILE = "acked"
CLOSED_FILE = "closed"

STATS = 1
FINISH = 2

_MAGIC = b"f8s1"
_PREFIX = struct.Struct("<4sI")  # magic, CRC-32 of the rest of the header
_REST = struct.Struct("<IIIIQ")  # payload bytes, CRC-32 of the payload, rows, kind, seq
HEADER_BYTES = _PREFIX.size + _REST.size


@dataclass(frozen=True)
class Record:
    """One message of the source, a serialised ClientMessage; `rows` is what its loss would lose."""

    seq: int
    kind: int
    rows: int
    payload: bytes


@dataclass(frozen=True)
class Damaged:
    """Bytes that are no record any more; `rows` is exact where the header was readable, else 1."""

    rows: int


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
    return sum(_size(path) for path in _segments(folder, suffixes=(".seg", ".bad")))


@dataclass(frozen=True)
class Waiting:
    """What is in a spool and not acknowledged."""

    records: int
    rows: int


def waiting(folder: Path) -> Waiting:
    """What a sender would have to send; reads the whole spool."""
    acked_seq = read_acked(folder).seq
    items = [item for path in _segments(folder) for item in scan(path)]
    left = [item for item in items if isinstance(item, Record) and item.seq > acked_seq]
    return Waiting(len(left), sum(item.rows for item in left))


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
    """Appends the records of one process life; keeps the folder under `max_bytes` by giving up the oldest segments.

    `dropped_rows` counts what was given up. It may include the rows that the sender had in flight at that moment.
    """

    def __init__(self, folder: Path, *, max_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.folder = folder
        self.dropped_rows = 0
        self._max_bytes = max_bytes
        self._segment_bytes = min(segment_bytes, max_bytes // 4)
        self._file = -1
        self._size = 0

    def append(self, record: Record) -> None:
        """Write one record, so that it outlives this process.

        Raises:
            OSError: the disk refused it (full, gone). Nothing of it is left behind, and the next append may succeed.
        """
        data = _header(record) + record.payload
        if self._file >= 0 and self._size + len(data) > self._segment_bytes:
            self._close_segment()
        if self._file < 0:
            self._make_room(max(len(data), self._segment_bytes))
            self._file = _create(self.folder / f"{record.seq:020d}.seg")
            self._size = 0
        try:
            _write_all(self._file, data)
        except OSError:
            self._undo()
            raise
        self._size += len(data)

    def close(self) -> None:
        """Say that nothing comes any more.

        Raises:
            OSError: the disk refused it; the sender then waits for the end of the process.
        """
        self._close_segment()
        (self.folder / CLOSED_FILE).touch()

    def _close_segment(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _make_room(self, need_bytes: int) -> None:
        segments = _segments(self.folder, suffixes=(".seg", ".bad"))
        total_bytes = sum(_size(path) for path in segments)
        acked_seq = read_acked(self.folder).seq
        for path in segments:
            if total_bytes + need_bytes <= self._max_bytes:
                return
            total_bytes -= _size(path)
            lost = sum(item.rows or 1 for item in scan(path) if isinstance(item, Record) and item.seq > acked_seq)
            path.unlink(missing_ok=True)
            self.dropped_rows += lost

    def _undo(self) -> None:
        """Take back what a failed write left. Where even that fails, a new segment leaves the torn tail behind."""
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            self._close_segment()


@dataclass
class SpoolReader:
    """Reads one source's records in order, while they are still being written, and forgets what is acknowledged.

    A finished segment without one readable record is set aside as `*.bad`.
    """

    folder: Path
    _damaged_rows: dict[tuple[str, int], int] = field(default_factory=dict)  # by segment and offset
    _path: Path | None = None  # the segment that is being read
    _file: int = -1
    _offset: int = 0  # where in it the next record begins
    _good: int = 0  # records read from it
    _after: int = 0  # the last record handed out

    def seek(self, after_seq: int) -> None:
        """Let the next record be the first above `after_seq`."""
        self._after = after_seq
        starting = [path for path in _segments(self.folder) if _first_seq(path) <= after_seq + 1]
        self._enter(starting[-1] if starting else None)

    def next(self) -> Record | None:
        """The next record, or None where there is none yet."""
        while True:
            if self._path is None:
                self._enter(next(iter(_segments(self.folder)), None))
            if self._path is None:
                return None
            record = self._read()
            if record is None:
                # The order matters: the writer may have appended here just before it began the next segment.
                newer = self._newer()
                if newer is None:
                    return None
                record = self._read()
                if record is None:
                    self._leave(newer)
                    continue
            if record.seq > self._after:
                self._after = record.seq
                return record

    @property
    def damaged_rows(self) -> int:
        """Rows that could not be read: exact where a header was readable, else 1 for the record."""
        return sum(self._damaged_rows.values())

    def forget(self, acked: Acked) -> None:
        """Delete the segments that hold nothing above the acknowledged position, except the newest, and note it.

        Raises:
            OSError: the position could not be noted; it costs a resend that the collector recognises.
        """
        segments = _segments(self.folder)
        for path, newer in itertools.pairwise(segments):
            if _first_seq(newer) - 1 <= acked.seq:
                path.unlink(missing_ok=True)
        write_atomically(self.folder / ACKED_FILE, b"%d %d\n" % (acked.seq, acked.rows))

    def forget_all(self) -> None:
        """Delete all segments: the source is finished, and acknowledged to its end."""
        self._enter(None)
        for path in _segments(self.folder):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the segment that is being read."""
        self._enter(None)

    def _enter(self, path: Path | None) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._path, self._file, self._offset, self._good = None, -1, 0, 0
        if path is not None:
            try:
                self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return  # given up by the writer since we looked: the next call takes the next one
            self._path = path

    def _read(self) -> Record | None:
        try:
            if os.fstat(self._file).st_nlink == 0:
                return None  # given up by the writer, and counted there
            while True:
                item, end = _item_at(self._file, self._offset)
                if isinstance(item, Damaged):
                    self._note_damage(item.rows)
                self._offset = end
                if not isinstance(item, Damaged):
                    self._good += item is not None
                    return item
        except OSError:
            return None  # unreadable: set aside as soon as there is a newer one

    def _note_damage(self, rows: int) -> None:
        assert self._path is not None
        self._damaged_rows[self._path.name, self._offset] = rows

    def _newer(self) -> Path | None:
        assert self._path is not None
        return next((path for path in _segments(self.folder) if path.name > self._path.name), None)

    def _leave(self, newer: Path) -> None:
        path = self._path
        assert path is not None
        size = _size(path)
        if size > self._offset:
            self._note_damage(1)
        if size and not self._good:
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".bad"))
        self._enter(newer)


def scan(path: Path) -> Iterator[Record | Damaged]:
    """Everything in one segment, in order; a torn tail is left out."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        item, offset = _item_at(file, 0)
        while item is not None:
            yield item
            item, offset = _item_at(file, offset)
    except OSError:
        return
    finally:
        os.close(file)


def _item_at(file: int, offset: int) -> tuple[Record | Damaged | None, int]:
    """What stands at `offset`, and where the next begins; None where the file ends within it."""
    fields = _parse_header(os.pread(file, HEADER_BYTES, offset))
    if fields is not None:
        payload_bytes, payload_crc, rows, kind, seq = fields
        end = offset + HEADER_BYTES + payload_bytes
        payload = os.pread(file, payload_bytes, offset + HEADER_BYTES)
        if zlib.crc32(payload) == payload_crc and len(payload) == payload_bytes:
            return Record(seq, kind, rows, payload), end
    # Damaged or torn: it ends where the next intact header stands, whatever its own length says.
    rest = os.pread(file, os.fstat(file).st_size, offset)
    found = _next_header(rest)
    if found is not None:
        return Damaged(rows=(rows or 1) if fields is not None else 1), offset + found
    if fields is not None and len(payload) == payload_bytes:
        return Damaged(rows=rows or 1), end
    return None, offset


def _next_header(data: bytes) -> int | None:
    """Where after its first byte the next intact header stands."""
    found = data.find(_MAGIC, 1)
    while found >= 0:
        if _parse_header(data[found : found + HEADER_BYTES]) is not None:
            return found
        found = data.find(_MAGIC, found + 1)
    return None


def _header(record: Record) -> bytes:
    rest = _REST.pack(len(record.payload), zlib.crc32(record.payload), record.rows, record.kind, record.seq)
    return _PREFIX.pack(_MAGIC, zlib.crc32(rest)) + rest


def _parse_header(head: bytes) -> tuple[int, int, int, int, int] | None:
    """(payload bytes, payload CRC, rows, kind, seq), or None where this is no intact header."""
    if len(head) < HEADER_BYTES:
        return None
    magic, crc = _PREFIX.unpack_from(head)
    if magic != _MAGIC or zlib.crc32(head[_PREFIX.size :]) != crc:
        return None
    payload_bytes, payload_crc, rows, kind, seq = _REST.unpack_from(head, _PREFIX.size)
    return payload_bytes, payload_crc, rows, kind, seq


def _segments(folder: Path, suffixes: tuple[str, ...] = (".seg",)) -> list[Path]:
    """The segments, oldest first."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.stem.isdigit())
    except OSError:
        return []


def _first_seq(path: Path) -> int:
    return int(path.stem)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
