"""From the device to the host without waiting: a ring of buffers that the training thread fills and the drain empties.

`Ring.take` enqueues one copy per device behind the step's kernels, into pinned memory on CUDA, and an event after it.
On a CPU the copy is done when it returns. When no buffer is free the newest step is the one that is lost: the older
ones may still be under way on the device and cannot be taken back (docs/adr/0021).
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fp8core import StatsArena
from fp8core.stats import HISTOGRAM_BINS

from .named import Named
from .sampling import Plan

DEPTH = 16
HISTOGRAM_DEPTH = 2  # they are rare, and 25 times as large as the statistics
MAX_SCALARS = 64


@dataclass(frozen=True)
class Report:
    """What another library says about a slot: its value may still be under way on the device."""

    step: int
    slot: int
    name: str
    value: float | torch.Tensor


@dataclass
class Frame:
    """One step on its way: the words of each arena and the scalars, valid once `ready`."""

    words: tuple[torch.Tensor, ...]  # on the host, one per arena
    device_values: torch.Tensor  # float64 [MAX_SCALARS], on the host
    step: int = 0
    taken_unix_ns: int = 0
    plan: Plan | None = None
    histograms: tuple[torch.Tensor, ...] = ()  # on the host, one per arena; empty where none were taken
    host_scalars: dict[str, float] = field(default_factory=dict)
    device_names: tuple[str, ...] = ()  # whose values stand first in device_values
    reports: Sequence[Report] = ()
    report_values: torch.Tensor | None = None  # on the host, of the first reports
    events: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)
    pending: set[torch.device] = field(default_factory=set)

    @property
    def sampled(self) -> bool:
        """Whether it has statistics, beside scalars."""
        return self.plan is not None and self.plan.record

    def ready(self) -> bool:
        """Whether the devices have done their copies."""
        self.pending = {device for device in self.pending if not self.events[device].query()}  # type: ignore[no-untyped-call]  # torch's
        return not self.pending

    def scalars(self) -> dict[str, float]:
        """The step's scalars by name."""
        values = self.device_values[: len(self.device_names)].tolist()
        return {**self.host_scalars, **dict(zip(self.device_names, values, strict=True))}

    def named(self) -> list[Named]:
        """What other libraries said."""
        copied = [] if self.report_values is None else self.report_values.tolist()
        values = copied + [float(report.value) for report in self.reports[len(copied) :]]
        return [
            Named(report.step, report.slot, report.name, value)
            for report, value in zip(self.reports, values, strict=True)
        ]


class Ring:
    """Frames between one thread that takes and one that drains."""

    def __init__(self, arenas: tuple[StatsArena, ...], *, depth: int = DEPTH) -> None:
        self._arenas = arenas
        self._free: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        # Without an arena, too: a copy of a scalar into memory that is not pinned would wait for the device.
        on_cuda = any(arena.device.type == "cuda" for arena in arenas)
        self._pinned = on_cuda or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's
        for _ in range(depth):
            words = tuple(self._host_buffer(arena.words.shape, torch.int64) for arena in arenas)
            self._free.put(Frame(words, self._host_buffer((MAX_SCALARS,), torch.float64)))
        self._free_histograms: queue.SimpleQueue[tuple[torch.Tensor, ...]] = queue.SimpleQueue()
        for _ in range(HISTOGRAM_DEPTH):
            shapes = [(arena.slots, HISTOGRAM_BINS) for arena in arenas]
            self._free_histograms.put(tuple(self._host_buffer(shape, torch.int64) for shape in shapes))

    def take(
        self,
        step: int,
        *,
        plan: Plan,
        host_scalars: dict[str, float],
        device_scalars: Mapping[str, torch.Tensor],
        reports: Sequence[Report] = (),
    ) -> Frame | None:
        """A frame into which this step is being copied; None where none is free. `device_scalars` are CUDA tensors.

        Histograms that the plan wants are missing from it where none of their buffers is free.
        """
        try:
            frame = self._free.get_nowait()
        except queue.Empty:
            return None
        frame.step = step
        frame.taken_unix_ns = time.time_ns()
        frame.plan = plan
        frame.host_scalars = host_scalars
        if plan.record:
            for host, arena in zip(frame.words, self._arenas, strict=True):
                host.copy_(arena.words, non_blocking=True)
                if arena.device.type == "cuda":
                    frame.pending.add(arena.device)
        if plan.take_histograms:
            self._copy_histograms(frame)
        self._copy_scalars(frame, device_scalars)
        self._copy_reports(frame, reports)
        for device in frame.pending:
            if device not in frame.events:
                frame.events[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            frame.events[device].record(torch.cuda.current_stream(device))
        return frame

    def hand_over(self, frame: Frame) -> None:
        """Let the drain have it. Last of all in a step: it wakes a thread that wants the interpreter lock."""
        self._full.put(frame)

    def next(self, timeout_s: float) -> Frame | None:
        """The oldest frame, perhaps not ready yet; None after `timeout_s` without one, or when woken."""
        try:
            return self._full.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def give_back(self, frame: Frame) -> None:
        """The frame may be used again."""
        frame.pending.clear()
        if frame.histograms:
            self._free_histograms.put(frame.histograms)
            frame.histograms = ()
        self._free.put(frame)

    def wake(self) -> None:
        """Let a waiting `next` return."""
        self._full.put(None)

    def _copy_histograms(self, frame: Frame) -> None:
        try:
            frame.histograms = self._free_histograms.get_nowait()
        except queue.Empty:
            return
        for host, arena in zip(frame.histograms, self._arenas, strict=True):
            if arena.histograms is None:
                host.zero_()
            else:
                host.copy_(arena.histograms, non_blocking=True)

    def _copy_scalars(self, frame: Frame, scalars: Mapping[str, torch.Tensor]) -> None:
        by_device: dict[torch.device, list[str]] = {}
        for name, tensor in scalars.items():
            by_device.setdefault(tensor.device, []).append(name)
        names: list[str] = []
        for device, group in by_device.items():
            values = torch.stack([scalars[name].detach().reshape(()).to(torch.float64) for name in group])
            frame.device_values[len(names) : len(names) + len(group)].copy_(values, non_blocking=True)
            frame.pending.add(device)
            names += group
        frame.device_names = tuple(names)

    def _copy_reports(self, frame: Frame, reports: Sequence[Report]) -> None:
        """Those on a device first, in one copy for each device; the others are read when the frame is drained."""
        by_device: dict[torch.device, list[Report]] = {}
        others = []
        for report in reports:
            if isinstance(report.value, torch.Tensor) and report.value.is_cuda:
                by_device.setdefault(report.value.device, []).append(report)
            else:
                others.append(report)
        frame.reports = [report for group in by_device.values() for report in group] + others
        frame.report_values = None
        if by_device:
            frame.report_values = self._host_buffer((len(reports) - len(others),), torch.float64)
            start = 0
            for device, group in by_device.items():
                values = torch.stack([torch.as_tensor(report.value).detach().reshape(()).double() for report in group])
                frame.report_values[start : start + len(group)].copy_(values, non_blocking=True)
                frame.pending.add(device)
                start += len(group)

    def _host_buffer(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pinned)
