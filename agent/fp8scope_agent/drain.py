"""The drain thread: takes frames off the ring when the device is done with them, and everything slow from there on.

Decoding, compressing, the disk and the sender process are here, on a daemon thread, so that none of it can reach
the training step. It keeps the newest step's summary and its own CPU time for `Monitor.snapshot`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .config import Settings
from .encode import decode_histograms, decode_step
from .notices import Drops, Notices, logger
from .process import SenderProcess
from .recorder import Recorder
from .ring import Frame, Ring
from .sampling import Sampler
from .snapshot import Summary, Worst
from .spool import spool_bytes
from .status import SenderStatus, read_requests, write_drops

_LOOK_S = 1.0  # how often the sender is looked after
_EVENT_POLL_S = 0.005
_CLOSING_POLL_S = 0.02


@dataclass(frozen=True)
class Ending:
    """How the job ended, and until when (time.monotonic) the rest may take."""

    failure: str | None
    last_step: int
    deadline: float


class Drain(threading.Thread):
    """From the ring to the spool until `end` is called; then to the collector until the deadline."""

    def __init__(
        self,
        ring: Ring,
        recorder: Recorder,
        slots_of: tuple[npt.NDArray[np.int64], ...],
        summary: Summary,
        sampler: Sampler,
        settings: Settings,
        drops: Drops,
        notices: Notices,
    ) -> None:
        super().__init__(name="fp8scope-drain", daemon=True)
        self.recorder = recorder
        self.worst: Worst | None = None
        self.spool_bytes = 0
        self.cpu_s = 0.0
        self.delivered = False
        self._ring = ring
        self._slots_of = slots_of
        self._summary = summary
        self._sampler = sampler
        self._settings = settings
        self._drops = drops
        self._notices = notices
        self._sender: SenderProcess | None = None
        self._next_look = float("-inf")
        self._drops_noted: dict[str, int] = {}
        self._ending: Ending | None = None
        self._config_json = ""  # not recorded yet

    @property
    def status(self) -> SenderStatus:
        """What the sender last said."""
        return self._sender.status if self._sender is not None else SenderStatus()

    def configure(self, config_json: str) -> None:
        """Record that this is the run's configuration from now on."""
        self._config_json = config_json
        self._ring.wake()

    def end(self, ending: Ending) -> None:
        """Finish: what is in the ring, the end of the source, then wait for the collector; not beyond the deadline."""
        self._ending = ending
        self._ring.wake()

    def run(self) -> None:
        """Serve until the end."""
        self.recorder.prepare()
        while True:
            frame = self._ring.next(timeout_s=_LOOK_S)
            if frame is not None:
                self._drain(frame)
            self._record_configuration()
            ending = self._ending
            if frame is None and ending is not None:
                break
            if time.monotonic() >= self._next_look:
                self._look_after_sender_guarded()
            self.cpu_s = time.thread_time()
        self.recorder.finish(ending.failure, ending.last_step)
        self._deliver(ending.deadline)
        self.cpu_s = time.thread_time()

    def _record_configuration(self) -> None:
        config_json, self._config_json = self._config_json, ""
        if config_json:
            self.recorder.record_config(time.time_ns(), config_json)

    def _drain(self, frame: Frame) -> None:
        """Record one frame; whatever goes wrong with it costs this frame, not the next."""
        try:
            if self._wait_for(frame):
                self._record(frame)
            else:
                self._drops.add("close_timeout", _rows_of(frame))
        except Exception as error:
            self._drops.add("agent_error", _rows_of(frame))
            self._notices.warn("drain", f"a step's statistics were dropped: {type(error).__name__}: {error}")
            logger.debug("while draining a frame", exc_info=True)
        finally:
            self._ring.give_back(frame)

    def _wait_for(self, frame: Frame) -> bool:
        """Wait for the device, in the end not beyond the deadline; whether the frame is there."""
        while not frame.ready():
            if self._ending is not None and time.monotonic() > self._ending.deadline:
                return False
            time.sleep(_EVENT_POLL_S)
        return True

    def _record(self, frame: Frame) -> None:
        plan = frame.plan
        if frame.reports:
            self.recorder.record_named(frame.taken_unix_ns, frame.named())
        if plan is None or not plan.record:
            self.recorder.record(frame.step, frame.taken_unix_ns, decode_step([], ()), frame.scalars())
            return
        rows = decode_step([tensor.numpy() for tensor in frame.words], self._slots_of)
        self.recorder.record(frame.step, frame.taken_unix_ns, rows.of(plan.rows), frame.scalars())
        if frame.histograms:
            histograms = decode_histograms([tensor.numpy() for tensor in frame.histograms], self._slots_of)
            self.recorder.record_histograms(frame.step, frame.taken_unix_ns, histograms.of(plan.histograms))
        self.worst = self._summary.of(frame.step, rows)
        in_trouble = np.logical_or(rows.columns["overflow"], rows.columns["nonfinite"])
        if in_trouble.any():
            self._sampler.trouble(rows.slot[in_trouble])

    def _look_after_sender_guarded(self) -> None:
        """Without a sender everything is still recorded: no trouble with it may end this thread."""
        try:
            self._look_after_sender()
        except Exception as error:
            self._notices.warn("sender", f"the sender cannot be looked after: {type(error).__name__}: {error}")
            logger.debug("while looking after the sender", exc_info=True)

    def _look_after_sender(self) -> None:
        self._next_look = time.monotonic() + _LOOK_S
        folder = self.recorder.folder
        if folder is None:
            self.recorder.prepare()
            return
        if self._sender is None:
            self._sender = SenderProcess(folder, self._settings, self._notices)
        self._sender.look_after()
        self._sampler.ask(read_requests(folder))
        self._note_drops(folder)
        self.spool_bytes = spool_bytes(folder)

    def _note_drops(self, folder: Path) -> None:
        drops = self._drops.totals()
        if drops != self._drops_noted:
            with contextlib.suppress(OSError):  # the records carry them, too
                write_drops(folder, drops)
                self._drops_noted = drops

    def _deliver(self, deadline: float) -> None:
        """Wait until the collector has everything, the sender has given up, or time is up."""
        self._look_after_sender_guarded()
        while self._sender is not None:
            status = self._sender.read()
            self.delivered = status.finished or status.acked_seq >= self.recorder.last_seq
            if self.delivered or status.ended or time.monotonic() > deadline:
                break
            if time.monotonic() >= self._next_look:
                self._look_after_sender_guarded()
            time.sleep(_CLOSING_POLL_S)
        if self._sender is not None and self.recorder.folder is not None:
            self.spool_bytes = spool_bytes(self.recorder.folder)


def _rows_of(frame: Frame) -> int:
    return int(frame.plan.rows.sum()) if frame.plan is not None else 0
