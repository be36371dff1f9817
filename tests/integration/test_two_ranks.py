"""The faults that need two ranks: `examples/inject_fault.py` keeps their weights alike, whatever each computes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from programs import FP8SCOPE, ROOT, Program, environment, wait_for_rows

STEPS, AT, SLOTS = 14, 8, 24
LAYER = "blocks.1.mlp.fc1"
Train = Callable[..., tuple[list[int], list[dict[str, Any]]]]


@pytest.fixture
def train(tmp_path: Path, start_collector: Callable[..., tuple[Program, str]], free_port: Callable[[], int]) -> Train:
    """Injects a fault into two ranks with unlike batches; how each rank ended, and the findings of all their rows."""

    def train(fault: str, *options: str) -> tuple[list[int], list[dict[str, Any]]]:
        database = f"sqlite:///{tmp_path}/test.db"
        _, address = start_collector(database)
        command = [
            sys.executable,
            "examples/inject_fault.py",
            "--fault",
            fault,
            "--run",
            "two",
            "--at",
            str(AT),
            *options,
        ]
        command += ["--layers", "2", "--width", "96", "--heads", "2", "--context", "32", "--validate-every", "0"]
        command += ["--steps", str(STEPS), "--collector", address, "--spool-dir", str(tmp_path / "spool")]
        meeting_at = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [
            subprocess.Popen(
                [*command, "--batch", str(2 + rank)], env=environment(RANK=str(rank), **meeting_at), cwd=ROOT
            )
            for rank in range(2)
        ]
        try:
            codes = [rank.wait(100) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        wait_for_rows(database, "two", codes.count(0) * STEPS * SLOTS)  # of a killed one what had been sent
        diagnose = [sys.executable, FP8SCOPE, "diagnose", "two", "--db", database, "--json"]
        out = subprocess.run(diagnose, capture_output=True, env=os.environ, timeout=60).stdout
        found: list[dict[str, Any]] = json.loads(out)["findings"]
        return codes, found

    return train


def test_a_weight_that_one_rank_changes_is_the_only_one_that_is_apart_and_from_that_step_on(
    train: Train,
) -> None:
    codes, found = train("rank-weights")

    apart = [finding for finding in found if finding["rule"] == "weights-diverged"]
    assert codes == [0, 0]
    assert [(each["layer"], each["role"], each["first_step"]) for each in apart] == [(LAYER, "weight", AT)], found


@pytest.mark.slow
def test_the_rank_that_is_left_goes_on_alone_with_weights_that_were_the_same(train: Train) -> None:
    codes, found = train("rank-killed", "--pace-s", "0.5")  # so that rows of both are sent before

    assert codes == [0, -signal.SIGKILL]
    assert "weights-diverged" not in {each["rule"] for each in found}, found
