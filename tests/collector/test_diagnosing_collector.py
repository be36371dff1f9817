"""A collector diagnoses beside its work: findings appear, /metrics and a webhook tell of them, and nothing is left."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fp8scope_collector.diagnosis.priority import NICE, Transactions, step_back
from fp8scope_collector.storage.engine import open_engine
from fp8scope_collector.storage.reader import Reader


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a webhook, and what it got."""
    got: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", got
    server.shutdown()
    server.server_close()


def eventually(what: Callable[[], Any], within_s: float = 20.0, why: Callable[[], object] = str) -> Any:
    deadline = time.monotonic() + within_s
    while not (answer := what()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)
    return answer


def workers(parent: int) -> list[int]:
    """The processes that diagnose for a collector."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == parent and "diagnosis.worker" in command:
            found.append(int(stat.parent.name))
    return found


def alive(process: int) -> bool:
    """Whether it runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("stats", ["", "?stats=chdb:///{}/stats"], ids=["sqlite", "chdb"])
def test_a_nan_becomes_a_finding_a_series_and_a_message_and_the_process_ends_with_its_collector(
    tmp_path: Path,
    start_collector: Callable[..., Any],
    connect: Callable[..., Any],
    wire: Any,
    webhook: tuple[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    stats: str,
) -> None:
    url, told = webhook
    monkeypatch.setenv("FP8SCOPE_NOTIFY", url)
    db = f"sqlite:///{tmp_path}/test.db{stats.format(tmp_path)}"
    collector = start_collector(db, "--diagnosis", "on")
    columns = wire.columns(0, steps=6)
    columns["nonfinite"][:] = 0
    columns["overflow"][:] = 0
    columns["nonfinite"][columns["step"] == 3] = [7, 0, 0, 0, 0, 0]

    stream = connect(collector.grpc, wire.open("gpt"))
    stream.send(stats=wire.stats(1, columns))
    stream.wait_ack(1)
    eventually(lambda: told, why=lambda: (collector.log.read_text(), told))
    series = eventually(lambda: [key for key in collector.metrics() if key[0] == "fp8scope_finding"])
    looked = collector.metrics()[("fp8scope_diagnosis_last_look_timestamp_seconds",)]
    (process,) = workers(collector.process.pid)
    first_exit = collector.terminate()
    reader = Reader(db)
    (finding,) = reader.findings(severity="critical")
    reader.close()

    assert (finding.rule, finding.layer, finding.role, finding.first_step) == ("nonfinite", "blocks.0.fc", "input", 3)
    assert finding.is_open
    assert series == [
        ("fp8scope_finding", "layer=blocks.0.fc", "role=input", "rule=nonfinite", "run=gpt", "severity=critical")
    ]
    assert [(m["status"], m["run"], m["findings"][0]["id"]) for m in told] == [("firing", "gpt", finding.id)]
    assert abs(looked - time.time()) < 60
    assert first_exit == 0, collector.log.read_text()
    assert not alive(process)
    assert url not in collector.log.read_text()

    again = start_collector(db, "--diagnosis", "on")
    eventually(lambda: workers(again.process.pid))
    (process,) = workers(again.process.pid)
    again.process.kill()
    again.process.wait()
    eventually(lambda: not alive(process), why=lambda: "the process outlives a collector that was killed")
    assert len(told) == 1, "what was told is not told again after a restart"


def test_what_judges_lets_ingest_go_first_and_what_writes_does_not_wait(
    tmp_path: Path, start_collector: Callable[..., Any]
) -> None:
    """A transaction of a process that waits for a processor would hold up the collector's."""
    collector = start_collector(f"sqlite:///{tmp_path}/test.db", "--diagnosis", "on")
    (process,) = eventually(lambda: workers(collector.process.pid))
    eventually(lambda: os.getpriority(os.PRIO_PROCESS, process) == NICE)

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def judge_and_write() -> tuple[int, int]:
        engine = open_engine(f"sqlite:///{tmp_path}/test.db")
        writing = Transactions(engine)
        step_back()
        nice = niceness(), writing.run(lambda _: niceness())
        writing.close()
        return nice

    with ThreadPoolExecutor(1) as thread:  # it keeps what it sets
        judging, writing = thread.submit(judge_and_write).result()

    assert judging == NICE
    assert writing == niceness()
    assert os.getsid(process) == os.getsid(collector.process.pid), "how nice it is counts within a session alone"
    assert os.getpgid(process) != os.getpgid(collector.process.pid), "Ctrl-C is the collector's"


def test_a_diagnosing_process_that_dies_is_started_again(tmp_path: Path, start_collector: Callable[..., Any]) -> None:
    collector = start_collector(f"sqlite:///{tmp_path}/test.db", "--diagnosis", "on")
    (process,) = eventually(lambda: workers(collector.process.pid))

    os.kill(process, 9)

    again = eventually(lambda: [each for each in workers(collector.process.pid) if each != process])
    assert collector.health()[0] == 200
    assert collector.terminate() == 0
    assert not any(map(alive, again))
