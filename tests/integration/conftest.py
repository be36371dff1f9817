"""The whole pipeline as a user runs it: real programs, real files, loopback."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from programs import FP8SCOPE, Program


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
