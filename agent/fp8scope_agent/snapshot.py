"""What the monitor knows right now, for a progress bar or a log line."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp8core.formats import FORMATS
from fp8core.records import Role

from .catalogue import SlotInfo
from .encode import StepRows


@dataclass(frozen=True)
class Worst:
    """The newest recorded step: the tensor closest to clipping, and the counts of all."""

    step: int
    layer: str | None
    role: Role | None
    headroom: float | None
    overflow: int
    underflow: int


@dataclass(frozen=True)
class Snapshot:
    """A monitor's state. Statistics are of the newest step that has been drained; counts are since `attach`."""

    step: int | None  # newest step whose statistics are recorded; None before the first
    worst_layer: str | None  # the layer of the tensor with the least headroom; None without a row
    worst_role: Role | None
    worst_headroom: float | None  # bits, log2(max) - log2(amax * scale); negative: it clips
    overflow: int  # elements clipped in that step, all tensors together
    underflow: int  # non-zero elements that became zero in it
    rows_recorded: int  # written to the spool
    histograms_recorded: int
    rows_sent: int  # of these, committed by the collector
    rows_dropped: dict[str, int]  # by reason
    spool_bytes: int  # on disk now
    spool: str | None  # the folder; None while the disk refuses it
    connected: bool  # whether the sender has a collector now
    problem: str | None  # the sender's newest trouble, with the way out
    agent_cpu_s: float  # CPU time of step() on the training thread, and of the drain thread


class Summary:
    """Finds the worst row of a step by the catalogue."""

    def __init__(self, slots: tuple[SlotInfo, ...]) -> None:
        self._slots = slots
        self._log2_max = np.log2([FORMATS[slot.format].max for slot in slots]) if slots else np.empty(0)

    def of(self, step: int, rows: StepRows) -> Worst:
        """The summary of these rows; all-zero tensors have no headroom to speak of."""
        amax = rows.columns["amax"].astype(np.float64)
        scaled = amax * rows.columns["scale_max"].astype(np.float64)
        with np.errstate(divide="ignore"):
            headroom = np.where(scaled > 0, self._log2_max[rows.slot] - np.log2(scaled), np.inf)
        worst = int(np.argmin(headroom)) if len(headroom) else None
        slot = self._slots[rows.slot[worst]] if worst is not None and np.isfinite(headroom[worst]) else None
        return Worst(
            step=step,
            layer=slot.layer if slot is not None else None,
            role=slot.role if slot is not None else None,
            headroom=float(headroom[worst]) if slot is not None and worst is not None else None,
            overflow=int(rows.columns["overflow"].sum()),
            underflow=int(rows.columns["underflow"].sum()),
        )
