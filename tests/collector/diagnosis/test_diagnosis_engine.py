"""Episodes do not depend on where a run is cut, memory on its length, or the answer on the order of chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fp8core import DelayedScaling
from fp8core.records import Role
from fp8scope_collector.diagnosis.catalogue import RULES
from fp8scope_collector.diagnosis.engine import diagnose
from fp8scope_collector.diagnosis.finding import Rule, Severity
from fp8scope_collector.diagnosis.thresholds import GAP_ROWS
from fp8scope_collector.diagnosis.window import FIELDS_READ, LOOKBACK, Context, Window, cut, slide
from fp8scope_collector.storage.readmodels import Slot


@pytest.mark.parametrize("rows", [1, 5, 64, 200])
@pytest.mark.parametrize("kind", ["noisy", "plateaus"])
def test_a_run_cut_anywhere_has_the_same_findings(request: pytest.FixtureRequest, kind: str, rows: int) -> None:
    run: Window = request.getfixturevalue(kind)
    whole = diagnose([run])

    pieces = diagnose(cut(run, rows))

    assert [repr(finding) for finding in pieces.findings] == [repr(finding) for finding in whole.findings]


def test_of_these_rows_every_rule_has_something_to_say(noisy: Window, plateaus: Window) -> None:
    spoke = {finding.rule for run in (noisy, plateaus) for finding in diagnose([run]).findings}

    assert {rule.name for rule in RULES} - spoke == {"run-silent"}, "which goes by the clock and not by rows"


def test_no_rule_looks_back_further_than_windows_reach() -> None:
    assert max(rule.reach for rule in RULES) <= LOOKBACK


def test_a_rule_that_got_a_third_of_the_rows_that_it_names_would_say_something_else(
    noisy: Window, plateaus: Window
) -> None:
    """So that the runs above, cut into single rows, show a rule that names too few."""

    def is_missed(rule: Rule) -> bool:
        short = [replace(rule, reach=rule.reach // 3)]
        return any(diagnose(cut(run, 1), rules=short) != diagnose([run], rules=[rule]) for run in (noisy, plateaus))

    assert [rule.name for rule in RULES if rule.reach and not is_missed(rule)] == []


def test_the_context_is_bounded_and_ends_with_a_process_life(noisy: Window) -> None:
    pieces = list(cut(noisy, 140))
    pieces[2] = replace(pieces[2], life_row=280)

    assert [window.fresh for window in slide(pieces)] == [0, LOOKBACK, 0]
    assert max(window.steps.size for window in slide(cut(noisy, 50))) == LOOKBACK + 50


def test_a_window_is_the_last_rows_of_the_run_in_the_arrays_of_the_window_before(noisy: Window) -> None:
    context, done, arrays = Context(), 0, []
    for rows in (40, 40, 40, 1, 3, 40):
        done += rows
        window = context.follow(_part(noisy, done - rows, done))

        first = max(0, done - rows - LOOKBACK)
        assert window.steps.tolist() == noisy.steps[first:done].tolist()
        assert (window.first_row, window.fresh) == (first, done - rows - first)
        for name in FIELDS_READ:
            np.testing.assert_array_equal(window[name], noisy[name][:, first:done])
        arrays.append(window["amax"])
        assert window.headroom.shape == window["amax"].shape
        assert context.last
        assert "headroom" not in vars(context.last), "what is derived is not kept"

    assert all(np.shares_memory(each, arrays[2]) for each in arrays[2:]), "the third is as long as any"


def test_a_rank_that_comes_late_has_no_rows_in_the_context_and_the_others_keep_theirs(noisy: Window) -> None:
    few = replace(noisy, ranks=noisy.ranks[:1], fields={name: values[:1] for name, values in noisy.fields.items()})
    context = Context()
    context.follow(_part(few, 0, 30))
    context.follow(_part(few, 30, 99))

    context.take_in(noisy.ranks)
    window = context.follow(_part(noisy, 99, 105))

    assert window.fresh == LOOKBACK
    for name in FIELDS_READ:
        np.testing.assert_array_equal(window[name][:1], noisy[name][:1, window.first_row : 105])
        assert np.isnan(window[name][1:, : window.fresh]).all()
        np.testing.assert_array_equal(window[name][1:, window.fresh :], noisy[name][1:, 99:105])


def _part(run: Window, first: int, end: int) -> Window:
    fields = {name: values[:, first:end] for name, values in run.fields.items()}
    return replace(run, steps=run.steps[first:end], fields=fields, first_row=run.first_row + first)


def test_one_finding_for_an_episode_and_another_after_a_pause() -> None:
    slots = (Slot(0, "fc", Role.INPUT, "Fp8Linear", 8, 8, "E4M3FN", repr(DelayedScaling()), 0),)
    shape = (1, 100, 1)
    fields = {name: np.zeros(shape) for name in FIELDS_READ}
    fields |= {"amax": np.full(shape, 448.0), "numel": np.full(shape, 1e4)}
    fields |= {"scale_min": np.ones(shape), "scale_max": np.ones(shape)}
    for step in (10, 12, 10 + 2 + GAP_ROWS, 60):
        fields["nonfinite"][0, step] = step

    findings = diagnose([Window(np.arange(100), (0,), slots, fields, {})]).findings

    told = [(f.first_step, f.last_step, f.rows, f.worst_step, f.numbers["count"]) for f in findings]
    assert told == [(10, 28, 3, 28, 28), (60, 60, 1, 60, 60)]


def test_the_worst_come_first_and_among_them_the_first_in_the_order_of_computation(noisy: Window) -> None:
    findings = diagnose([noisy]).findings

    assert [f.severity for f in findings] == sorted((f.severity for f in findings), reverse=True)
    critical = [f for f in findings if f.severity == Severity.CRITICAL]
    assert [f.first_step for f in critical] == sorted(f.first_step for f in critical)
    assert {f.slot.role for f in critical if f.slot} == set(Role)


def test_a_nan_forward_is_told_in_model_order_and_backward_from_the_end() -> None:
    slots = tuple(
        Slot(3 * i + j, f"blocks.{i}.fc", role, "Fp8Linear", 8, 8, "E4M3FN", "AmaxScaling()", 0)
        for i in range(3)
        for j, role in enumerate(Role)
    )
    shape = (1, 4, len(slots))
    fields = {name: np.ones(shape) for name in FIELDS_READ} | {
        "numel": np.full(shape, 9.0),
        "amax": np.full(shape, 448.0),
    }
    fields |= {"zeros": np.zeros(shape), "overflow": np.zeros(shape), "underflow": np.zeros(shape)}
    fields["nonfinite"][:, :2] = 0

    findings = diagnose([Window(np.arange(4), (0,), slots, fields, {})]).findings

    order = [(f.slot.layer[7], str(f.slot.role)) for f in findings if f.slot]
    assert order[:2] == [("0", "input"), ("0", "weight")]
    assert order[-3:] == [("2", "grad_output"), ("1", "grad_output"), ("0", "grad_output")]
