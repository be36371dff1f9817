"""The spool keeps what it was given through kills, flipped bits, cut files and full disks, within its bound."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8scope_agent.segments import FINISH, HEADER_BYTES, HISTOGRAMS, ROWS_SUFFIX, STATS, Record, SegmentReader
from fp8scope_agent.spool import Acked, SpoolReader, SpoolWriter, claim_folder, read_acked, spool_bytes, waiting

LARGE = 1 << 30


def records(count: int, size: int = 40, first: int = 1) -> list[Record]:
    return [Record(seq, STATS, seq % 7, bytes([seq % 251]) * size) for seq in range(first, first + count)]


def histogram(record: Record) -> Record:
    return dataclasses.replace(record, kind=HISTOGRAMS)


def write(folder: Path, items: list[Record], *, segment_bytes: int = 1 << 20) -> SpoolWriter:
    writer = SpoolWriter(folder, max_bytes=LARGE, segment_bytes=segment_bytes)
    for item in items:
        writer.append(item)
    return writer


def read_all(folder: Path, after: int = 0) -> list[Record]:
    reader = SpoolReader(folder)
    reader.seek(after)
    return list(iter(reader.next, None))


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.seg"))


def test_records_come_back_in_order_with_everything_they_had(tmp_path: Path) -> None:
    items = [*records(50), Record(51, FINISH, 0, b"")]

    write(tmp_path, items, segment_bytes=500)

    assert len(segments(tmp_path)) > 3
    assert read_all(tmp_path) == items
    assert read_all(tmp_path, after=17) == items[17:]


def test_a_reader_follows_a_writer_across_segments(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, max_bytes=LARGE, segment_bytes=200)
    reader = SpoolReader(tmp_path)
    seen = []

    for item in records(30):
        assert reader.next() is None
        writer.append(item)
        seen.append(reader.next())

    assert seen == records(30)
    assert reader.damaged_rows == 0


def test_a_record_appended_just_before_the_next_segment_began_is_not_passed_over(tmp_path: Path) -> None:
    first, second, third = records(3, size=100)
    writer = SpoolWriter(tmp_path, max_bytes=LARGE, segment_bytes=2 * (HEADER_BYTES + 100))
    writer.append(first)

    class SlowReader(SegmentReader):
        def _newer(self) -> Path | None:  # between "nothing here" and "is there a newer one?"
            if len(segments(tmp_path)) == 1:
                writer.append(second)
                writer.append(third)
            return super()._newer()

    reader = SlowReader(tmp_path, ROWS_SUFFIX)

    assert [reader.next(), reader.next(), reader.next()] == [first, second, third]


@pytest.mark.parametrize("missing", [1, 10, 41, 42, 60])
def test_a_torn_tail_costs_only_the_record_that_was_being_written(tmp_path: Path, missing: int) -> None:
    write(tmp_path, records(10))
    (segment,) = segments(tmp_path)
    os.truncate(segment, segment.stat().st_size - missing)

    assert read_all(tmp_path) == records(9)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_costs_at_most_one_record_and_none_is_changed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = [*records(12, size=data.draw(st.integers(0, 60)))]
        write(folder, items, segment_bytes=300)
        segment = data.draw(st.sampled_from(segments(folder)))
        content = bytearray(segment.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
        segment.write_bytes(content)

        got = read_all(folder)

        assert len(got) >= len(items) - 1, (position, len(got))
        assert [item for item in got if item not in items] == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_piece_cut_out_or_pasted_over_costs_only_the_records_that_it_touched(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = records(12, size=30)
        write(folder, items)
        (segment,) = segments(folder)
        content = segment.read_bytes()
        size = HEADER_BYTES + 30
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 100))
        rubbish = data.draw(st.binary(max_size=50))
        segment.write_bytes(content[:start] + rubbish + content[start + length :])
        touched = {offset // size + 1 for offset in range(max(start - 1, 0), min(start + length + 1, len(content)))}

        got = read_all(folder)

        assert [item for item in items if item.seq not in touched and item not in got] == []
        assert [item for item in got if item not in items] == []


def test_what_is_damaged_is_counted_by_the_rows_that_its_header_names(tmp_path: Path) -> None:
    write(tmp_path, [Record(1, STATS, 1680, b"x" * 50), *records(3, first=2)])
    (segment,) = segments(tmp_path)
    content = bytearray(segment.read_bytes())
    content[HEADER_BYTES + 20] ^= 4
    segment.write_bytes(content)
    reader = SpoolReader(tmp_path)

    got = list(iter(reader.next, None))
    reader.seek(0)
    again = list(iter(reader.next, None))

    assert got == again == records(3, first=2)
    assert reader.damaged_rows == 1680


def test_a_segment_with_damage_is_set_aside_once_its_other_records_are_acknowledged(tmp_path: Path) -> None:
    write(tmp_path, records(9), segment_bytes=3 * (HEADER_BYTES + 40))
    damaged, sound, newest = segments(tmp_path)
    content = bytearray(damaged.read_bytes())
    content[HEADER_BYTES + 20] ^= 4
    damaged.write_bytes(content)
    reader = SpoolReader(tmp_path)

    got = [item.seq for item in iter(reader.next, None)]
    reader.forget(Acked(9, 0))

    assert got == [2, 3, 4, 5, 6, 7, 8, 9]
    assert sorted(path.name for path in tmp_path.iterdir() if path.stem.isdigit()) == [
        damaged.with_suffix(".bad").name,
        newest.name,
    ]
    assert not sound.exists()


def test_a_segment_without_a_readable_record_is_set_aside(tmp_path: Path) -> None:
    write(tmp_path, records(9), segment_bytes=3 * (HEADER_BYTES + 40))
    segments(tmp_path)[1].write_bytes(os.urandom(200))
    reader = SpoolReader(tmp_path)

    got = list(iter(reader.next, None))

    assert [item.seq for item in got] == [1, 2, 3, 7, 8, 9]
    assert [path.name for path in tmp_path.glob("*.bad")] == [f"{4:020d}.bad"]


def test_a_segment_that_cannot_be_read_at_all_is_not_fatal(tmp_path: Path) -> None:
    write(tmp_path, records(9), segment_bytes=3 * (HEADER_BYTES + 40))
    unreadable = segments(tmp_path)[1]
    unreadable.unlink()
    unreadable.mkdir()

    assert [item.seq for item in read_all(tmp_path)] == [1, 2, 3, 7, 8, 9]


def test_the_bound_holds_and_the_oldest_records_go_first(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, max_bytes=8000, segment_bytes=1000)
    items = records(500)

    largest = 0
    for item in items:
        writer.append(item)
        largest = max(largest, spool_bytes(tmp_path))

    left = read_all(tmp_path)
    assert largest <= 8000
    assert left == items[-len(left) :]
    assert writer.dropped_rows == sum(item.rows or 1 for item in items[: -len(left)])


def test_histograms_and_rows_are_read_in_the_order_of_their_numbers_while_they_are_written(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, max_bytes=LARGE, segment_bytes=300)
    reader = SpoolReader(tmp_path)
    items = [histogram(item) if item.seq % 3 == 0 else item for item in records(60)]
    seen = []

    for item in items:
        writer.append(item)
        if item.seq % 4 == 0:  # the reader is behind by up to four records of both kinds
            seen += list(iter(reader.next, None))

    assert seen == items
    assert read_all(tmp_path, after=31) == items[31:]


def test_a_record_of_the_other_series_that_came_while_the_reader_looked_is_not_passed_over(tmp_path: Path) -> None:
    """The rows are looked at before the histograms: what is written in between has a lower number than a histogram."""
    writer = SpoolWriter(tmp_path, max_bytes=LARGE, segment_bytes=1000)
    reader = SpoolReader(tmp_path)
    first, second, third = records(3)
    writer.append(first)
    assert reader.next() == first
    rows = reader._rows.reader
    real = rows.next

    def slow() -> Record | None:
        found = real()
        rows.next = real  # type: ignore[method-assign]
        writer.append(second)
        writer.append(histogram(third))
        return found

    rows.next = slow  # type: ignore[method-assign]

    assert [reader.next(), reader.next()] == [second, histogram(third)]


def test_where_room_is_short_histograms_go_before_rows_the_oldest_first(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, max_bytes=8000, segment_bytes=1000)
    items = [histogram(item) if item.seq <= 60 and item.seq % 2 else item for item in records(400)]

    for item in items[:60]:
        writer.append(item)
    before = read_all(tmp_path)
    for item in items[60:100]:
        writer.append(item)
    between = read_all(tmp_path)
    rows_dropped_between = writer.dropped_rows
    for item in items[100:]:
        writer.append(item)

    kept = [item for item in before if item.kind == HISTOGRAMS]
    still = [item for item in between if item.kind == HISTOGRAMS]
    assert before == items[:60]
    assert 0 < len(still) < len(kept)
    assert still == kept[-len(still) :]
    assert rows_dropped_between == 0
    assert [item for item in between if item.kind == STATS] == [item for item in items[:100] if item.kind == STATS]
    assert {item.kind for item in read_all(tmp_path)} == {STATS}
    assert writer.dropped_rows > 0
    assert writer.dropped_histograms == sum(item.rows or 1 for item in kept)


def test_a_new_histogram_never_costs_rows(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, max_bytes=8000, segment_bytes=1000)
    items = records(100)
    for item in items:
        writer.append(item)
    rows, dropped = read_all(tmp_path), writer.dropped_rows

    for item in records(100, first=101):
        writer.append(histogram(item))

    assert [item for item in read_all(tmp_path) if item.kind == STATS] == rows
    assert writer.dropped_rows == dropped
    assert spool_bytes(tmp_path) <= 8000
    assert writer.dropped_histograms > 0


def test_a_histogram_that_is_lost_or_damaged_costs_no_row(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, max_bytes=LARGE, segment_bytes=300)
    items = [histogram(item) if item.seq % 5 == 0 else item for item in records(100)]
    for item in items:
        writer.append(item)
    first, second = sorted(tmp_path.glob("*.hist"))[:2]
    content = bytearray(first.read_bytes())
    content[HEADER_BYTES + 3] ^= 1
    first.write_bytes(content)
    second.unlink()
    reader = SpoolReader(tmp_path)

    got = list(iter(reader.next, None))
    reader.forget(Acked(100, 0))

    assert [item for item in got if item.kind == STATS] == [item for item in items if item.kind == STATS]
    assert [item.seq for item in got] == sorted(item.seq for item in got)
    assert reader.damaged_rows == 0
    assert reader.damaged_histograms == (items[4].rows or 1)
    assert first.with_suffix(".bad").exists()


def test_rows_that_the_collector_has_are_not_counted_as_dropped(tmp_path: Path) -> None:
    per_segment = 10
    size = per_segment * (HEADER_BYTES + 40)
    writer = SpoolWriter(tmp_path, max_bytes=4 * size, segment_bytes=size)
    items = records(5 * per_segment)
    for item in items[:20]:
        writer.append(item)
    SpoolReader(tmp_path).forget(Acked(15, 0))  # in the middle of the second segment

    for item in items[20:]:
        writer.append(item)
    for item in records(per_segment, first=51):  # the second segment has to go
        writer.append(item)

    assert [int(path.stem) for path in segments(tmp_path)] == [21, 31, 41, 51]
    assert writer.dropped_rows == sum(item.rows or 1 for item in items[15:20])


def test_a_reader_whose_segment_is_given_up_goes_on_with_the_next(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, max_bytes=4000, segment_bytes=1000)
    reader = SpoolReader(tmp_path)
    for item in records(5):
        writer.append(item)
    first = reader.next()

    for item in records(100, first=6):
        writer.append(item)
    rest = list(iter(reader.next, None))

    assert first == records(1)[0]
    assert rest == records(100, first=6)[-len(rest) :]
    assert 105 - len(rest) > 20


def test_acknowledged_segments_are_deleted_and_the_position_is_kept(tmp_path: Path) -> None:
    write(tmp_path, records(30), segment_bytes=500)
    reader = SpoolReader(tmp_path)

    reader.forget(Acked(20, 55))

    assert read_acked(tmp_path) == Acked(20, 55)
    assert [item.seq for item in read_all(tmp_path, after=20)] == list(range(21, 31))
    assert min(int(path.stem) for path in segments(tmp_path)) > 14
    assert waiting(tmp_path).records == 10


@pytest.mark.parametrize("content", ["", "seven 3", "12", "\0\0\0\0"])
def test_a_damaged_position_means_the_beginning(tmp_path: Path, content: str) -> None:
    (tmp_path / "acked").write_text(content)

    assert read_acked(tmp_path) == Acked(0, 0)


def test_a_disk_that_fills_up_within_a_record_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = write(tmp_path, records(2))
    real = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 10:
            return real(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.append(Record(3, STATS, 1, b"lost"))
    writer.append(Record(4, STATS, 1, b"kept"))

    assert [item.seq for item in read_all(tmp_path)] == [1, 2, 4]


def test_each_process_life_has_a_folder_and_a_number_of_its_own(tmp_path: Path) -> None:
    folders = [claim_folder(tmp_path, "p", "r", 3) for _ in range(3)]
    shutil.rmtree(folders[0][0])
    again = claim_folder(tmp_path, "p", "r", 3)

    assert [incarnation for _, incarnation in [*folders, again]] == [1, 2, 3, 4]
    assert claim_folder(tmp_path, "p", "r", 4)[1] == 1


@pytest.mark.parametrize(
    "name", ["..", ".", "/etc/passwd", "a/../../b", "CON", "x" * 200, "日本語" * 60, "-rf", "a\\b", "%2E", "~", "a+b"]
)
def test_a_hostile_run_name_stays_inside_the_spool(tmp_path: Path, name: str) -> None:
    folder, _ = claim_folder(tmp_path / "spool", "", name, 0)
    other, _ = claim_folder(tmp_path / "spool", name, "run", 0)

    assert folder.resolve().is_relative_to((tmp_path / "spool").resolve())
    assert len(folder.relative_to(tmp_path / "spool").parts) == 3
    assert folder.parent != other.parent


def test_different_names_never_share_a_folder(tmp_path: Path) -> None:
    names = [
        ("", "a+b"),
        ("a", "b"),
        ("", "a%2Bb"),
        ("", "x" * 150),
        ("", "x" * 151),
        ("", "."),
        ("", "%2E"),
        ("", "a b"),
    ]

    folders = {claim_folder(tmp_path, project, run, 0)[0] for project, run in names}

    assert len(folders) == len(names)
