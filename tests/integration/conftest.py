"""The whole pipeline as a user runs it: real programs, real files, loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from programs import FP8SCOPE, Program


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
        program.kill()


@pytest.fixture
def start_collector(start: Callable[..., Program]) -> Callable[..., tuple[Program, str]]:
    """Starts `fp8scope serve`; gives the program and its gRPC address."""

    def start_collector(database: str, grpc: str = "127.0.0.1:0") -> tuple[Program, str]:
        program = start(
            *(FP8SCOPE, "serve", "--db", database, "--grpc", grpc, "--metrics", "127.0.0.1:0"),
            log="collector",
        )
        return program, program.wait_for(r"grpc (\S+?),")[1]

    return start_collector
