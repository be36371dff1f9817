"""Segments: append-only files of self-checking records, and following them while they are written.

A record is a header with its own checksum, then the payload with another. So a kill at any instant costs at most the
record that was being written, a flipped bit costs at most one record, and the reader counts what it had to skip.

The segments of a folder form two series, told apart by their suffix: rows (`.seg`) and histograms (`.hist`). Each file
is named by the first sequence number in it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

STATS = 1
FINISH = 2
HISTOGRAMS = 3

ROWS_SUFFIX = ".seg"
HISTOGRAMS_SUFFIX = ".hist"
BAD_SUFFIX = ".bad"  # set aside: nothing in it can be read

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


@dataclass
class SegmentReader:
    """Reads one series of a folder in order, while it is still being written, and deletes what is acknowledged.

    A segment in which something could not be read is salvaged record by record, and in the end set aside as `*.bad`
    instead of deleted.
    """

    folder: Path
    suffix: str
    _damaged_rows: dict[tuple[str, int], int] = field(default_factory=dict)  # by segment and offset
    _path: Path | None = None  # the segment that is being read
    _file: int = -1
    _offset: int = 0  # where in it the next record begins
    _good: int = 0  # records read from it
    _after: int = 0  # the last record handed out

    def seek(self, after_seq: int) -> None:
        """Let the next record be the first above `after_seq`."""
        self._after = after_seq
        series = segments(self.folder, self.suffix)
        starting = [path for path in series if first_seq(path) <= after_seq + 1]
        self._enter(starting[-1] if starting else None)

    def next(self) -> Record | None:
        """The next record, or None where there is none yet."""
        while True:
            if self._path is None:
                self._enter(next(iter(segments(self.folder, self.suffix)), None))
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

    def forget(self, up_to_seq: int) -> None:
        """Delete the segments that hold nothing above `up_to_seq`, except the newest."""
        for path, newer in itertools.pairwise(segments(self.folder, self.suffix)):
            if first_seq(newer) - 1 <= up_to_seq:
                self._delete(path)

    def forget_all(self) -> None:
        """Delete all segments."""
        self._enter(None)
        for path in segments(self.folder, self.suffix):
            self._delete(path)

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
        return next((path for path in segments(self.folder, self.suffix) if path.name > self._path.name), None)

    def _leave(self, newer: Path) -> None:
        path = self._path
        assert path is not None
        size = segment_size(path)
        if size > self._offset:
            self._note_damage(1)
        if size and not self._good:
            _set_aside(path)
        self._enter(newer)

    def _delete(self, path: Path) -> None:
        if any(name == path.name for name, _ in self._damaged_rows):
            _set_aside(path)
        else:
            path.unlink(missing_ok=True)


def _set_aside(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rename(path.with_suffix(BAD_SUFFIX))


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


def serialise(record: Record) -> bytes:
    """The record as it stands in a segment."""
    rest = _REST.pack(len(record.payload), zlib.crc32(record.payload), record.rows, record.kind, record.seq)
    return _PREFIX.pack(_MAGIC, zlib.crc32(rest)) + rest + record.payload


def _parse_header(head: bytes) -> tuple[int, int, int, int, int] | None:
    """(payload bytes, payload CRC, rows, kind, seq), or None where this is no intact header."""
    if len(head) < HEADER_BYTES:
        return None
    magic, crc = _PREFIX.unpack_from(head)
    if magic != _MAGIC or zlib.crc32(head[_PREFIX.size :]) != crc:
        return None
    payload_bytes, payload_crc, rows, kind, seq = _REST.unpack_from(head, _PREFIX.size)
    return payload_bytes, payload_crc, rows, kind, seq


def segments(folder: Path, *suffixes: str) -> list[Path]:
    """The segments of these series, oldest first."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.stem.isdigit())
    except OSError:
        return []


def first_seq(path: Path) -> int:
    """The number of the first record that was written to this segment."""
    return int(path.stem)


def segment_size(path: Path) -> int:
    """Its bytes; 0 where it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
