"""Fixtures for all tests: programs that may be missing, programs of ours, and a PostgreSQL of our own.

A test that needs a program asks `require_binary("promtool")`: where the program is missing the test is skipped and
says how to get it. With FP8SCOPE_REQUIRE_ALL=1 it fails instead, so that CI cannot skip in silence.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from programs import Program

os.environ.setdefault("FP8SCOPE_DIAGNOSIS", "off")  # a process more for each collector: tests that want it say so

OTHER_NAMES = {"alertmanager": ["prometheus-alertmanager"], "chromium": ["chromium-browser", "google-chrome"]}


def missing(what: str) -> NoReturn:
    """Skips the test because `what` is not there; fails it under FP8SCOPE_REQUIRE_ALL=1."""
    if os.environ.get("FP8SCOPE_REQUIRE_ALL") == "1":
        pytest.fail(f"{what}, and FP8SCOPE_REQUIRE_ALL=1 forbids to skip; run `make test-deps`", pytrace=False)
    pytest.skip(f"{what}; run `make test-deps`")


def find_binary(name: str) -> Path | None:
    """Where the program `name` is: on the PATH, among the system's servers, or in the newest PostgreSQL."""
    servers = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name), reverse=True
    )
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", *map(str, servers)])
    for candidate in [name, *OTHER_NAMES.get(name, [])]:
        if found := shutil.which(candidate, path=path):
            return Path(found)
    return None


@pytest.fixture(scope="session")
def require_binary() -> Callable[[str], Path]:
    """A function: the path of a program, or a skipped (under FP8SCOPE_REQUIRE_ALL=1 a failed) test."""

    def require(name: str) -> Path:
        return find_binary(name) or missing(f"{name} is not installed")

    return require


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function: a TCP port of the loopback that nobody listened on just now."""
    return _free_port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class PostgresServer:
    """A PostgreSQL that listens on the loopback; its superuser is `postgres`."""

    port: int
    password: str
    process: subprocess.Popen[bytes]
    folder: Path  # of its Unix socket
    launch: Callable[[], subprocess.Popen[bytes]]

    def stop(self) -> None:
        """Stops at once, as a crash would: what was under way is lost, what was committed is not."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(30)

    def start(self) -> None:
        """Starts it again where it was stopped; returns when it answers."""
        for _ in range(3):  # once a restart ended by a signal before it answered
            if self.process.poll() is not None:
                self.process = self.launch()
            if _answers(self, timeout_s=30):
                return
        log = (self.folder / "log").read_text()
        pytest.fail(f"PostgreSQL does not start again ({self.process.poll()}):\n{log[-2000:]}")

    def url(self, database: str = "postgres") -> str:
        """SQLAlchemy's address of `database`."""
        return f"postgresql+psycopg://postgres:{self.password}@127.0.0.1:{self.port}/{database}"

    def connect(self, database: str = "postgres") -> Any:
        """A psycopg connection in autocommit mode."""
        import psycopg

        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", password=self.password, dbname=database, autocommit=True
        )

    def create_database(self) -> str:
        """The name of a new, empty database."""
        name = f"test_{secrets.token_hex(6)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return name

    def drop_database(self, name: str) -> None:
        """Drops the database and cuts whoever is still connected to it."""
        with self.connect() as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres_server(require_binary: Callable[[str], Path]) -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests of this process, in a folder of its own: fsync off, commits still in order."""
    initdb, postgres = require_binary("initdb"), require_binary("postgres")
    account = _account_for_servers()
    as_account: list[str | Path] = []
    if account:  # not by Popen's user=: that forks, and a process with chDB and gRPC in it may not live through it
        as_account = [require_binary("setpriv"), f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}"]
        as_account.append("--clear-groups")
    home = Path(tempfile.mkdtemp(prefix="fp8scope-postgres-"))
    password = secrets.token_hex(16)
    server: PostgresServer | None = None
    try:
        (home / "password").write_text(password)
        if account:
            for path in [home, home / "password"]:
                os.chown(path, account.pw_uid, account.pw_gid)
        subprocess.run(
            [
                *(*as_account, initdb, "--pgdata", home / "data", "--username=postgres", "--pwfile", home / "password"),
                *("--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"),
            ],
            cwd=home,
            check=True,
            capture_output=True,
            timeout=60,
        )
        for attempt in range(3):  # somebody may take the port before PostgreSQL does
            port = _free_port()

            def launch(port: int = port) -> subprocess.Popen[bytes]:
                with (home / "log").open("ab") as log:
                    return subprocess.Popen(
                        [
                            *(
                                *as_account,
                                postgres,
                                "-D",
                                home / "data",
                                "-p",
                                str(port),
                                "-c",
                                "listen_addresses=127.0.0.1",
                            ),
                            *("-c", f"unix_socket_directories={home}", "-c", "fsync=off", "-c", "shared_buffers=32MB"),
                        ],
                        cwd=home,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )

            server = PostgresServer(port, password, launch(), home, launch)
            if _answers(server, timeout_s=30):
                break
            assert attempt < 2, f"PostgreSQL did not start:\n{(home / 'log').read_text()}"
        yield server
    finally:
        if server and server.process.poll() is None:
            server.stop()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """SQLAlchemy's address of an empty database for this test alone."""
    name = postgres_server.create_database()
    yield postgres_server.url(name)
    with contextlib.suppress(OSError):
        postgres_server.drop_database(name)


@pytest.fixture
def postgres_socket_url(postgres_server: PostgresServer) -> Callable[[str], str]:
    """A function: the same database by its Unix socket, which every network namespace reaches."""

    def by_socket(url: str) -> str:
        return url.replace(f"@127.0.0.1:{postgres_server.port}/", "@/") + (
            f"?host={postgres_server.folder}&port={postgres_server.port}"
        )

    return by_socket


def _account_for_servers() -> pwd.struct_passwd | None:
    """Whom to run PostgreSQL as: it refuses root, so `postgres`, else `nobody`; None if we are somebody already."""
    if os.geteuid() != 0:
        return None
    for name in ["postgres", "nobody"]:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    missing("PostgreSQL does not run as root, and there is no account `postgres` or `nobody`")


def _answers(server: PostgresServer, *, timeout_s: float) -> bool:
    """Whether the server lets us in within `timeout_s`; False at once when it ended."""
    import psycopg

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            server.connect().close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return True
    return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts `python COMMAND...`; whatever still runs at the end of the test is ended."""
    started: list[Program] = []

    def start(*command: str | Path, log: str = "out") -> Program:
        program = Program([str(part) for part in command], tmp_path / f"{log}-{len(started)}.log")
        started.append(program)
        return program

    yield start
    for program in started:
        program.stop()
