"""`Monitor`: what the training loop holds. `step` is the hot path, `close` the end.

A monitor is a guest. `step` raises nothing, waits for nothing and allocates nothing on the device but a few scalars;
an error of the agent's own switches it off, says so once, and the training goes on. In a forked child it does nothing.
"""

from __future__ import annotations

import atexit
import operator
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from .adapters.tap import Tap
from .config import config_json
from .drain import Drain, Ending
from .notices import Drops, Notices, logger
from .ring import MAX_SCALARS, Ring
from .sampling import Sampler
from .snapshot import Snapshot
from .status import sync_command

if TYPE_CHECKING:
    from .adapters.inspect import InspectLogger

_LARGEST_STEP = 2**53  # exact in a float64, as plots need
_LONGEST_NAME = 200
_GRACE_S = 0.5  # for the drain thread to notice its deadline
_CLOSE_S = 4.5  # with the grace an exit takes 5 s at most


class Monitor:
    """Watches one model in one process; made by `attach`. A context manager: leaving it closes it."""

    def __init__(
        self,
        tap: Tap,
        ring: Ring,
        drain: Drain,
        *,
        sampler: Sampler,
        addresses: tuple[str, ...],
        drops: Drops,
        notices: Notices,
        configured: str = "",
        inspect: InspectLogger | None = None,
    ) -> None:
        self._tap = tap
        self._ring = ring
        self._drain = drain
        self._sampler = sampler
        self._addresses = addresses
        self._drops = drops
        self._notices = notices
        self._config_json = configured
        self._inspect = inspect
        self._live = True
        self._failed = False
        self._owner_pid = os.getpid()
        self._closing = threading.Lock()
        self._step = -1
        self._step_cpu_s = 0.0
        self._plan_next_step()
        self._drain.start()
        atexit.register(self._at_exit)
        os.register_at_fork(after_in_child=_forgetting(weakref.ref(self)))

    def step(self, step: int | None = None, **scalars: float | torch.Tensor) -> None:
        """Record the optimizer step that just ended: its statistics, and `scalars` such as loss.

        Numbers run from 0, or are the given ones, which must grow. A scalar is a number or a tensor with one
        element, on any device: nothing here waits for it. Micro-batches since the last call are one step.
        """
        if not self._live:
            if self._failed:
                self._drops.add("agent_error", len(self._tap.slots))
            return
        began = time.thread_time()
        try:
            self._take(step, scalars)
        except Exception as error:
            self._fail(error)
        self._step_cpu_s += time.thread_time() - began

    def log(self, step: int | None = None, **scalars: float | torch.Tensor) -> None:
        """Record scalars that are known only after their step, such as a validation loss: the newest one, or `step`.

        It costs what `step` costs, and waits for nothing either.
        """
        if not self._live:
            return
        try:
            number = max(self._step, 0) if step is None else operator.index(step)
            if not 0 <= number <= _LARGEST_STEP:
                raise ValueError(f"step is {step!r}; expected 0 to 2**53")
            on_host, on_device = self._split(scalars)
            frame = self._ring.take(number, plan=self._sampler.nothing, host_scalars=on_host, device_scalars=on_device)
            if frame is None:
                self._drops.add("ring_full", 1)
            else:
                self._ring.hand_over(frame)
        except Exception as error:
            self._drops.add("scalar_refused", len(scalars))
            self._notices.warn("log", f"scalars could not be recorded: {type(error).__name__}: {error}")

    def log_config(self, config: object = None, **values: object) -> None:
        """Add to the run's configuration what is known only after `attach`; a key that it has already is replaced.

        `config` is a mapping, a dataclass or an argparse.Namespace; secrets are masked as in `attach`.
        """
        if not self._live:
            return
        try:
            merged = config_json(values, over=config_json(config, over=self._config_json))
        except Exception as error:
            self._notices.warn("log_config", f"a configuration is not recorded: {error}")
        else:
            self._config_json = merged
            self._drain.configure(merged)

    def snapshot(self) -> Snapshot:
        """The monitor's state now. Costs microseconds: it reads no file and waits for nothing."""
        drain = self._drain
        status, worst, folder = drain.status, drain.worst, drain.recorder.folder
        problems = list(status.problems.values())
        return Snapshot(
            step=worst.step if worst is not None else None,
            worst_layer=worst.layer if worst is not None else None,
            worst_role=worst.role if worst is not None else None,
            worst_headroom=worst.headroom if worst is not None else None,
            overflow=worst.overflow if worst is not None else 0,
            underflow=worst.underflow if worst is not None else 0,
            rows_recorded=drain.recorder.rows_recorded,
            histograms_recorded=drain.recorder.histograms_recorded,
            rows_sent=status.acked_rows,
            rows_dropped={**status.dropped_rows, **self._drops.totals()},
            spool_bytes=drain.spool_bytes,
            spool=str(folder) if folder is not None else None,
            connected=status.connected,
            problem=problems[-1] if problems and not status.connected and not drain.delivered else None,
            agent_cpu_s=self._step_cpu_s + drain.cpu_s,
        )

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """End the recording: the model is as it was, and what was recorded is on disk and, if it can be, sent.

        Waits at most `timeout_s` for the collector. What it does not have by then, the sender process goes on
        sending for a while, and `fp8scope-agent sync` sends later. Closing twice does nothing.
        """
        self._close(timeout_s, failure=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failure = None
        if kind is not None and not (isinstance(error, SystemExit) and error.code in (None, 0)):
            failure = _describe(error) if error is not None else kind.__name__
        self._close(_CLOSE_S, failure)

    def _take(self, given: int | None, scalars: dict[str, float | torch.Tensor]) -> None:
        plan = self._plan
        frame = None
        number = self._number(given)
        if number is not None:
            self._step = number
        reports = self._inspect.take() if self._inspect is not None else []
        if number is not None and (plan.record or scalars or reports):
            on_host, on_device = self._split(scalars)
            frame = self._ring.take(number, plan=plan, host_scalars=on_host, device_scalars=on_device, reports=reports)
            if plan.take_histograms and (frame is None or not frame.histograms):
                self._drops.add_histograms("ring_full", int(plan.histograms.sum()))
            if frame is None:
                self._drops.add("ring_full", int(plan.rows.sum()))
                self._notices.warn(
                    "ring_full",
                    "steps follow each other faster than their statistics can be written: some steps are dropped, and "
                    "counted. attach(..., every=10) records every tenth.",
                )
        if plan.record:
            for arena in self._tap.arenas:
                arena.reset()
        self._plan_next_step()
        if frame is not None:
            self._ring.hand_over(frame)

    def _plan_next_step(self) -> None:
        self._plan = plan = self._sampler.next()
        for arena in self._tap.arenas:
            arena.recording = plan.record
            arena.record_histograms = plan.take_histograms

    def _number(self, given: int | None) -> int | None:
        """The step's number; None where it cannot be used, which is counted and said."""
        if given is None:
            return self._step + 1
        try:
            number = -1 if isinstance(given, torch.Tensor) and given.is_cuda else operator.index(given)
        except TypeError:
            number = -1
        if self._step < number <= _LARGEST_STEP:
            return number
        self._drops.add("step_refused", len(self._tap.slots))
        self._notices.warn(
            "step_refused",
            f"step {given!r} came after step {self._step}: it is not recorded. A step is a Python int above the one "
            "before; to go back to a checkpoint, close the monitor and attach again.",
        )
        return None

    def _split(self, scalars: dict[str, float | torch.Tensor]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """Scalars that are known now, and those that the device still computes."""
        on_host: dict[str, float] = {}
        on_device: dict[str, torch.Tensor] = {}
        for name, value in scalars.items():
            if len(on_host) + len(on_device) == MAX_SCALARS:
                self._drops.add("too_many_scalars", len(scalars) - MAX_SCALARS)
                self._notices.warn("too_many_scalars", f"a step has {len(scalars)} scalars; {MAX_SCALARS} are recorded")
                break
            try:
                if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
                    raise ValueError
                if isinstance(value, torch.Tensor):
                    if value.numel() != 1 or type(value).__name__ == "DTensor":
                        raise TypeError
                    if value.is_cuda:
                        on_device[name] = value
                    else:
                        on_host[name] = float(value.detach().item())
                else:
                    on_host[name] = float(value)
            except (TypeError, ValueError, RuntimeError):
                self._drops.add("scalar_refused", 1)
                self._notices.warn(
                    f"scalar {name}",
                    f"scalar {name[:_LONGEST_NAME]!r} is {_shortly(value)}: it is not recorded. Expected a number or a "
                    "tensor with one element (of a DTensor: its full_tensor()), and a printable name.",
                )
        return on_host, on_device

    def _fail(self, error: Exception) -> None:
        self._live = False
        self._failed = True
        self._drops.add("agent_error", len(self._tap.slots))
        self._notices.warn(
            "step",
            f"the monitor has switched itself off, the training goes on: {type(error).__name__}: {error}. Please "
            "report this; the logger 'fp8scope' has the traceback at level DEBUG.",
        )
        logger.debug("in Monitor.step", exc_info=True)
        self._tap.silence()

    def _release(self) -> None:
        try:
            if self._inspect is not None:
                self._take_what_was_logged_since(self._inspect)
            self._tap.release()
        except Exception as error:
            self._notices.warn("release", f"a layer could not be unbound: {type(error).__name__}: {error}")

    def _take_what_was_logged_since(self, inspect: InspectLogger) -> None:
        """nvdlfw-inspect's last step may have ended after ours."""
        reports = inspect.take()
        inspect.disconnect()
        plan = self._sampler.nothing
        if reports and (
            frame := self._ring.take(max(self._step, 0), plan=plan, host_scalars={}, device_scalars={}, reports=reports)
        ):
            self._ring.hand_over(frame)

    def _close(self, timeout_s: float, failure: str | None) -> None:
        if os.getpid() != self._owner_pid or not self._closing.acquire(blocking=False):
            return
        atexit.unregister(self._at_exit)
        self._live = self._failed = False
        self._release()
        timeout_s = max(timeout_s, 0.0)
        self._drain.end(Ending(failure, max(self._step, 0), time.monotonic() + timeout_s))
        self._drain.join(timeout_s + _GRACE_S)
        folder = self._drain.recorder.folder
        if not self._drain.delivered and folder is not None:
            waiting = self._drain.recorder.rows_recorded - self._drain.status.acked_rows
            self._notices.warn(
                "close",
                f"{waiting} rows are not yet at the collector; they are kept in {folder}. A sender process goes on for "
                f"a while; what it leaves is sent by: {sync_command(folder, self._addresses)}",
            )

    def _at_exit(self) -> None:
        """The interpreter ends without `close`: perhaps by an exception that nobody caught."""
        error = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
        self._close(_CLOSE_S, _describe(error) if error is not None else None)

    def _forget(self) -> None:
        """In a forked child: the threads are not here, and the spool is the parent's."""
        self._live = self._failed = False


def _forgetting(monitor: weakref.ref[Monitor]) -> Callable[[], None]:
    """What a forked child does, which outlives the monitor: hooks at fork cannot be taken back."""

    def in_child() -> None:
        here = monitor()
        if here is not None:
            here._forget()

    return in_child


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 1000 else text[:1000] + " ..."


def _shortly(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {type(value).__name__} {list(value.shape)} of {value.dtype} on {value.device}"
    return repr(value)[:100]
