"""The quick form of the paper's study, from the command to the pages: one very small model says what the paper says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paper.measure import contiguous, depth, dynamics, passing, place
from paper.report import page
from paper.study import full_plan, in_order

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "examples" / "paper" / "study.py"
SIZE = "0.1M"


def test_quick_form_finds_what_the_paper_found_and_runs_nothing_twice(tmp_path: Path) -> None:
    """One test: the half minute that the study takes is spent once, however many processes share the tests."""
    command = [sys.executable, STUDY, "--quick", "--dir", tmp_path]

    subprocess.run(command, check=True, timeout=600)

    found = json.loads((tmp_path / "results.json").read_text())
    scores = found["inference"][SIZE]["text"]
    at_rest = {int(constant): loss for constant, loss in scores["constants"].items()}
    inside = passing(at_rest, scores["fp32_of_sweep"], lower_is_better=True)
    assert_amax_learns_as_float32_does(found)
    assert_constants_pass_in_one_piece_with_a_cliff_above_and_a_slope_below(at_rest, inside)
    assert_upper_end_that_one_run_advises_is_the_sweeps_within_one(found, inside)
    assert_scales_of_gradients_flip_most_and_rise_at_first(found)
    assert_page_and_report_show_every_run_and_figure(tmp_path, found)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    again = subprocess.run(command, check=True, capture_output=True, text=True)

    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()} == before
    assert again.stdout.startswith("6 runs, ")


def assert_amax_learns_as_float32_does(found: Any) -> None:
    losses = {method: own["0"] for method, own in found["losses"][SIZE].items()}

    # Blocks that compute nothing lose 5 %: this model needs them.
    assert losses["amax-graphcore"] < 1.015 * losses["fp32"]
    assert losses["constant-8"] > 1.03 * losses["fp32"]
    assert losses["constant+5"] < 1.015 * losses["fp32"]
    assert losses["constant+9"] > 1.03 * losses["fp32"]


def assert_constants_pass_in_one_piece_with_a_cliff_above_and_a_slope_below(
    at_rest: dict[int, float], inside: list[int]
) -> None:
    below = [at_rest[constant] for constant in range(inside[0], inside[0] - 3, -1)]
    above = [at_rest[constant] for constant in range(inside[-1], inside[-1] + 3)]

    assert len(inside) >= 5
    assert inside == list(range(inside[0], inside[-1] + 1))
    assert all(worse > better for better, worse in pairwise(below))
    assert all(worse > better for better, worse in pairwise(above))
    assert above[1] - above[0] > below[1] - below[0]  # the first that is too high costs more than the first too low


def assert_upper_end_that_one_run_advises_is_the_sweeps_within_one(found: Any, inside: list[int]) -> None:
    for source in ("advice", "advice_from_shadow"):
        (everything,) = (each for each in found["sizes"][SIZE][source]["constant"] if each["role"] is None)

        assert abs(everything["upper"]["scale_exp2"] - inside[-1]) <= 1, source
        assert everything["upper"]["tensor"].endswith("input"), source


def assert_scales_of_gradients_flip_most_and_rise_at_first(found: Any) -> None:
    moved = found["sizes"][SIZE]["dynamics"]

    assert moved["grad_output"]["flips_per_step"] > 2 * moved["input"]["flips_per_step"]
    assert moved["input"]["flips_per_step"] > moved["weight"]["flips_per_step"]
    assert moved["grad_output"]["rise_in_first_steps"] >= 1
    assert moved["weight"]["rise_in_first_steps"] <= 0


def assert_page_and_report_show_every_run_and_figure(folder: Path, found: Any) -> None:
    text = (folder / "study.md").read_text()
    report = (folder / "report.html").read_text()
    figures = re.findall(r"!\[.*\]\(images/study/(.+)\.png\)", text)

    assert f"{found['losses'][SIZE]['fp32']['0']:.4f}" in text
    assert "IMAGES" not in text
    assert len(figures) == 5
    assert [name for name in figures if f'id="{name}"' not in report] == []
    assert [name for name in figures if not (folder / "images" / f"{name}.png").exists()] == []


# What it is computed with ------------------------------------------------------------------------------------------


def test_every_run_comes_after_the_one_whose_weights_it_starts_from() -> None:
    seen: set[str] = set()
    for work in in_order(full_plan()):
        assert work.start is None or work.start in seen, work.name
        seen.add(work.name)


def test_the_longest_run_of_a_stage_comes_first() -> None:
    training, tuning, _, evaluation = full_plan()

    assert [work.size.name for work in in_order([training])[:6]] == ["12M"] * 6
    assert [work.size.name for work in in_order([tuning])[-12:]] == ["1M"] * 12
    assert in_order([evaluation])[0].name == "12M-infer-kind"


def test_documented_study_is_what_its_results_file_says() -> None:
    results = json.loads((STUDY.parent / "results" / "study.json").read_text())

    assert (ROOT / "docs/study.md").read_text() == page(results, images="images/study"), (
        "run `make paper ARGS=--report`"
    )


def test_half_a_percent_passes_and_more_does_not() -> None:
    assert passing({0: 1.0051, 1: 1.005, 2: 0.9}, 1.0, lower_is_better=True) == [1, 2]
    assert passing({0: 79.5, 1: 79.6, 2: 90.0}, 80.0, lower_is_better=False) == [1, 2]


def test_an_interval_is_contiguous_unless_a_constant_within_it_was_tried_and_failed() -> None:
    assert contiguous([2, 4], [0, 2, 4, 6])
    assert not contiguous([2, 6], [0, 2, 4, 6])
    assert contiguous([], [0, 2])


def test_scales_are_told_by_block_kind_and_role() -> None:
    moved = {"blocks.0.attn.qkv input": np.array([5, 5, 6]), "gpt.blocks.1.attn.qkv input": np.array([9, 8, 8])}

    assert place("gpt.blocks.1.attn.qkv input") == (1, "attn.qkv", "input")
    assert depth(moved)["input"]["modes"] == {"attn.qkv": [5, 8]}
    assert depth(moved)["input"]["range_over_depth"] == {"attn.qkv": 3}


def test_rise_is_from_the_first_step_to_the_end_of_the_warm_up_and_flips_are_per_step() -> None:
    steps = np.concatenate([np.arange(10), np.full(91, 10)])  # ten flips in a hundred steps
    still = np.zeros(101, np.int64)
    moved = {"b.0.fc grad_output": steps, "b.0.fc weight": still, "b.0.fc input": still}

    found = dynamics(moved)

    assert found["grad_output"]["flips_per_step"] == pytest.approx(0.1)
    assert found["grad_output"]["rise_in_first_steps"] == 10
    assert found["weight"]["flips_per_step"] == 0
