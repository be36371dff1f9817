"""The services of docker-compose.yml without Docker: commands, environment, mounts, health checks, on the loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compose import ROOT, seconds


class Stack:
    """The services of the file on the loopback: commands, environment and configuration with addresses rewritten."""

    def __init__(
        self,
        services: dict[str, dict[str, Any]],
        folder: Path,
        free_port: Callable[[], int],
        require: Callable[[str], Path],
        postgres: int,
        edits: Mapping[str, Callable[[str], str]] | None = None,
    ) -> None:
        """`edits` are what becomes of mounted files, by their names."""
        self.folder = folder
        self._edits = edits or {}
        self._services = services
        self._require = require
        self._ports = {5432: postgres, **{port: free_port() for port in (4327, 9464, 8501, 9090, 9093)}}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def rewrite(self, text: str) -> str:
        """`text` with the addresses of the private network replaced by the loopback's, and the ports by ours."""
        text = text.replace("@postgres/", "@postgres:5432/")
        hosts = "|".join([*self._services, re.escape("0.0.0.0"), re.escape("127.0.0.1")])
        return re.sub(rf"\b({hosts}):(\d+)\b", lambda match: f"127.0.0.1:{self._ports[int(match[2])]}", text)

    def url(self, port: int, path: str) -> str:
        return f"http://127.0.0.1:{self._ports[port]}{path}"

    def get(self, port: int, path: str) -> str:
        with urllib.request.urlopen(self.url(port, path), timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def prometheus(self, what: str) -> Any:
        return json.loads(self.get(9090, f"/api/v1/{what}"))["data"]

    def start(self, name: str, *more: str) -> None:
        """Starts the service's command, with `more` arguments at its end."""
        service = self._services[name]
        binary = [] if "build" in service else [name]  # the image's entry point
        words = [*binary, *service["command"], *more]
        mounts = {target: self._mounted(source) for source, target in self._volumes(service)}
        words = [self._at(mounts, self.rewrite(word)) for word in words]
        environment = {key: self.rewrite(value) for key, value in service.get("environment", {}).items()}
        with self.log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [str(self._program(words[0])), *words[1:]],
                cwd=ROOT if name == "training" else self.folder,
                env={"PATH": os.defpath, "HOME": str(self.folder), "OMP_NUM_THREADS": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def start_beside(self, name: str, script: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a script of the repository that is no service; it ends with the stack."""
        with self.log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, str(ROOT / script), *arguments],
                cwd=ROOT,
                env={"PATH": os.defpath, "HOME": str(self.folder), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self._processes[name]

    def wait_until_healthy(self, name: str) -> None:
        """Runs the service's own health check until it succeeds, as long as Docker would wait."""
        check = self._services[name]["healthcheck"]
        kind, *command = [self.rewrite(word) for word in check["test"]]
        assert kind == "CMD"
        if command[0] == "pg_isready":
            command.append(f"--port={self._ports[5432]}")
        deadline = time.monotonic() + seconds(check["start_period"]) + check["retries"] * seconds(check["interval"])
        while True:
            try:
                subprocess.run(
                    [str(self._program(command[0])), *command[1:]],
                    check=True,
                    capture_output=True,
                    timeout=seconds(check["timeout"]),
                )
                return
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                failure = f"{error}\n{(error.stderr or b'').decode()}"
            process = self._processes.get(name)
            gone = process is not None and process.poll() is not None
            assert not gone, f"{name} ended:\n{self.log(name).read_text()}"
            assert time.monotonic() < deadline, f"{name} is not healthy: {failure}\n{self.log(name).read_text()}"
            time.sleep(0.2)

    def wait(self, name: str, within_s: float) -> int:
        return self._processes[name].wait(within_s)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def stop(self) -> dict[str, int]:
        """Ends everything as Docker would, SIGTERM first; the exit codes."""
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        codes = {}
        for name, process in self._processes.items():
            try:
                codes[name] = process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait(5)
        return codes

    def _program(self, name: str) -> Path:
        if name == "python":
            return Path(sys.executable)
        ours = Path(sys.executable).with_name(name)
        return ours if ours.exists() else self._require(name)

    def _volumes(self, service: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for volume in service.get("volumes", []):
            source, target, *_ = volume.split(":")
            yield source, target

    def _mounted(self, source: str) -> Path:
        """What stands for a mount: an empty folder for a volume, a rewritten copy for our configuration."""
        copy = self.folder / "mounts" / source.removeprefix("./")
        if not source.startswith("."):
            copy.mkdir(parents=True, exist_ok=True)
            return copy
        for path in [ROOT / source] if (ROOT / source).is_file() else sorted((ROOT / source).iterdir()):
            target = self.folder / "mounts" / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            hurried = re.sub(r"(scrape_interval|scrape_timeout|evaluation_interval): \d+s", r"\1: 1s", path.read_text())
            hurried = self._edits.get(path.name, str)(hurried)
            target.write_text(self.rewrite(hurried) if path.name == "prometheus.yml" else hurried)
        return copy

    def _at(self, mounts: Mapping[str, Path], word: str) -> str:
        for target, path in mounts.items():
            word = re.sub(rf"(?<==){re.escape(target)}(?=/|$)", str(path), word)
        return word


@contextmanager
def running(stack: Stack) -> Iterator[Stack]:
    try:
        yield stack
    finally:
        stack.stop()


def eventually(what: Callable[[], bool], within_s: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)
