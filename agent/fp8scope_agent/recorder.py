"""From frames to the spool: numbers the records, opens the spool when the disk lets it, counts what it cannot keep."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fp8scope_protos.v1 import telemetry_pb2 as pb

from .encode import MAX_EXTRAS, MAX_HISTOGRAMS, MAX_ROWS, Encoder, StepHistograms, StepRows, finish_message
from .named import Named, split
from .notices import Drops, Notices
from .segments import FINISH, HISTOGRAMS, STATS, Record
from .spool import SOURCE_FILE, SpoolWriter, claim_folder, write_atomically

_RETRY_S = 5.0


class Recorder:
    """The writing end of one source. A disk that refuses is tried again, and costs rows that are counted."""

    def __init__(
        self,
        root: Path,
        open_message: pb.Open,
        *,
        max_bytes: int,
        drops: Drops,
        notices: Notices,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._open = open_message
        self._max_bytes = max_bytes
        self._drops = drops
        self._notices = notices
        self._clock = clock
        self._encoder = Encoder()
        self._writer: SpoolWriter | None = None
        self._next_try = float("-inf")
        self._dropped_by_writer = (0, 0)  # rows, histograms
        self.last_seq = 0
        self.rows_recorded = 0
        self.histograms_recorded = 0

    @property
    def folder(self) -> Path | None:
        """Where the spool is; None as long as the disk has refused it."""
        return self._writer.folder if self._writer is not None else None

    def prepare(self) -> None:
        """Open the spool if that works now, so that the run is known before its first step."""
        try:
            self._opened()
        except OSError as error:
            self._complain(error)

    def record(self, step: int, taken_unix_ns: int, rows: StepRows, scalars: Mapping[str, float]) -> None:
        """Append a step."""
        for start in range(0, max(len(rows.slot), 1), MAX_ROWS):
            part = rows.part(start, start + MAX_ROWS)
            self._record(step, taken_unix_ns, part, scalars if start == 0 else {}, ())

    def record_named(self, taken_unix_ns: int, values: Sequence[Named]) -> None:
        """Append what another library has said, of any steps."""
        groups, others = split(values)
        for step, rows in groups:
            self.record(step, taken_unix_ns, rows, {})
        for start in range(0, len(others), MAX_EXTRAS):
            self._record(0, taken_unix_ns, StepRows.none(), {}, others[start : start + MAX_EXTRAS])

    def record_histograms(self, step: int, taken_unix_ns: int, histograms: StepHistograms) -> None:
        """Append a step's histograms."""
        for start in range(0, len(histograms.slot), MAX_HISTOGRAMS):
            part = histograms.part(start, start + MAX_HISTOGRAMS)
            self.last_seq += 1
            payload = self._encoder.histograms(
                seq=self.last_seq,
                step=step,
                taken_unix_ns=taken_unix_ns,
                histograms=part,
                drops=self._drops.totals(),
            )
            if self._append(Record(self.last_seq, HISTOGRAMS, len(part.slot), payload)):
                self.histograms_recorded += len(part.slot)

    def record_config(self, taken_unix_ns: int, config_json: str) -> None:
        """Append the run's configuration, which has changed."""
        self._record(0, taken_unix_ns, StepRows.none(), {}, (), config_json)

    def _record(
        self,
        step: int,
        taken_unix_ns: int,
        rows: StepRows,
        scalars: Mapping[str, float],
        extras: Sequence[Named],
        config_json: str = "",
    ) -> None:
        self.last_seq += 1
        payload = self._encoder.stats(
            seq=self.last_seq,
            step=step,
            taken_unix_ns=taken_unix_ns,
            rows=rows,
            scalars=scalars,
            drops=self._drops.totals(),
            extras=[pb.Extra(step=each.step, slot=each.slot, name=each.name, value=each.value) for each in extras],
            config_json=config_json,
        )
        if self._append(Record(self.last_seq, STATS, len(rows.slot), payload)):
            self.rows_recorded += len(rows.slot)

    def finish(self, failure: str | None, last_step: int) -> bool:
        """Append the end and close the spool; whether the disk took it."""
        self.last_seq += 1
        payload = finish_message(
            seq=self.last_seq,
            finished_unix_ns=time.time_ns(),
            failure=failure,
            last_step=last_step,
            drops=self._drops.totals(),
        )
        written = self._append(Record(self.last_seq, FINISH, 0, payload))
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._complain(error)
        return written

    def _append(self, record: Record) -> bool:
        try:
            writer = self._opened()
            writer.append(record)
        except OSError as error:
            self._complain(error)
            if record.kind == HISTOGRAMS:
                self._drops.add_histograms("spool_error", record.rows)
            else:
                self._drops.add("spool_error", record.rows)
            return False
        self._count_what_the_writer_dropped(writer)
        return True

    def _count_what_the_writer_dropped(self, writer: SpoolWriter) -> None:
        rows, histograms = self._dropped_by_writer
        self._dropped_by_writer = writer.dropped_rows, writer.dropped_histograms
        if writer.dropped_histograms > histograms:
            self._drops.add_histograms("spool_full", writer.dropped_histograms - histograms)
            self._notices.warn(
                "spool_full_histograms",
                f"the spool {writer.folder} has reached {self._max_bytes >> 20} MiB: histograms are dropped, and "
                "counted, to keep the rows. Is the collector reachable? FP8SCOPE_SPOOL_BYTES allows more.",
            )
        if writer.dropped_rows > rows:
            self._drops.add("spool_full", writer.dropped_rows - rows)
            self._notices.warn(
                "spool_full",
                f"the spool {writer.folder} has reached {self._max_bytes >> 20} MiB: the oldest records are dropped, "
                "and counted. Is the collector reachable? FP8SCOPE_SPOOL_BYTES allows more.",
            )

    def _opened(self) -> SpoolWriter:
        if self._writer is not None:
            return self._writer
        if self._clock() < self._next_try:
            raise OSError("the spool folder could not be made a moment ago")
        self._next_try = self._clock() + _RETRY_S
        folder, incarnation = claim_folder(self._root, self._open.project, self._open.run, self._open.rank)
        self._open.incarnation = incarnation
        try:
            write_atomically(folder / SOURCE_FILE, self._open.SerializeToString())
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise
        self._writer = SpoolWriter(folder, max_bytes=self._max_bytes)
        return self._writer

    def _complain(self, error: OSError) -> None:
        self._notices.warn(
            "spool_error",
            f"the spool under {self._root} cannot be written ({error}): statistics are dropped, and counted, until it "
            "can. Free some space, or choose another place with spool_dir= or FP8SCOPE_SPOOL_DIR.",
        )
