"""`fp8scope-agent`: misuse gets a sentence, status counts what waits, sync leaves what it cannot send."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import fp8scope_agent as fp8scope
from fake_collector import FakeCollector
from fp8scope_agent.cli import main

NOBODY = "127.0.0.1:1"


@pytest.fixture
def spool(model: nn.Module, train: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The spools of two runs that found no collector."""
    monkeypatch.setenv("FP8SCOPE_LINGER_S", "0")
    for run in ("one", "two"):
        monitor = fp8scope.attach(model, run=run, project="p", collector=NOBODY)
        train(model, monitor, 4)
        monitor.close(timeout_s=2)
    return tmp_path / "spool"


def test_status_and_sync_take_a_folder_above_several_sources(
    spool: Path, collector: FakeCollector, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8SCOPE_COLLECTOR", collector.address)

    assert main(["status", str(spool)]) == 1
    assert main(["sync", str(spool / "p+one")]) == 0
    assert main(["status", str(spool)]) == 1
    assert main(["sync", str(spool)]) == 0
    assert main(["status", str(spool)]) == 0

    assert sorted((source.open.run, len(source.rows)) for source in collector.sources.values()) == [
        ("one", 24),
        ("two", 24),
    ]
    out = capsys.readouterr().out
    assert "run p/one, rank 0 of 1, life 1" in out
    assert "  sent 0 rows\n  24 rows and 6 histograms in 6 records wait" in out
    assert "  sent 24 rows\n  0 rows and 0 histograms in 0 records wait" in out


def test_status_says_what_was_dropped_and_why_after_the_trainer_is_gone(
    model: nn.Module, train: Callable[..., list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = fp8scope.attach(model, run="r", collector=NOBODY)
    monitor.step(step=5, loss="a word")
    monitor.step(step=5)
    monitor.close(timeout_s=2)

    assert main(["status", str(tmp_path / "spool")]) == 1

    out = capsys.readouterr().out
    assert "  dropped 1 rows: scalar_refused" in out
    assert "  dropped 6 rows: step_refused" in out


def test_sync_gives_up_without_progress_and_says_why(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(spool / "p+one"), "--collector", NOBODY, "--patience-s", "0.3"]) == 1

    captured = capsys.readouterr()
    assert "24 rows still wait" in captured.err
    assert f"no collector answers at {NOBODY}" in captured.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["status", "{tmp}/nothing"], "no spool in"),
        (["sync", "{tmp}", "--collector", "host:1"], "no spool in"),
        (["sync", "{tmp}", "--collector", "host"], "no HOST:PORT"),
    ],
)
def test_misuse_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2

    captured = capsys.readouterr()
    assert sentence in captured.err
    assert "Traceback" not in captured.err


def test_a_source_whose_description_is_damaged_does_not_stop_the_others(
    spool: Path, collector: FakeCollector, capsys: pytest.CaptureFixture[str]
) -> None:
    next((spool / "p+one").rglob("source.pb")).write_bytes(b"\xff\xff\xff")

    assert main(["status", str(spool)]) == 1
    assert main(["sync", str(spool), "--collector", collector.address]) == 1

    captured = capsys.readouterr()
    assert captured.err.count("is damaged") == 2
    assert "run p/two" in captured.out
    assert collector.source.open.run == "two"
    assert len(collector.source.rows) == 24
