"""Programs under test: started as a user starts them, in processes of their own, and what they print."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FP8SCOPE = str(Path(sys.executable).with_name("fp8scope"))  # the installed command
SMALL_MODEL = ["--layers", "6", "--width", "96", "--heads", "2", "--context", "64", "--batch", "4"]


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FP8SCOPE_")}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


class Program:
    """A program under test and what it has printed."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        self._out = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-u", *command],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            env=environment(),
            cwd=ROOT,
            start_new_session=True,
        )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, within_s: float = 60) -> re.Match[str]:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.output()):
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        found = re.search(pattern, self.output())
        assert found, f"{pattern!r} did not appear; the program said:\n{self.output()}"
        return found

    def wait(self, within_s: float) -> int:
        return self.process.wait(within_s)

    def kill(self) -> None:
        """As `kill -9` does."""
        self.process.kill()
        self.process.wait(20)

    def stop(self, sig: int = signal.SIGTERM, within_s: float = 15) -> int:
        """Asks the program to end and returns its exit code; ends it by force when it does not."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
            try:
                self.process.wait(within_s)
            except subprocess.TimeoutExpired:
                self.kill()
        return int(self.process.returncode)


def stored_rows(database: str, run: str) -> int:
    """Rows of `run` that the collector has committed, as `fp8scope runs` says it."""
    command = [sys.executable, FP8SCOPE, "runs", "--db", database, "--json"]
    listed = subprocess.run(command, check=True, capture_output=True, env=environment(), timeout=60).stdout
    return sum(int(entry["rows"]) for entry in json.loads(listed) if entry["name"] == run)


def wait_for_rows(database: str, run: str, rows: int, within_s: float = 60) -> None:
    """Returns once `run` has `rows` rows: the sender may finish after the training has ended."""
    deadline = time.monotonic() + within_s
    while (stored := stored_rows(database, run)) < rows:
        assert time.monotonic() < deadline, f"{stored} of {rows} rows were stored after {within_s} s"
        time.sleep(0.3)
