"""Which steps are recorded, and of which slots: the agent's own rhythm, bursts after trouble, wishes of the collector.

A rhythm applies to all slots: statistics every N steps, histograms every M. A *wish* adds to it for some slots and
some steps: a burst is the agent's own, after a tensor clipped or was not finite; the collector's come with its
acknowledgements. The devices know only "record this step" and "count histograms too", for all slots; the plan of a
step says whose rows and histograms are then kept.

The training thread asks for the next step's plan, the drain thread adds wishes; they share one tuple.
"""

from __future__ import annotations

import fnmatch
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fp8scope_protos.v1 import telemetry_pb2 as pb

_QUIET_BURSTS = 10  # a tensor whose burst began is quiet for so many times its length
_MOST_WISHES = 32
_MOST_HISTOGRAMS = 1000  # of one request
_LONGEST_WISH = 100_000  # steps
_IDS_REMEMBERED = 1024

Slots = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sampling:
    """The rhythm: statistics every `every` steps, histograms every `histogram_every` (0: none), from the first on.

    After a step in which a tensor clipped or was not finite, it is recorded in each of the next `burst` steps, with a
    histogram in the first of them; 0: no bursts.
    """

    every: int = 1
    histogram_every: int = 100
    burst: int = 16


PRESETS = {
    "economy": Sampling(every=10, histogram_every=1000, burst=16),
    "standard": Sampling(),
    "full": Sampling(every=1, histogram_every=10, burst=64),
}


@dataclass(frozen=True, eq=False)
class Plan:
    """What is recorded of one step: the slots whose rows and whose histograms are kept, bool [slots]."""

    rows: Slots
    histograms: Slots
    record: bool  # whether the devices compute statistics in this step
    take_histograms: bool  # whether they count histograms


@dataclass(frozen=True, eq=False)
class _Wish:
    slots: Slots
    every: int  # rows, 0: none
    since: int  # the first call that it is for
    until: int  # the first call that it is not for any more
    histograms_until: int = 0  # histograms are taken before this call


class Sampler:
    """Plans one step after the other. `layers` are the names of the slots' layers."""

    def __init__(self, sampling: Sampling, layers: Sequence[str]) -> None:
        self._sampling = sampling
        self._layers = tuple(layers)
        self._all = np.ones(len(layers), np.bool_)
        self._none = np.zeros(len(layers), np.bool_)
        self._rhythm = {
            (rows, histograms): self._plan(self._all if rows else self._none, self._all if histograms else self._none)
            for rows in (False, True)
            for histograms in (False, True)
        }
        self.nothing = self._rhythm[False, False]  # the plan of what is no step
        self._call = -1
        self._lock = threading.Lock()  # guards what follows; `next` reads `_wishes` without it
        self._wishes: tuple[_Wish, ...] = ()
        self._burst_until = 0
        self._quiet_until = np.zeros(len(layers), np.int64)
        self._ids: deque[int] = deque(maxlen=_IDS_REMEMBERED)

    def next(self) -> Plan:
        """The plan of the step that begins now; called once a step, on the training thread."""
        self._call = call = self._call + 1
        every, histogram_every = self._sampling.every, self._sampling.histogram_every
        histograms = histogram_every > 0 and call % histogram_every == 0
        plan = self._rhythm[histograms or call % every == 0, histograms]
        return self._with_wishes(plan, call) if self._wishes else plan

    def trouble(self, slots: npt.NDArray[np.int64]) -> None:
        """These slots clipped or were not finite: record them in each of the next steps.

        One burst at a time, so that histograms stay rare where many tensors are in trouble; and a slot that clips all
        the time has a burst now and then, not one without end.
        """
        call, burst = self._call + 1, self._sampling.burst
        if burst == 0 or call < self._burst_until:
            return
        slots = slots[self._quiet_until[slots] <= call]
        if len(slots):
            self._burst_until = call + burst
            self._quiet_until[slots] = call + _QUIET_BURSTS * burst
            mask = self._none.copy()
            mask[slots] = True
            self._add(_Wish(mask, 1, call, call + burst, histograms_until=call + 1))

    def ask(self, requests: Iterable[pb.Request]) -> None:
        """Honour what the collector asks for, each id once; unknown kinds and layers that are not here are ignored."""
        for request in requests:
            if request.id in self._ids:
                continue
            self._ids.append(request.id)
            slots = self._matching(request.layers)
            call = self._call + 1
            kind = request.WhichOneof("kind")
            if kind == "sample_every" and request.sample_every.steps > 0:
                until = call + min(request.sample_every.for_steps, _LONGEST_WISH)
                self._add(_Wish(slots, request.sample_every.steps, call, until))
            elif kind == "take_histograms":
                until = call + min(request.take_histograms.count, _MOST_HISTOGRAMS)
                self._add(_Wish(slots, 0, call, until, histograms_until=until))

    def _add(self, wish: _Wish) -> None:
        with self._lock:
            wishes = [old for old in self._wishes if old.until > self._call]
            if wish.slots.any() and wish.until > wish.since and len(wishes) < _MOST_WISHES:
                wishes.append(wish)
            self._wishes = tuple(wishes)

    def _with_wishes(self, plan: Plan, call: int) -> Plan:
        rows, histograms = plan.rows.copy(), plan.histograms.copy()
        wishes = self._wishes
        for wish in wishes:
            if wish.since <= call < wish.until and wish.every and (call - wish.since) % wish.every == 0:
                rows |= wish.slots
            if wish.since <= call < wish.histograms_until:
                histograms |= wish.slots
        if any(wish.until <= call for wish in wishes):
            with self._lock:
                self._wishes = tuple(wish for wish in self._wishes if wish.until > call)
        return self._plan(rows | histograms, histograms)

    def _plan(self, rows: Slots, histograms: Slots) -> Plan:
        return Plan(rows, histograms, record=bool(rows.any()), take_histograms=bool(histograms.any()))

    def _matching(self, globs: Sequence[str]) -> Slots:
        if not globs:
            return self._all
        return np.array([matches(layer, globs) for layer in self._layers], np.bool_)


def matches(layer: str, globs: Iterable[str]) -> bool:
    """Whether the layer's name matches one of the globs, in which `*` stands for anything, dots too."""
    return any(fnmatch.fnmatchcase(layer, glob) for glob in globs)
