"""The statistics arena: where the casts of a training step leave their numbers, on the device.

One int64 buffer [slots, len(records.COLUMNS)] at a fixed address. Quantise operations find it by an integer handle:
a tensor argument would be saved for backward and fail autograd's version check as soon as a model is compiled in more
than one graph (docs/adr/0001). An arena that nobody holds any more is forgotten; its handle then writes to nowhere.
"""

from __future__ import annotations

import itertools
import threading
import weakref

import torch
from torch import Tensor

from fp8core.records import COLUMNS, empty_row

NO_ARENA = 0
HISTOGRAM_BINS = 256

_lock = threading.Lock()
_handles = itertools.count(1)
_arenas: weakref.WeakValueDictionary[int, StatsArena] = weakref.WeakValueDictionary()


class StatsArena:
    """Rows of statistics for `slots` slots on one device.

    `words` is the buffer (see `fp8core.records`), `handle` its name towards operations: never 0, which means "no
    arena". Two switches that operations read when they run, so that a compiled model is not compiled anew:

    * while `recording` is False, writes go to nowhere;
    * while `record_histograms` is True, casts also add to `histograms`, int64 [slots, 256] (allocated when first
      needed; bins as in `fp8core.histogram`), which costs about as much as the cast itself: switch it on for the
      steps that want it.
    """

    def __init__(self, slots: int, device: torch.device | str = "cpu") -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}; an arena holds at least one")
        self.slots = slots
        self._empty = torch.from_numpy(empty_row()).to(device)
        self.words = torch.empty(slots, len(COLUMNS), dtype=torch.int64, device=device)
        self.last_scales = torch.ones(slots)  # on the host; for `kernels.count_by_amax`
        self.histograms: Tensor | None = None
        self._histograms_used = False
        self.recording = True
        self.record_histograms = False
        self.reset()
        with _lock:
            self.handle = next(_handles)
            _arenas[self.handle] = self

    @property
    def device(self) -> torch.device:
        """The device that `words` is on."""
        return self.words.device

    def add_histogram(self, slot: Tensor, counts: Tensor, *, overwrite: bool) -> None:
        """Adds `counts`, int64 [256], to the histogram of `slot`, or replaces it by them. Enqueued on the device."""
        if self.histograms is None:
            self.histograms = torch.zeros(self.slots, HISTOGRAM_BINS, dtype=torch.int64, device=self.device)
        self._histograms_used = True
        row = slot.reshape(1)
        if overwrite:
            self.histograms.index_copy_(0, row, counts[None])
        else:
            self.histograms.index_add_(0, row, counts[None])

    def reset(self) -> None:
        """Marks every row as unwritten and empties the histograms. Enqueued on the device; the host does not wait."""
        self.words.copy_(self._empty.expand_as(self.words))
        if self.histograms is not None and self._histograms_used:  # 2 kB a slot: not at each step
            self.histograms.zero_()
            self._histograms_used = False

    def close(self) -> None:
        """Makes the handle write to nowhere. `words` stays readable."""
        with _lock:
            _arenas.pop(self.handle, None)


def recording_arena(handle: int) -> StatsArena | None:
    """The arena with this handle; None where there is none, it is closed, or it is not recording."""
    if handle == NO_ARENA:
        return None
    with _lock:
        arena = _arenas.get(handle)
    return arena if arena is not None and arena.recording else None
