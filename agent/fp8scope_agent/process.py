"""The trainer's side of the sender process: starts it, starts it again when it dies, reads what it says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .config import Settings
from .notices import Notices
from .status import DELIVERED, LOCKED, SenderStatus, read_status, sync_command

LOG_FILE = "sender.log"
_FIRST_RESTART_S = 1.0
_LONGEST_RESTART_S = 60.0


class SenderProcess:
    """One sender for one spool folder, outside this process and its session."""

    def __init__(
        self, folder: Path, settings: Settings, notices: Notices, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._notices = notices
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._restart_s = _FIRST_RESTART_S
        self._next_start = float("-inf")
        self.status = SenderStatus()

    @property
    def pid(self) -> int | None:
        """The sender's process id, while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def look_after(self) -> None:
        """See that it runs, and pass on what it has to say."""
        if self.pid is None and self._clock() >= self._next_start:
            self._start()
        self.read()

    def read(self) -> SenderStatus:
        """What the sender last said; new troubles are warned about."""
        self.status = read_status(self._folder)
        for cause, sentence in self.status.problems.items():
            self._notices.warn(f"sender {cause}", sentence)
        return self.status

    def _start(self) -> None:
        if self._process is not None and self._process.returncode not in (DELIVERED, LOCKED):
            self._notices.warn("sender ended", self._obituary())
        self._next_start = self._clock() + self._restart_s
        self._restart_s = min(2 * self._restart_s, _LONGEST_RESTART_S)
        command = [sys.executable, "-P", "-m", "fp8scope_agent.sender", str(self._folder)]
        command += ["--collector", ",".join(self._settings.addresses)]
        command += ["--parent", str(os.getpid()), "--linger-s", str(self._settings.linger_s)]
        environment = {**os.environ, **self._settings.tls}
        environment.pop("FP8SCOPE_TOKEN", None)
        if self._settings.token is not None:
            environment["FP8SCOPE_TOKEN"] = self._settings.token
        try:
            with (self._folder / LOG_FILE).open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # Ctrl-C in the terminal is not for the sender
                )
        except OSError as error:
            self._notices.warn(
                "sender start",
                f"the sender process cannot be started ({error}); statistics are kept, and sent "
                f"later by: {sync_command(self._folder, self._settings.addresses)}",
            )

    def _obituary(self) -> str:
        assert self._process is not None
        try:
            lines = (self._folder / LOG_FILE).read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        last = lines[-1] if lines else "it left no message"
        return (
            f"the sender process ended with status {self._process.returncode} ({last}); it is started again, and "
            f"nothing that is recorded is lost. Its output is in {self._folder / LOG_FILE}."
        )
