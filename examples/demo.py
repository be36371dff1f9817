"""`make demo`: a collector, the dashboard and a training run in FP8, in one terminal, until Ctrl-C.

This file only starts and stops programs that exist by themselves: `fp8scope serve`, `fp8scope dashboard` and
`train_gpt.py`. It says where to look, passes on what they complain about, and leaves nothing behind: children
live in process groups of their own, so that Ctrl-C reaches them through here, in order (training, dashboard,
collector), and the kernel ends them if this process is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
FP8SCOPE = str(Path(sys.executable).with_name("fp8scope"))
READY_WITHIN_S = 60.0
STOP_WITHIN_S = 4.0  # of the five that Ctrl-C may take
NEEDED_BYTES = 64 << 20  # free space to begin with: a few hundred steps of the default model, with room
PR_SET_PDEATHSIG = 1


class DemoError(Exception):
    """Something that the user can act on; its text is the whole message."""


def main(argv: list[str] | None = None) -> int:
    args, training_options = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that runs this in the background has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        with contextlib.ExitStack() as stack:
            return demo(args, training_options, stack)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130


def demo(args: argparse.Namespace, training_options: list[str], stack: contextlib.ExitStack) -> int:
    directory = prepare(args.dir)
    database = args.db or f"sqlite:///{directory / 'fp8scope.db'}"
    if not args.no_dashboard:
        require_free_port(args.listen)

    collector = stack.enter_context(
        child(
            "collector",
            [FP8SCOPE, "serve", "--grpc", "127.0.0.1:0"],
            {"FP8SCOPE_DB": database, "FP8SCOPE_METRICS": "127.0.0.1:0"},
            directory,
        )
    )
    ready = collector.wait_for(r"grpc (?P<grpc>\S+?), metrics (?P<metrics>\S+?),")
    print(f"collector  {ready['grpc']}, metrics {ready['metrics']}")
    if not args.no_dashboard:
        dashboard = stack.enter_context(
            child(
                "dashboard",
                [FP8SCOPE, "dashboard", "--listen", args.listen],
                {"FP8SCOPE_DB": database},
                directory,
            )
        )
        print(f"dashboard  {dashboard.wait_for(r'(?P<url>http://[^ ,]+)')['url']}", flush=True)

    result_file = directory / "result.json"
    result_file.unlink(missing_ok=True)
    command = [str(HERE / "train_gpt.py"), *training_options, "--result", str(result_file)]
    command += ["--collector", ready["grpc"], "--spool-dir", str(directory / "spool")]
    # a sender is of no use without this collector
    training = stack.enter_context(child("training", command, {"FP8SCOPE_LINGER_S": "2"}, directory, show=True))
    code = training.wait(watching=[collector])
    if code != 0:
        raise DemoError(f"training ended with code {code}; its output is above")
    print(summary(json.loads(result_file.read_text()), ready["metrics"], database))
    if not args.exit and not args.no_dashboard:
        print("the dashboard stays up; Ctrl-C stops everything", flush=True)
        try:
            while True:
                time.sleep(0.5)
                collector.check()
                dashboard.check()
        except KeyboardInterrupt:
            pass
    return 0


def summary(result: dict[str, float | str], metrics_url: str, database: str) -> str:
    """What the run left behind, in a few lines; the collector must still be up."""
    with urllib.request.urlopen(metrics_url, timeout=10) as answer:
        metrics = answer.read().decode()
    found = re.search(r"^fp8scope_database_bytes (\S+)$", metrics, re.MULTILINE)
    stored = stored_rows(database, str(result["run"]))
    lines = [
        f"run            {result['run']}",
        f"rows           {stored['rows']} stored of {result['rows_recorded']} recorded, "
        f"{result['rows_dropped']} dropped",
    ]
    if found and stored["all_rows"]:
        size = float(found[1])
        lines.append(f"database       {database} ({size / 1e6:.1f} MB, {size / stored['all_rows']:.0f} bytes a row)")
    lines.append(
        f"agent          {100 * float(result['agent_share']):.2f} % of the step time (its CPU time in this process)"
    )
    return "\n".join(lines)


def stored_rows(database: str, run: str) -> dict[str, int]:
    """Rows of `run` and of all runs, as the command that users have says it."""
    command = [sys.executable, FP8SCOPE, "runs", "--db", database, "--json"]
    runs = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    return {"rows": sum(r["rows"] for r in runs if r["name"] == run), "all_rows": sum(r["rows"] for r in runs)}


# Before anything starts --------------------------------------------------------------------------------------------


def prepare(directory: Path) -> Path:
    """The folder for database, spool and logs, made and with room in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"x")
            probe.flush()
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise DemoError(f"cannot write to {directory}: {error.strerror}. Choose another place with --dir.") from None
    if free < NEEDED_BYTES:
        raise DemoError(
            f"{directory} has {free >> 20} MiB free; the demo wants {NEEDED_BYTES >> 20}. "
            "Free some space, or choose another place with --dir."
        )
    return directory.resolve()


