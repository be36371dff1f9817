"""One step's rows, scalars and histograms as messages of the wire: little-endian columns, zstd, a checksum.

Columns as `bytes` encode at more than 100 million rows a second; one message a row, or `repeated float`, at about
one. A slot that nothing was written to has no row.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

from fp8core.records import FIELDS, decode_arena
from fp8scope_protos.v1 import telemetry_pb2 as pb

# A batch stays far below the 4 MiB that a gRPC server accepts by default: a row takes 80 bytes.
MAX_ROWS = 8192
MAX_HISTOGRAMS = 1024  # of up to 2 kB each
MAX_EXTRAS = 4096  # about 40 bytes each
ZSTD_LEVEL = -7  # a third of the time of level 1 at both ends, for a quarter more bytes (docs/adr/0085)

_BINS = 256
_WIRE_DTYPE = {"float32": "<f4", "float64": "<f8", "uint64": "<u8"}


@dataclass(frozen=True)
class StepRows:
    """The rows of one step: `slot` [n], ascending, and one array [n] for each field that is known."""

    slot: npt.NDArray[np.int64]
    columns: Mapping[str, npt.NDArray[np.generic]]

    @classmethod
    def none(cls) -> StepRows:
        """No rows."""
        return cls(np.empty(0, np.int64), {})

    def of(self, slots: npt.NDArray[np.bool_]) -> StepRows:
        """The rows of these slots, bool [slots of the source]."""
        wanted = slots[self.slot]
        if wanted.all():
            return self
        return StepRows(self.slot[wanted], {name: column[wanted] for name, column in self.columns.items()})

    def part(self, start: int, stop: int) -> StepRows:
        """The rows from `start` to `stop`."""
        return StepRows(self.slot[start:stop], {name: column[start:stop] for name, column in self.columns.items()})


@dataclass(frozen=True)
class StepHistograms:
    """The histograms of one step: `slot` [n], ascending, and `counts` int64 [n, 256], none of them empty."""

    slot: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    def of(self, slots: npt.NDArray[np.bool_]) -> StepHistograms:
        """The histograms of these slots, bool [slots of the source]."""
        wanted = slots[self.slot]
        return StepHistograms(self.slot[wanted], self.counts[wanted])

    def part(self, start: int, stop: int) -> StepHistograms:
        """The histograms from `start` to `stop`."""
        return StepHistograms(self.slot[start:stop], self.counts[start:stop])


def decode_histograms(
    counts: list[npt.NDArray[np.int64]], slots_of: tuple[npt.NDArray[np.int64], ...]
) -> StepHistograms:
    """The histograms of all arenas of a step that something was counted in, in the order of the slots."""
    slot = np.concatenate([np.empty(0, np.int64), *slots_of])
    together = np.concatenate([np.empty((0, _BINS), np.int64), *counts])
    order = np.argsort(slot, kind="stable")
    order = order[np.any(together != 0, axis=1)[order]]
    return StepHistograms(slot[order], together[order])


def decode_step(words: list[npt.NDArray[np.int64]], slots_of: tuple[npt.NDArray[np.int64], ...]) -> StepRows:
    """The written rows of all arenas of a step, in the order of the slots."""
    parts = [decode_arena(arena_words) for arena_words in words]
    if len(parts) == 1:  # the usual case; its slots ascend already
        return StepRows(slots_of[0][parts[0].slot], parts[0].columns)
    slot = np.concatenate([[], *(slots[part.slot] for slots, part in zip(slots_of, parts, strict=True))]).astype(int)
    order = np.argsort(slot, kind="stable")
    columns = {
        field.name: np.concatenate([np.empty(0, field.dtype), *(part.columns[field.name] for part in parts)])[order]
        for field in FIELDS
    }
    return StepRows(slot[order], columns)


class Encoder:
    """Makes the messages of one source. Not for several threads."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)

    def stats(
        self,
        *,
        seq: int,
        step: int,
        taken_unix_ns: int,
        rows: StepRows,
        scalars: Mapping[str, float],
        drops: Mapping[str, int],
        extras: Sequence[pb.Extra] = (),
        config_json: str = "",
    ) -> bytes:
        """A serialised ClientMessage with these rows, which may be none."""
        batch = pb.StatsBatch(
            seq=seq,
            sent_unix_ns=taken_unix_ns,
            rows=len(rows.slot),
            compression=pb.COMPRESSION_NONE,
            scalars=[pb.Scalar(step=step, name=name, value=value) for name, value in scalars.items()],
            drops=drop_messages(drops),
            extras=extras,
            config_json=config_json,
        )
        if len(rows.slot):
            columns = _columns(step, rows)
            batch.compression = pb.COMPRESSION_ZSTD
            batch.columns_bytes = len(columns)
            batch.columns_crc32 = zlib.crc32(columns)
            batch.columns = self._compressor.compress(columns)
        return pb.ClientMessage(stats=batch).SerializeToString()

    def histograms(
        self, *, seq: int, step: int, taken_unix_ns: int, histograms: StepHistograms, drops: Mapping[str, int]
    ) -> bytes:
        """A serialised ClientMessage with these histograms."""
        columns = _histogram_columns(step, histograms)
        batch = pb.HistogramBatch(
            seq=seq,
            sent_unix_ns=taken_unix_ns,
            rows=len(histograms.slot),
            compression=pb.COMPRESSION_ZSTD,
            columns_bytes=len(columns),
            columns_crc32=zlib.crc32(columns),
            columns=self._compressor.compress(columns),
            drops=drop_messages(drops),
        )
        return pb.ClientMessage(histograms=batch).SerializeToString()


def finish_message(
    *, seq: int, finished_unix_ns: int, failure: str | None, last_step: int, drops: Mapping[str, int]
) -> bytes:
    """A serialised ClientMessage that ends the source; `failure` is the exception that ended the job, if one did."""
    finish = pb.Finish(
        seq=seq,
        finished_unix_ns=finished_unix_ns,
        outcome=pb.OUTCOME_FINISHED if failure is None else pb.OUTCOME_FAILED,
        message=failure or "",
        last_step=last_step,
        drops=drop_messages(drops),
    )
    return pb.ClientMessage(finish=finish).SerializeToString()


def drop_messages(drops: Mapping[str, int]) -> list[pb.Drop]:
    """Running totals as the wire has them."""
    return [pb.Drop(reason=reason, rows=rows) for reason, rows in sorted(drops.items())]


def _columns(step: int, rows: StepRows) -> bytes:
    columns = pb.StatsColumns(
        step=np.full(len(rows.slot), step, "<u8").tobytes(),
        slot=rows.slot.astype("<u4").tobytes(),
    )
    for field in FIELDS:
        if field.name not in rows.columns:
            continue
        setattr(columns, field.name, rows.columns[field.name].astype(_WIRE_DTYPE[field.dtype]).tobytes())
    return columns.SerializeToString()


def _histogram_columns(step: int, histograms: StepHistograms) -> bytes:
    used = histograms.counts != 0
    first = used.argmax(axis=1)
    end = np.where(used.any(axis=1), _BINS - used[:, ::-1].argmax(axis=1), first)
    bins = np.arange(_BINS)
    inside = (bins >= first[:, None]) & (bins < end[:, None])
    return pb.HistogramColumns(
        step=np.full(len(histograms.slot), step, "<u8").tobytes(),
        slot=histograms.slot.astype("<u4").tobytes(),
        first_bin=first.astype("u1").tobytes(),
        bins=(end - first).astype("<u2").tobytes(),
        counts=histograms.counts[inside].astype("<u8").tobytes(),
    ).SerializeToString()
