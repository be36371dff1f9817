"""Rules whose fault is in the rows themselves: rows taken away, a rank apart, a layer apart. The rows are real ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fp8core import AmaxScaling, ConstantScaling, DelayedScaling
from fp8core.records import Role
from fp8scope_collector.diagnosis.engine import diagnose
from fp8scope_collector.diagnosis.finding import Finding, Severity
from fp8scope_collector.diagnosis.window import FIELDS_READ, Floats, ScalarSeries, Window
from fp8scope_collector.storage.readmodels import Slot


def found(window: Window, rule: str) -> list[Finding]:
    return [finding for finding in diagnose([window]).findings if finding.rule == rule]


def changed(window: Window, **fields: Floats) -> Window:
    return replace(window, fields={**window.fields, **fields})


def without(window: Window, rank: int, steps: slice, slots: slice = slice(None)) -> Window:
    """The window without some rows."""
    fields = {name: values.copy() for name, values in window.fields.items()}
    for values in fields.values():
        values[rank, steps, slots] = np.nan
    return replace(window, fields=fields)


def long(window: Window, times: int) -> Window:
    """The last rows of a window again and again: a training that stands still."""
    fields = {
        name: np.concatenate([values] + [values[:, -8:]] * times, axis=1) for name, values in window.fields.items()
    }
    steps = np.arange(fields["amax"].shape[1])
    return replace(window, steps=steps, fields=fields, scalars={})


def test_a_rank_that_stops_is_found_after_five_steps(two_ranks: Window) -> None:
    assert found(without(two_ranks, 1, slice(20, None)), "rank-missing") == []

    (finding,) = found(without(two_ranks, 1, slice(14, None)), "rank-missing")

    assert (finding.ranks, finding.first_step, finding.slot) == ((1,), 14, None)


def test_steps_that_a_rank_left_out_are_counted(two_ranks: Window) -> None:
    (finding,) = found(without(two_ranks, 1, slice(10, 13)), "rows-missing")

    assert (finding.ranks, finding.first_step, finding.numbers["missing"]) == ((1,), 13, 3)


def test_steps_that_no_rank_has_are_counted(two_ranks: Window) -> None:
    steps = two_ranks.steps * 10
    steps[12:] += 40

    (finding,) = found(replace(two_ranks, steps=steps), "rows-missing")

    assert (finding.first_step, finding.numbers["missing"], finding.severity) == (160, 4, Severity.WARNING)


def test_a_tensor_without_rows_is_info(two_ranks: Window) -> None:
    (finding,) = found(without(two_ranks, 0, slice(10, 14), slice(4, 5)), "rows-missing")

    assert finding.slot == two_ranks.slots[4]
    assert (finding.ranks, finding.first_step, finding.last_step, finding.rows) == ((0,), 10, 13, 4)
    assert finding.severity == Severity.INFO


def test_a_rank_of_another_size_is_named(two_ranks: Window) -> None:
    amax = two_ranks["amax"].copy()
    amax[1, :, 3] *= 8

    (finding,) = found(changed(two_ranks, amax=amax), "scale-split")

    assert finding.slot == two_ranks.slots[3]
    assert finding.numbers["high"] == 1
    assert finding.numbers["low"] == 0
    assert finding.numbers["bits"] == pytest.approx(3, abs=0.5)


def test_shards_that_never_were_equal_have_not_diverged(two_ranks: Window) -> None:
    amax = two_ranks["amax"].copy()
    amax[1] *= 1.5

    assert found(changed(two_ranks, amax=amax), "weights-diverged") == []


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("rows", [slice(60, 61), slice(60, 76)])
def test_an_infinite_amax_is_no_level_and_only_what_counts_it_or_compares_ranks_tells_of_it(
    two_ranks: Window, rows: slice
) -> None:
    window = long(two_ranks, 8)
    before = {(finding.rule, finding.slot) for finding in diagnose([window]).findings}
    amax, nonfinite = window["amax"].copy(), window["nonfinite"].copy()
    amax[0, rows], nonfinite[0, rows] = np.inf, 3

    findings = diagnose([changed(window, amax=amax, nonfinite=nonfinite)]).findings

    assert {finding.rule for finding in findings if (finding.rule, finding.slot) not in before} == {
        "nonfinite",
        "weights-diverged",
    }


def test_an_input_that_keeps_doubling_is_found(two_ranks: Window) -> None:
    window = long(two_ranks, 16)
    amax = window["amax"].copy()
    amax[:, :, 3] *= 2.0 ** (np.arange(amax.shape[1]) / 24)

    (finding,) = found(changed(window, amax=amax), "amax-growth")

    assert finding.slot == window.slots[3]
    assert finding.numbers["bits"] >= 2


@pytest.mark.parametrize(
    ("bits", "told"),
    [
        ([0.5, 1.5], [41]),
        ([0.3, 1.0], [41]),
        ([0.5, 0.9], []),  # less than twice the largest before
        ([0.2, 1.2], []),  # one step, or a spike in one row
        ([3.0, 3.2], []),  # another level
        ([3.0, 0.0], []),
    ],
)
def test_an_input_that_doubles_within_two_rows_is_found_in_the_second(bits: list[float], told: list[int]) -> None:
    slots = tuple(Slot(i, f"blocks.{i}.fc", Role.INPUT, "Fp8Linear", 8, 8, "E4M3FN", "AmaxScaling()", 0) for i in [0])
    window = made(slots, steps=42)
    amax = np.full_like(window["amax"], 5.0)
    amax[0, 40:42, 0] *= 2.0 ** np.array(bits)

    assert [finding.first_step for finding in found(changed(window, amax=amax), "amax-growth")] == told


def test_a_first_layer_apart_is_info() -> None:
    recipe = AmaxScaling()
    slots = tuple(Slot(i, f"blocks.{i}.fc", Role.INPUT, "Fp8Linear", 8, 8, "E4M3FN", repr(recipe), 0) for i in range(6))
    window = made(slots, steps=40)
    amax = window["amax"].copy()
    amax[..., 0] *= 16

    (finding,) = found(changed(window, amax=amax), "depth-outlier")

    assert (finding.slot, finding.severity) == (slots[0], Severity.INFO)
    assert finding.numbers["bits"] == pytest.approx(4)


@pytest.mark.parametrize("recipe", [ConstantScaling(scale_exp2=-5), DelayedScaling()])
def test_range_left_unused_is_info(recipe: ConstantScaling | DelayedScaling) -> None:
    slots = (Slot(0, "fc", Role.INPUT, "Fp8Linear", 8, 8, "E4M3FN", repr(recipe), 0),)
    window = changed(made(slots, steps=20), amax=np.full((1, 20, 1), 1.0))

    (finding,) = found(window, "headroom-wasted")

    assert (finding.first_step, finding.severity) == (0, Severity.INFO)


def test_one_clipped_element_is_a_fault_under_just_in_time_scaling_only() -> None:
    for recipe, severities in ((AmaxScaling(), [Severity.CRITICAL]), (DelayedScaling(), []), (ConstantScaling(), [])):
        slots = (Slot(0, "fc", Role.INPUT, "Fp8Linear", 8, 8, "E4M3FN", repr(recipe), 0),)
        window = made(slots, steps=20)
        overflow = window["overflow"].copy()
        overflow[0, 9, 0] = 1

        told = found(changed(window, overflow=overflow), "overflow")

        assert [finding.severity for finding in told] == severities, recipe


def test_a_history_that_remembers_what_has_left_it_is_frozen() -> None:
    recipe = DelayedScaling(history_len=16)
    slots = (Slot(0, "fc", Role.WEIGHT, "Fp8Linear", 8, 8, "E4M3FN", repr(recipe), 0),)
    window = made(slots, steps=90)
    amax = window["amax"].copy()
    amax[:, 2:] *= 0.9

    (finding,) = found(changed(window, amax=amax), "scale-frozen")

    assert finding.first_step > 64


def test_a_loss_spike_names_the_tensor_that_moved_before_it(two_ranks: Window) -> None:
    window = long(two_ranks, 3)
    loss = np.full(window.steps.size, 4.0) + 0.01 * np.arange(window.steps.size) % 0.05
    loss[44:] = 7
    amax = window["amax"].copy()
    amax[0, 42:, 5] *= 32

    (finding,) = found(
        replace(changed(window, amax=amax), scalars={"train/loss": ScalarSeries(window.steps, loss)}), "loss-spike"
    )

    assert finding.first_step == 44
    assert finding.note.startswith(f"moved before it: grad_output of {window.slots[5].layer} by 4.")


def test_rows_of_another_tool_with_fields_missing_give_no_error(two_ranks: Window) -> None:
    """What Transformer Engine reports lacks counts; an unknown recipe has no rules of its own."""
    slots = tuple(replace(slot, recipe="Float8BlockScaling()", format="E4M3") for slot in two_ranks.slots)
    nothing = np.full_like(two_ranks["amax"], np.nan)
    window = changed(replace(two_ranks, slots=slots), overflow=nothing, underflow=nothing, zeros=nothing)

    assert diagnose([window]).findings == ()


def made(slots: tuple[Slot, ...], *, steps: int) -> Window:
    """Rows in which nothing happens: amax 448, scale 1, so that nothing is wrong under any recipe."""
    shape = (1, steps, len(slots))
    fields = {name: np.zeros(shape) for name in FIELDS_READ}
    fields |= {"amax": np.full(shape, 448.0), "numel": np.full(shape, 1e6)}
    fields |= {"scale_min": np.ones(shape), "scale_max": np.ones(shape)}
    return Window(np.arange(steps), (0,), slots, fields, {})
