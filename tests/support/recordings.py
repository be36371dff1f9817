"""Recordings of real training (`faults.record`) sent through the collector's decoder and writer, whole or in parts."""

from __future__ import annotations

import time
import uuid
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from fp8core.records import FIELDS, Role
from fp8scope_collector.decode import decode_finish, decode_open, decode_stats
from fp8scope_collector.diagnosis.window import Window
from fp8scope_collector.limits import Limits
from fp8scope_collector.storage.writer import StatsWriter
from fp8scope_protos.v1 import telemetry_pb2 as pb

ROLES = {Role.INPUT: pb.ROLE_INPUT, Role.WEIGHT: pb.ROLE_WEIGHT, Role.GRAD_OUTPUT: pb.ROLE_GRAD_OUTPUT}


class Job:
    """One process life of each rank of a recorded run, in a database."""

    def __init__(
        self,
        engine: sa.Engine,
        window: Window,
        *,
        name: str = "gpt",
        incarnation: int = 1,
        now_unix_ns: int | None = None,
    ) -> None:
        self.window = window
        self._writer = StatsWriter(engine)
        now = time.time_ns() if now_unix_ns is None else now_unix_ns
        slots = [
            pb.Slot(
                slot=slot.slot,
                layer=slot.layer,
                role=ROLES[slot.role],
                format=slot.format,
                recipe=slot.recipe,
                margin=slot.margin,
                module_class=slot.module_class,
            )
            for slot in window.slots
        ]
        openings = [
            pb.Open(
                run=name,
                rank=rank,
                world_size=len(window.ranks),
                incarnation=incarnation,
                source_uuid=uuid.uuid4().hex,
                slots=slots,
                started_unix_ns=now,
                sent_unix_ns=now,
            )
            for rank in window.ranks
        ]
        self.sources = [self._writer.register(decode_open(opening, Limits()), now_unix_ns=now) for opening in openings]
        self._seq = [0 for _ in openings]

    def send(self, first: int = 0, end: int | None = None, *, rank: int | None = None, now_unix_ns: int = 0) -> None:
        """The rows of step indices [first, end) of one rank, or of all; rank 0 has the losses."""
        end = self.window.steps.size if end is None else end
        for index in range(len(self.sources)) if rank is None else [rank]:
            steps, slots = np.nonzero(self.window.present[index, first:end])
            at = first + steps
            columns: dict[str, npt.NDArray[Any]] = {
                "step": self.window.steps[at].astype(np.uint64),
                "slot": slots.astype(np.uint32),
            }
            for field in FIELDS:
                if field.name in self.window.fields:
                    columns[field.name] = self.window[field.name][index, at, slots].astype(field.dtype)
            packed = pb.StatsColumns(**{name: values.tobytes() for name, values in columns.items()})
            data = packed.SerializeToString()
            self._seq[index] += 1
            message = pb.StatsBatch(
                seq=self._seq[index],
                rows=len(steps),
                compression=pb.COMPRESSION_NONE,
                columns=data,
                columns_bytes=len(data),
                columns_crc32=zlib.crc32(data),
                scalars=self._losses(first, end) if index == 0 else [],
            )
            batch = decode_stats(message, self.sources[index], Limits())
            self._writer.commit([batch], now_unix_ns=now_unix_ns or time.time_ns())

    def finish(self, *, rank: int | None = None, failed: bool = False, now_unix_ns: int = 0) -> None:
        """Ends one rank's life, or all."""
        now = now_unix_ns or time.time_ns()
        for index in range(len(self.sources)) if rank is None else [rank]:
            self._seq[index] += 1
            outcome = pb.OUTCOME_FAILED if failed else pb.OUTCOME_FINISHED
            message = pb.Finish(seq=self._seq[index], outcome=outcome, finished_unix_ns=now)
            self._writer.commit([decode_finish(message, self.sources[index], Limits())], now_unix_ns=now)

    def _losses(self, first: int, end: int) -> list[pb.Scalar]:
        low, high = self.window.steps[first], self.window.steps[end - 1]
        losses = self.window.scalars["loss"]
        pairs = zip(losses.steps.tolist(), losses.values.tolist(), strict=True)
        return [pb.Scalar(step=step, name="loss", value=value) for step, value in pairs if low <= step <= high]
