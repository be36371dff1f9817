"""Trainer, sender and collector are killed with `kill -9` at random: every row is stored once, or counted as dropped.

One process has imported what a trainer needs and forks a trainer for each round, so that a round takes seconds. A
trainer notes each step whose `step()` has returned in a file before it goes on: those are the rows that were accepted.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fp8scope_agent.cli import main as agent_cli
from fp8scope_agent.ring import DEPTH
from fp8scope_agent.status import read_drops, read_status
from programs import Program, environment

SLOTS = 6
HISTOGRAM_EVERY = 7
STEP_S = 0.004

TRAINERS = """
import os, signal, sys, time
import torch
from torch import nn
import fp8core
import fp8scope_agent as fp8scope

torch.set_num_threads(1)
model = fp8core.convert_to_fp8(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
model(torch.randn(4, 16)).square().mean().backward()  # the kernels are loaded
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    run, spool, accepted, address, steps, pause_s, histogram_every = line.split()
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.setsid()
    note = os.open(accepted, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with fp8scope.attach(
        model, run=run, spool_dir=spool, collector=address, histogram_every=int(histogram_every), burst=0
    ) as monitor:
        for step in range(int(steps)):
            model(torch.randn(4, 16)).square().mean().backward()
            monitor.step(step, loss=0.5)
            os.write(note, b"%d\\n" % step)
            time.sleep(float(pause_s))
    os._exit(0)
"""


@pytest.fixture
def trainers(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The process that forks them."""
    script = tmp_path / "trainers.py"
    script.write_text(TRAINERS)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "trainers.log").open("wb"),
        text=True,
        env=environment(FP8SCOPE_LINGER_S="5"),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", (tmp_path / "trainers.log").read_text()
    yield process
    process.kill()
    process.communicate()


class Collector:
    """A collector that is killed and comes back at the same address."""

    def __init__(self, start: Callable[..., tuple[Program, str]], database: str) -> None:
        self._start = start
        self._database = database
        self._program, self.address = start(database)
        self.kills = 0

    def kill_and_restart(self, away_s: float) -> None:
        self._program.kill()
        self.kills += 1
        time.sleep(away_s)
        self._program, _ = self._start(self._database, self.address)


def kill_9(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_whoever_is_killed_every_accepted_row_is_stored_once_or_counted(
    tmp_path: Path,
    trainers: subprocess.Popen[str],
    start_collector: Callable[..., tuple[Program, str]],
    rounds: int,
) -> None:
    database = tmp_path / "soak.db"
    collector = Collector(start_collector, f"sqlite:///{database}")
    kills = {"trainer": 0, "sender": 0}
    lost_at_the_end = []

    for seed in range(rounds):
        chance = random.Random(seed)
        spool, accepted = tmp_path / f"spool-{seed}", tmp_path / f"accepted-{seed}"
        steps = 300 if chance.random() < 0.2 else 1_000_000  # some come to their end
        assert trainers.stdin is not None
        assert trainers.stdout is not None
        print(
            f"run-{seed} {spool} {accepted} {collector.address} {steps} {STEP_S} {HISTOGRAM_EVERY}", file=trainers.stdin
        )
        trainers.stdin.flush()
        trainer = int(trainers.stdout.readline())
        until(lambda: any(spool.rglob("source.pb")))  # noqa: B023  # called at once
        folder = next(spool.rglob("source.pb")).parent

        outage = threading.Thread(target=collector.kill_and_restart, args=(chance.uniform(0, 1.0),))
        events = sorted((chance.uniform(0.1, 1.6), who) for who in ("sender", "sender", "collector"))
        began = time.monotonic()
        for at_s, who in events:
            time.sleep(max(0.0, began + at_s - time.monotonic()))
            if who == "sender":
                kills["sender"] += (pid := read_status(folder).pid) > 0 and kill_9(pid)
            else:
                outage.start()
        if steps > 300:
            time.sleep(max(0.0, began + chance.uniform(1.0, 2.0) - time.monotonic()))
            kills["trainer"] += kill_9(trainer)
        until(lambda: not alive(trainer))  # noqa: B023
        if chance.random() < 0.5:
            kill_9(read_status(folder).pid)  # nobody is left: the rest is for `sync`
        outage.join()
        until(lambda: not alive(read_status(folder).pid))  # noqa: B023
        assert agent_cli(["sync", str(folder), "--collector", collector.address]) == 0

        lost_at_the_end.append(assert_stored_once(database, f"run-{seed}", accepted, folder, finished=steps == 300))

    print(f"{rounds} rounds, killed {kills}, collector {collector.kills}; steps lost in the ring: {lost_at_the_end}")


def assert_stored_once(database: Path, run: str, accepted: Path, folder: Path, *, finished: bool) -> int:
    """Checks a run against what was accepted; the number of steps that a killed trainer lost at its end."""
    steps = np.array(accepted.read_text().split(), dtype=np.int64)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        source, counted = connection.execute(
            "SELECT source.id, source.rows FROM source JOIN run ON run.id = run_id WHERE run.name = ?", (run,)
        ).fetchone()
        rows = connection.execute("SELECT step, slot FROM stats WHERE source_id = ?", (source,)).fetchall()
        scalars = connection.execute("SELECT step FROM scalar WHERE source_id = ?", (source,)).fetchall()
        histograms = connection.execute("SELECT step, slot FROM histogram WHERE source_id = ?", (source,)).fetchall()
        drops = dict(
            connection.execute("SELECT reason, rows FROM drop_total WHERE source_id = ?", (source,)).fetchall()
        )
    assert counted == len(rows) == len(set(rows)), "a row came twice, and replaced the first"
    assert len(histograms) == len(set(histograms))
    assert len(scalars) == len(set(scalars))
    stored = {step for step, _ in rows}
    assert len(rows) == len(stored) * SLOTS, "a step is stored in part"
    assert stored == {step for (step,) in scalars}
    drops |= {reason: max(count, drops.get(reason, 0)) for reason, count in read_drops(folder).items()}
    # A step that is not noted may be stored: the trainer was killed in between.
    missing = [step for step in steps.tolist() if step not in stored]
    last_stored = max(stored, default=-1)
    in_the_ring = [step for step in missing if step > last_stored]
    assert set(drops) <= {"ring_full", "ring_full_histograms"}, drops
    assert (len(missing) - len(in_the_ring)) * SLOTS == drops.get("ring_full", 0)
    assert len(in_the_ring) <= (0 if finished else DEPTH)
    return len(in_the_ring)
