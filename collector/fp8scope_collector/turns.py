"""Shares among the streams what may be on its way to the database at once: who has more to send waits for a turn.

An acknowledgement comes when all that came before is committed. If each of 512 streams filled its window, that would
be 40 seconds' work, and it would lie in memory; here it is what the database takes in a fraction of a second, however
many streams there are, and the rest waits in the agents' spools. A stream that keeps up (nothing is ready behind what
it sends) needs no turn; the others stand in one line and get a few batches each, the first ones too: all agents of a
job come back at once (docs/adr/0081).

How many rows that is depends on the machine and on who else uses it now; `Allowance` follows it.

`Lane` is a stream's place here and in the queue. Everything lives on the event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fp8scope_collector.decode import RefusedError
from fp8scope_collector.messages import Source

TOGETHER = 2  # turns that a stream gets at once: each time costs messages and wakes threads on both sides
PROMISE_S = 1.0  # a turn that is not used for so long counts no more; it stays valid
MEMORY_S = 2.0  # of work: how far back `Allowance` looks
LEAST_SHARE = 4  # of the most: a database that stood still takes rows again at once


class Lane:
    """One stream's place: how many of its batches are not committed yet, how far it may acknowledge, and its turns.

    `changed` is set whenever something here changed.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.changed = asyncio.Event()
        self.owed = 0
        self.waits = False  # for room in the queue or for its rate, not reading
        self.up_to_seq = source.up_to_seq
        self.failure: RefusedError | None = None  # a batch could not be stored; the stream has to end
        self.turns = 0  # durable messages that it may have sent, in all
        self.received = 0  # of those
        self.more = False  # the client said that another is ready
        self.rows = 0  # of its last batch, and supposedly of the next
        self.left = False


@dataclass
class _Promise:
    """Turns of a lane that has not used them yet, by the rows that are expected."""

    rows: deque[int] = field(default_factory=deque)
    since: float = 0.0


class Turns:
    """Grants turns while less than `rows` are under way; of one stream at most `window` batches are."""

    def __init__(self, rows: int, window: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rows = rows
        self._window = window
        self._clock = clock
        self._under_way = 0  # rows that came and are not committed, or are promised
        self._line: OrderedDict[Lane, None] = OrderedDict()
        self._promises: OrderedDict[Lane, _Promise] = OrderedDict()  # the one that was given longest ago first

    def allow(self, rows: int) -> None:
        """From now on so many rows may be under way; what was promised stays promised."""
        self._rows = rows
        self._serve()

    def join(self, lane: Lane, rows: int, *, more: bool) -> None:
        """A stream has opened; `more`: it has a batch ready, supposedly of so many rows."""
        lane.rows, lane.more = rows, more
        lane.turns = 0 if more else 1
        self._queue(lane)
        self._serve()

    def arrived(self, lane: Lane, rows: int, *, more: bool) -> None:
        """A batch of so many rows is in the queue, and counted in `lane.owed`; `more`: the next is ready."""
        lane.received += 1
        lane.rows, lane.more = rows, more
        self._under_way += rows
        if promise := self._promises.get(lane):
            self._under_way -= promise.rows.popleft()
            if not more or not promise.rows:
                self._release(lane)
        self._queue(lane)
        self._serve()

    def settled(self, batches: Iterable[tuple[Lane, int]]) -> None:
        """Batches, by their lanes and rows, are committed or refused, and no longer owed."""
        for lane, rows in batches:
            self._under_way -= rows
            if not lane.more:
                lane.turns = max(lane.turns, lane.received + 1)
            self._queue(lane)
        self._serve()

    def waits(self, lane: Lane) -> bool:
        """Whether the lane stands in line. Asked now and then, which also frees what others do not use."""
        while self._promises:
            other, promise = next(iter(self._promises.items()))
            if self._clock() - promise.since < PROMISE_S:
                break
            other.more = False  # whatever it said: it hangs, or its agent dropped what was ready
            self._line.pop(other, None)
            self._release(other)
        self._serve()
        return lane in self._line

    def leave(self, lane: Lane) -> None:
        """The stream has ended; what it put in the queue is settled later."""
        lane.left = True
        self._line.pop(lane, None)
        self._release(lane)
        self._serve()

    def _queue(self, lane: Lane) -> None:
        """Puts the lane at the end of the line, if it has something to send that its window has room for."""
        if lane.more and not lane.left and self._room(lane) > 0:
            self._line.setdefault(lane)

    def _serve(self) -> None:
        while self._line and self._under_way < self._rows:
            lane, _ = self._line.popitem(last=False)
            promise = self._promises.setdefault(lane, _Promise())
            for _ in range(min(TOGETHER, self._room(lane))):
                if self._under_way < self._rows:
                    lane.turns += 1
                    promise.rows.append(lane.rows)
                    self._under_way += lane.rows
            promise.since = self._clock()
            self._promises.move_to_end(lane)
            self._queue(lane)
            lane.changed.set()

    def _room(self, lane: Lane) -> int:
        """Batches that its window has room for."""
        return self._window - (lane.turns - lane.received) - lane.owed

    def _release(self, lane: Lane) -> None:
        if promise := self._promises.pop(lane, None):
            self._under_way -= sum(promise.rows)


class Allowance:
    """How many rows may be under way: what the database takes within `wait_s` as fast as it lately was, `most` at most.

    With so many before it, a batch is acknowledged after about `wait_s`.
    """

    def __init__(self, most: int, wait_s: float) -> None:
        self._most = most
        self._wait_s = wait_s
        self._rows_per_s = most / wait_s  # until something is known

    def after(self, rows: int, seconds: float) -> int:
        """How many, now that so many rows more took so many seconds of the writer's time."""
        weight = -math.expm1(-seconds / MEMORY_S)
        self._rows_per_s += weight * (rows / seconds - self._rows_per_s)
        return min(self._most, max(self._most // LEAST_SHARE, round(self._rows_per_s * self._wait_s)))