def require_free_port(address: str) -> None:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except (OSError, ValueError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else "expected HOST:PORT"
            raise DemoError(f"the dashboard cannot listen on {address}: {why}. Choose another with --listen.") from None


# Children ----------------------------------------------------------------------------------------------------------


class Child:
    """A program that the demo started: its output goes to a log, what matters of it to the terminal."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path, *, show: bool) -> None:
        self.name, self.log = name, log
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-u", *command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=None if show else subprocess.PIPE,
            stderr=None if show else subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_begin,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        if not show:
            self._reader.start()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line of output that matches.

        Raises:
            DemoError: the program ended, or did not say so in time.
        """
        deadline = time.monotonic() + READY_WITHIN_S
        with self._changed:
            while True:
                for line in self._lines:
                    if found := re.search(pattern, line):
                        return found
                if self._process.poll() is not None and not self._reader.is_alive():
                    raise DemoError(self._ended())
                if time.monotonic() > deadline:
                    raise DemoError(f"the {self.name} was not ready within {READY_WITHIN_S:.0f} s; see {self.log}")
                self._changed.wait(0.1)

    def wait(self, watching: list[Child]) -> int:
        """The program's exit code, once it has ended; meanwhile `watching` must stay alive."""
        while (code := self._process.poll()) is None:
            for other in watching:
                other.check()
            time.sleep(0.1)
        return code

    def check(self) -> None:
        if self._process.poll() is not None:
            raise DemoError(self._ended())

    def stop(self, within_s: float) -> None:
        """Ends the program: asked first, then made to."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT if self.name == "training" else signal.SIGTERM)
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ended(self) -> str:
        said = next((line for line in reversed(self._lines) if line.strip()), "it said nothing")
        return f"the {self.name} ended with code {self._process.returncode}: {said}"

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError), self.log.open("w") as log:
            for line in self._process.stdout:
                with self._changed:
                    self._lines = [*self._lines[-200:], line.rstrip()]
                    self._changed.notify_all()
                if complaint := _complaint(line):
                    print(f"{self.name}: {complaint}", file=sys.stderr)
                with contextlib.suppress(OSError):  # a full disk must not stop the reading
                    log.write(line)
                    log.flush()


@contextlib.contextmanager
def child(
    name: str, command: list[str], environment: dict[str, str], directory: Path, *, show: bool = False
) -> Iterator[Child]:
    started = Child(name, command, environment, directory / f"{name}.log", show=show)
    try:
        yield started
    finally:
        started.stop(STOP_WITHIN_S / 3)


def _complaint(line: str) -> str:
    """What a line of a log says to a person, or nothing: the collector's log is JSON, one event a line."""
    try:
        event = json.loads(line)
    except ValueError:
        return line.strip() if re.search(r"\b(warning|error)\b", line, re.IGNORECASE) else ""
    if not isinstance(event, dict) or event.get("level") not in ("warning", "error", "critical"):
        return ""
    detail = event.get("error")
    return f"{event.get('event')}: {detail}" if detail else str(event.get("event"))


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


# Command line ------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The demo's own options, and the rest, which is the training's."""
    parser = argparse.ArgumentParser(
        prog="make demo ARGS=...",
        description="Train a small GPT in FP8 and watch it live.",
        epilog="Other options go to the training (--steps, --seed, --precision bf16|fp8, --recipe, --layers ...): "
        "python examples/train_gpt.py --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--exit", action="store_true", help="end when training ends, and stop everything")
    parser.add_argument("--no-dashboard", action="store_true", help="no dashboard; ends when training ends")
    parser.add_argument("--db", metavar="URL", help="database of the collector (default: SQLite in --dir)")
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/demo"), help="for database, spool and logs (default %(default)s)"
    )
    parser.add_argument(
        "--listen", metavar="HOST:PORT", default="127.0.0.1:8501", help="the dashboard's address (default %(default)s)"
    )
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    sys.exit(main())
