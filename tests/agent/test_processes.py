"""Trainer and sender as processes: killed, forked, interrupted, without a collector; every row once, nothing hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

import fp8scope_agent as fp8scope
from fake_collector import Behaviour, FakeCollector
from fp8scope_agent.cli import main as agent_cli
from fp8scope_agent.status import SenderStatus, read_status
from fp8scope_protos.v1 import telemetry_pb2 as pb

TRAINER = """
import sys, time
import torch
from torch import nn
import fp8core
import fp8scope_agent as fp8scope

torch.set_num_threads(1)
model = fp8core.convert_to_fp8(nn.Sequential(nn.Linear(16, 16)))

def train(monitor, steps, pause_s=0.0):
    for _ in range(steps):
        loss = model(torch.randn(4, 16)).square().mean()
        loss.backward()
        monitor.step(loss=loss)
        time.sleep(pause_s)

def recorded(monitor, steps):  # waits: the ring has room for 16, whatever else this machine does
    while monitor.snapshot().rows_recorded < 3 * steps:
        time.sleep(0.001)

def train_losing_none(monitor, steps, pause_s=0.0):
    for number in range(10, steps + 1, 10):
        train(monitor, 10, pause_s)
        recorded(monitor, number)

def say(text):
    print(text, flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a training script: start(collector, body, **environment); what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(collector: str, body: str, **environment: str) -> subprocess.Popen[str]:
        script = tmp_path / f"train{len(started)}.py"
        script.write_text(TRAINER + body)
        variables = {**os.environ, "FP8SCOPE_COLLECTOR": collector, "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[], Path]:
    """Where the only source's spool is."""

    def find() -> Path:
        until(lambda: any((tmp_path / "spool").rglob("source.pb")))
        return next((tmp_path / "spool").rglob("source.pb")).parent

    return find


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    text = process.stdout.readline().strip()
    if not text:
        raise AssertionError(process.communicate(timeout=20)[1])
    return text


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def sender_of(folder: Path) -> SenderStatus:
    until(lambda: read_status(folder).pid > 0)
    return read_status(folder)


def test_a_killed_trainer_loses_nothing_that_was_spooled(
    collector: FakeCollector, start: Callable[..., subprocess.Popen[str]], folder: Callable[[], Path]
) -> None:
    trainer = start(
        collector.address,
        """
monitor = fp8scope.attach(model, run="run")
train_losing_none(monitor, 40)
say("recorded")
train(monitor, 1000000)
""",
    )
    assert line(trainer) == "recorded"
    trainer.kill()

    collector.wait_for(lambda source: len(source.rows) >= 120)
    until(lambda: gone(read_status(folder()).pid))

    source = collector.source
    steps = {step for step, _ in source.rows}
    assert steps >= set(range(40))
    assert len(source.rows) == 3 * len(steps)  # whole steps
    assert source.duplicate_rows == 0
    assert source.finish is None
    assert read_status(folder()).acked_rows == len(source.rows)


def test_a_killed_sender_is_started_again_and_every_row_arrives_once(
    collector: FakeCollector, start: Callable[..., subprocess.Popen[str]], folder: Callable[[], Path]
) -> None:
    collector.behaviour = Behaviour(commit_s=0.002)
    trainer = start(
        collector.address,
        """
with fp8scope.attach(model, run="run") as monitor:
    say("go")
    train_losing_none(monitor, 300, pause_s=0.01)
    monitor.close(timeout_s=20)
say("sent %d dropped %s" % (monitor.snapshot().rows_sent, monitor.snapshot().rows_dropped))
""",
    )
    line(trainer)
    first = sender_of(folder()).pid
    collector.wait_for(lambda source: len(source.rows) > 30)
    os.kill(first, signal.SIGKILL)

    said = line(trainer)

    assert said == "sent 900 dropped {}"
    assert len(collector.source.rows) == 900
    assert collector.source.duplicate_rows == 0
    assert collector.source.opens >= 2
    assert read_status(folder()).pid != first


def test_an_exception_that_nobody_catches_is_a_failed_run(
    collector: FakeCollector, start: Callable[..., subprocess.Popen[str]]
) -> None:
    trainer = start(
        collector.address, 'm = fp8scope.attach(model, run="run")\ntrain(m, 5)\nraise RuntimeError("diverged")'
    )

    source = collector.wait_for(lambda source: source.finish is not None)

    assert trainer.wait(20) == 1
    assert source.finish is not None
    assert (source.finish.outcome, source.finish.message) == (pb.OUTCOME_FAILED, "RuntimeError: diverged")
    assert len(source.rows) == 15


def test_a_script_that_just_ends_is_finished_and_its_steps_touched_neither_disk_nor_network(
    collector: FakeCollector, start: Callable[..., subprocess.Popen[str]]
) -> None:
    trainer = start(
        collector.address,
        """
import threading
caught, inside = [], False

def hook(event, arguments):
    if inside and threading.current_thread() is threading.main_thread():
        caught.append(event)

sys.addaudithook(hook)
monitor = fp8scope.attach(model, run="run")
for step in range(50):
    loss = model(torch.randn(4, 16)).square().mean()
    loss.backward()
    inside = True
    monitor.step(loss=loss)
    inside = False
    if step % 10 == 9:
        recorded(monitor, step + 1)
say("caught %s" % sorted(set(caught)))
""",
    )

    said = line(trainer)
    source = collector.wait_for(lambda source: source.finish is not None)

    assert said == "caught []"
    assert trainer.wait(20) == 0
    assert source.finish is not None
    assert source.finish.outcome == pb.OUTCOME_FINISHED


def test_without_a_collector_the_sender_leaves_after_its_linger_and_sync_sends_later(
    collector: FakeCollector,
    start: Callable[..., subprocess.Popen[str]],
    folder: Callable[[], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    collector.die()
    trainer = start(
        collector.address,
        'm = fp8scope.attach(model, run="run")\ntrain(m, 12)\nm.close(timeout_s=0.1)',
        FP8SCOPE_LINGER_S="0.5",
    )
    _, said = trainer.communicate(timeout=30)
    until(lambda: read_status(folder()).ended and gone(read_status(folder()).pid))
    status_before = agent_cli(["status", str(folder())])
    collector.start()

    synced = agent_cli(["sync", str(folder().parents[2]), "--collector", collector.address])
    status_after = agent_cli(["status", str(folder())])

    out = capsys.readouterr().out
    assert f"fp8scope-agent sync {folder()}" in said
    assert f"fp8scope-agent sync {folder()}" in (folder() / "sender.log").read_text()
    assert (status_before, synced, status_after) == (1, 0, 0)
    assert "36 rows and 3 histograms in 14 records wait" in out
    assert "36 rows sent; nothing waits" in out
    assert len(collector.source.rows) == 36
    assert collector.source.finish is not None


def test_an_interrupt_from_the_terminal_reaches_only_the_trainer(
    collector: FakeCollector, start: Callable[..., subprocess.Popen[str]], folder: Callable[[], Path]
) -> None:
    trainer = start(
        collector.address,
        """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
with fp8scope.attach(model, run="run") as m:
    train(m, 5)
    say("go")
    for _ in range(1200):
        time.sleep(0.05)  # not at once: a signal just before a sleep does not interrupt it
""",
    )
    line(trainer)
    sender = sender_of(folder()).pid

    assert os.getsid(sender) != os.getsid(trainer.pid)
    trainer.send_signal(signal.SIGINT)
    source = collector.wait_for(lambda source: source.finish is not None)

    assert source.finish is not None
    assert source.finish.message.startswith("KeyboardInterrupt")
    assert len(source.rows) == 15


def test_the_token_is_in_no_command_line_and_not_in_the_spool(
    collector: FakeCollector, model: nn.Module, tmp_path: Path, folder: Callable[[], Path]
) -> None:
    collector.behaviour = Behaviour(token="hunter2")
    with fp8scope.attach(model, run="run", collector=collector.address, token="hunter2") as monitor:
        monitor.step(loss=1.0)
        until(lambda: read_status(folder()).connected)
        sender = read_status(folder()).pid
        command = Path(f"/proc/{sender}/cmdline").read_bytes()

    assert b"fp8scope_agent.sender" in command
    assert b"hunter2" not in command
    assert [path for path in folder().iterdir() if b"hunter2" in path.read_bytes()] == []


def test_forked_children_do_nothing_and_harm_nothing(
    collector: FakeCollector, start: Callable[..., subprocess.Popen[str]]
) -> None:
    trainer = start(
        collector.address,
        """
import multiprocessing
import os
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        monitor.step(loss=99.0)       # a child's monitor is silent
        monitor.snapshot()
        return torch.full((16,), float(index))

with fp8scope.attach(model, run="run") as monitor:
    for _ in range(4):
        for batch in DataLoader(Data(), batch_size=16, num_workers=2, multiprocessing_context="fork"):
            model(batch).square().mean().backward()
            monitor.step(loss=1.0)
    recorded(monitor, 16)
    children = []
    for index in range(20):
        pid = os.fork()
        if pid == 0:
            monitor.step(loss=99.0)
            monitor.close()
            if index == 0:
                sys.exit(0)            # runs the handlers at exit, which takes a second with torch
            os._exit(0)
        children.append(pid)
        train(monitor, 1)
        if index % 10 == 9:
            recorded(monitor, 17 + index)
    say(str([os.waitpid(pid, 0)[1] for pid in children]))
""",
    )

    said = line(trainer)
    source = collector.wait_for(lambda source: source.finish is not None)

    assert trainer.communicate(timeout=30)[1] == ""  # no child complained that its ring is full
    assert trainer.returncode == 0
    assert said == str([0] * 20)
    assert sorted({step for step, _ in source.rows}) == list(range(36))
    assert 99.0 not in source.scalars.values()


WORKERS = """
import warnings
from torch.utils.data import DataLoader, Dataset

warnings.simplefilter("ignore", UserWarning)  # "suggested max number of worker in current system"

class Data(Dataset):
    def __len__(self):
        return 120
    def __getitem__(self, index):
        return torch.full((16,), float(index))

def main(method, workers):
    with fp8scope.attach(model, run="run") as monitor:
        while monitor.snapshot().rows_sent == 0:
            train(monitor, 1, pause_s=0.05)
        say(monitor.snapshot().step)
        loader = DataLoader(Data(), batch_size=1, num_workers=workers, multiprocessing_context=method, timeout=240)
        for batch in loader:
            model(batch).square().mean().backward()
            monitor.step(loss=1.0)
            time.sleep(0.01)
    say("done")

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("method", "workers"),
    [("fork", 40), ("spawn", 3), pytest.param("spawn", 40, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_dataloader_workers_come_and_go_while_rows_are_streamed(
    method: str, workers: int, collector: FakeCollector, start: Callable[..., subprocess.Popen[str]]
) -> None:
    trainer = start(collector.address, f"import sys\nsys.argv[1:] = [{method!r}, '{workers}']\n" + WORKERS)

    output, errors = trainer.communicate(timeout=250 if workers < 40 or method == "fork" else 800)

    assert (trainer.returncode, errors) == (0, "")
    before, done = output.split()
    assert done == "done"
    steps = {step for step, _ in collector.source.rows}
    assert steps == set(range(max(steps) + 1))
    assert max(steps) >= int(before) + 120
    assert len(collector.source.rows) == 3 * len(steps)
    assert collector.source.duplicate_rows == 0
    assert collector.source.finish is not None
    assert collector.source.finish.outcome == pb.OUTCOME_FINISHED


@pytest.mark.parametrize("trouble", ["flapping", "full disk"])
def test_in_trouble_every_row_is_recorded_or_counted(trouble: str) -> None:
    """The short form of `bench/agent_stall.py`, which measures how long its steps take."""
    script = Path(__file__).parents[2] / "bench" / "agent_stall.py"
    command = [sys.executable, str(script), "--only", trouble, "--steps", "60", "--full-bytes", "50000"]

    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    report = json.loads(said[said.index("{") :])
    rows = report["rows_recorded"] + report["rows_dropped"] - report["histograms_dropped"]
    assert rows - 60 * 72 in (0, 1)  # the end of the run counts as a row where it found no room
    assert (report["rows_dropped"] > 0) == (trouble == "full disk")
