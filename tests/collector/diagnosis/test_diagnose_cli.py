"""`fp8scope diagnose`: a stored run is judged as the recording was, and said in text and in JSON."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import faults
from fp8core import AmaxScaling, DelayedScaling
from fp8core.records import Role
from fp8scope_collector.cli import main
from fp8scope_collector.decode import decode_open
from fp8scope_collector.diagnosis.engine import diagnose
from fp8scope_collector.diagnosis.source import open_run
from fp8scope_collector.diagnosis.window import Window
from fp8scope_collector.limits import Limits
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.writer import StatsWriter
from fp8scope_protos.v1 import telemetry_pb2 as pb
from recordings import Job

LAYER = "blocks.1.mlp.fc1"
ROLES = {Role.INPUT: pb.ROLE_INPUT, Role.WEIGHT: pb.ROLE_WEIGHT, Role.GRAD_OUTPUT: pb.ROLE_GRAD_OUTPUT}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The URL of an empty database."""
    url = f"sqlite:///{tmp_path}/test.db"
    migrate(open_engine(url))
    return url


def store(url: str, window: Window, *, incarnation: int = 1, first: int = 0) -> None:
    """Sends a recording's rows from step index `first` on through the collector's decoder and writer."""
    Job(open_engine(url), window, incarnation=incarnation, now_unix_ns=1).send(first, now_unix_ns=1)


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and errors of `fp8scope`."""
    monkeypatch.setattr(sys, "argv", ["fp8scope", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_a_stored_run_is_judged_as_its_recording(url: str) -> None:
    recording = faults.record(AmaxScaling(), faults.changed_weight_of_a_rank(6, LAYER), steps=12, ranks=2)
    store(url, recording)

    stored = open_run(url, "gpt")

    expected = [repr(finding) for finding in diagnose([recording]).findings]
    for piece_rows in (None, 5):
        found = diagnose(stored.pieces(piece_rows=piece_rows)).findings
        named = [re.sub(r"module_class=.*?out_features=\d+, ", "", text) for text in map(repr, found)]
        assert named == [re.sub(r"module_class=.*?out_features=\d+, ", "", text) for text in expected]
    assert "weights-diverged" in expected[0]


def test_a_resumed_run_is_judged_by_each_life_s_recipe_and_own_steps(url: str) -> None:
    healthy = faults.record(AmaxScaling(), steps=10)
    store(url, faults.record(AmaxScaling(), faults.nan_in_a_batch(8), steps=10))
    store(url, faults.record(DelayedScaling(), steps=14), incarnation=2, first=6)

    pieces = list(open_run(url, "gpt").pieces())

    assert [(piece.steps[0], piece.steps[-1], piece.life_row) for piece in pieces] == [(0, 5, 0), (6, 13, 6)]
    assert [piece.slots[0].recipe for piece in pieces] == [repr(AmaxScaling()), repr(DelayedScaling())]
    np.testing.assert_array_equal(pieces[0]["amax"], healthy["amax"][:, :6])
    assert all(np.isfinite(piece.scalars["loss"].values).all() for piece in pieces), "the NaN was in a forgotten life"
    assert diagnose(pieces).findings == ()


def test_text_names_tensor_steps_evidence_cause_and_remedy(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store(url, faults.record(DelayedScaling(), faults.spike_in_one_step(6, LAYER), steps=12))

    code, out, _ = call(monkeypatch, capsys, "diagnose", "gpt", "--db", url)

    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "gpt: 12 recorded steps, 1 warning"
    assert lines[2] == f"warning   input of {LAYER}  history-pinned  steps 7 to 11 (the last)"
    assert re.match(r" +one large value in the amax history holds the scale down: \d+\.\d bits", lines[3])
    assert lines[4].strip().startswith("cause:  A single step had a value far above the others")
    assert f"Override('{LAYER}', role='input', recipe=CurrentScaling())" in lines[5]


def test_many_tensors_of_one_rule_are_counted_and_json_has_them_all(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store(url, faults.record(AmaxScaling(), faults.nan_in_a_batch(2), steps=4))

    _, text, _ = call(monkeypatch, capsys, "diagnose", "gpt", "--db", url)
    _, out, _ = call(monkeypatch, capsys, "diagnose", "gpt", "--db", url, "--json")

    diagnosis = json.loads(out)
    assert diagnosis["version"] == 1
    assert (diagnosis["run"], diagnosis["recorded_steps"], diagnosis["omitted"]) == ("gpt", 4, 0)
    found = diagnosis["findings"]
    nonfinite = [finding for finding in found if finding["rule"] == "nonfinite"]
    assert f"not shown: {len(nonfinite) - 8} of nonfinite; --json has all" in text
    assert text.count("cause:") == len({finding["rule"] for finding in found})
    page = (Path(__file__).parents[3] / "docs" / "diagnosis.md").read_text()
    assert set(found[0]) == set(re.findall(r"^\| `(\w+)` \|", page.split("## The JSON form")[1], re.MULTILINE)), "docs"
    assert found[0] | {"numbers": {}, "evidence": "", "cause": "", "remedy": "", "change": ""} == {
        "severity": "critical",
        "rule": "nonfinite",
        "layer": "blocks.0.attn.qkv",
        "role": "input",
        "format": "E4M3FN",
        "recipe": repr(AmaxScaling()),
        "ranks": [0],
        "first_step": 2,
        "last_step": 3,
        "lasting": True,
        "rows": 2,
        "worst_step": 3,
        "numbers": {},
        "evidence": "",
        "cause": "",
        "remedy": "",
        "change": "",
    }


def test_a_healthy_run_says_so_and_a_wrong_name_which_there_are(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store(url, faults.record(AmaxScaling(), steps=4))

    assert call(monkeypatch, capsys, "diagnose", "gpt", "--db", url)[:2] == (
        0,
        "gpt: 4 recorded steps, nothing found\n",
    )
    code, _, err = call(monkeypatch, capsys, "diagnose", "gtp", "--db", url)
    assert (code, err) == (1, "fp8scope: run 'gtp' is unknown; there are: gpt\n")


def test_a_run_without_rows_is_a_sentence(
    url: str, wire: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    StatsWriter(open_engine(url)).register(decode_open(wire.open("empty"), Limits()), now_unix_ns=1)

    code, _, err = call(monkeypatch, capsys, "diagnose", "empty", "--db", url)

    assert (code, err) == (1, "fp8scope: run 'empty' has no rows of statistics; there is nothing to diagnose\n")
