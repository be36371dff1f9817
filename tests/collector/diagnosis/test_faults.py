"""Real training with one thing broken: the right rule names the right tensor within five steps, as the worst finding.

Healthy training, the same model under every recipe, gives no warning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import faults
import inject_fault
from fp8core import AmaxScaling, ConstantScaling, CurrentScaling, DelayedScaling, Override
from fp8core.recipes import Recipe
from fp8core.records import Role
from fp8scope_collector.diagnosis.engine import diagnose
from fp8scope_collector.diagnosis.finding import Finding, Severity
from fp8scope_collector.diagnosis.window import Window, cut

LAYER = "blocks.1.mlp.fc1"
CONSTANT = ConstantScaling(input=4, weight=11, grad_output=18)  # fits this model: 0 clipped, under 1 % lost
AT, SETTLED = 12, 34
WITHIN_STEPS = 5


@dataclass(frozen=True)
class Case:
    """A fault, and what must be said of it; `alone`: of this tensor and of no other."""

    recipe: Recipe
    fault: faults.Fault | None
    at: int
    rule: str
    layer: str | None = LAYER
    role: Role | None = Role.WEIGHT
    severity: Severity = Severity.CRITICAL
    alone: bool = False
    options: Any = None

    def told_by(self, finding: Finding) -> bool:
        """Whether a finding says what is wrong; None allows any layer or role, or none."""
        if finding.rule != self.rule:
            return False
        if finding.slot is None:
            return self.layer is None and self.role is None
        return self.layer in (None, finding.slot.layer) and self.role in (None, finding.slot.role)


CASES = {
    "learning rate x30": Case(
        *(AmaxScaling(), faults.higher_learning_rate(SETTLED), SETTLED, "amax-growth", None),
        severity=Severity.WARNING,
    ),
    "one weight row x2^8": Case(
        AmaxScaling(), faults.corrupted_weight_row(AT, LAYER), AT, "weight-scale-jump", alone=True
    ),
    "a constant three exponents too high": Case(
        *(CONSTANT, None, 0, "overflow", LAYER, Role.INPUT),
        alone=True,
        options={"overrides": [Override(LAYER, role="input", recipe=ConstantScaling(scale_exp2=10))]},
    ),
    "gradients x2^-20, constant scale": Case(
        *(CONSTANT, faults.scaled_gradients(AT, 2.0**-20), AT, "underflow", None, Role.GRAD_OUTPUT)
    ),
    "gradients x2^-20, delayed scale": Case(
        *(DelayedScaling(), faults.scaled_gradients(AT, 2.0**-20), AT, "underflow", None, Role.GRAD_OUTPUT)
    ),
    "NaN in one batch": Case(
        *(AmaxScaling(), faults.nan_in_a_batch(AT), AT, "nonfinite", "blocks.0.attn.qkv", Role.INPUT)
    ),
    "delayed scale frozen": Case(
        *(DelayedScaling(), faults.frozen_state(AT, "blocks.1.mlp.fc2", Role.WEIGHT), AT, "scale-frozen"),
        layer="blocks.1.mlp.fc2",
        alone=True,
    ),
    "delayed scale never updated": Case(
        *(DelayedScaling(), faults.frozen_state(0, LAYER, Role.INPUT), 0, "scale-frozen", LAYER, Role.INPUT),
        alone=True,
    ),
    "spike under delayed scaling": Case(
        *(DelayedScaling(), faults.spike_in_one_step(AT, LAYER), AT, "history-pinned", LAYER, Role.INPUT),
        alone=True,
        severity=Severity.WARNING,
    ),
    "dead layer": Case(
        *(AmaxScaling(), faults.dead_layer(AT, LAYER), AT, "dead-tensor", LAYER, Role.GRAD_OUTPUT),
        severity=Severity.WARNING,
    ),
    "gradients x32": Case(
        *(AmaxScaling(), faults.scaled_gradients(SETTLED, 32.0), SETTLED, "gradient-scale-falling"),
        *("blocks.1.mlp.fc1", Role.GRAD_OUTPUT, Severity.WARNING),
    ),
    "a rank's weight changed": Case(
        *(AmaxScaling(), faults.changed_weight_of_a_rank(AT, LAYER), AT, "weights-diverged"),
        alone=True,
        options={"ranks": 2},
    ),
    "a SwiGLU channel doubles": Case(
        *(AmaxScaling(), inject_fault.growing_outlier(40), 40, "amax-growth", "blocks.1.mlp.down", Role.INPUT),
        severity=Severity.WARNING,
        options={"swiglu": True},
    ),
    "a rank killed": Case(
        *(AmaxScaling(), inject_fault.killed(AT), AT, "rank-missing", None, None, Severity.WARNING),
        options={"ranks": 2},
    ),
    "a clamp of 8": Case(
        *(AmaxScaling(clamp=8), None, 0, "scale-clamped", None, None, Severity.WARNING),
    ),
}


def test_the_library_has_a_case_for_each_of_its_faults() -> None:
    rules = {(case.rule, case.role) for case in CASES.values()}

    for name, spec in inject_fault.FAULTS.items():
        assert {(spec.rule, Role(spec.role) if spec.role else None)} & rules, name


def upto(window: Window, step: int) -> list[Finding]:
    """What was known when `step` had been recorded."""
    return list(diagnose([next(cut(window, step + 1))]).findings)


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_named_within_five_steps(name: str) -> None:
    case = CASES[name]

    window = faults.record(case.recipe, case.fault, steps=case.at + WITHIN_STEPS + 1, **(case.options or {}))

    found = {step: upto(window, step) for step in range(max(case.at - 1, 0), window.steps.size)}
    if case.at:
        assert [finding for finding in found[case.at - 1] if finding.severity >= Severity.WARNING] == []
    detected = next(step for step, told in found.items() if any(map(case.told_by, told)))
    print(f"{name}: told {detected - case.at} steps after it began")
    last = found[window.steps.size - 1]
    assert (last[0].rule, last[0].severity) == (case.rule, case.severity)
    assert next(filter(case.told_by, last)).first_step >= case.at
    if case.alone:
        assert {finding.slot for finding in last if finding.rule == case.rule} == {last[0].slot}


def test_nan_reaches_the_loss_and_its_finding_names_the_origin() -> None:
    window = faults.record(AmaxScaling(), faults.nan_in_a_batch(2), steps=4)

    (loss,) = [finding for finding in upto(window, 3) if finding.rule == "loss-nonfinite"]

    assert (loss.first_step, loss.severity) == (2, Severity.CRITICAL)
    assert loss.note == "first not finite: input of blocks.0.attn.qkv at step 2"


def test_a_scale_that_flaps_is_seen_within_its_sixteen_rows() -> None:
    window = faults.record(AmaxScaling(), faults.alternating_input(6, LAYER), steps=16)

    found = [finding.slot for finding in upto(window, 15) if finding.rule == "scale-flapping"]

    assert found[0] is not None
    assert (found[0].layer, found[0].role) == (LAYER, Role.INPUT)
    assert not {slot.layer for slot in found if slot} & {"blocks.0.mlp.fc1", "blocks.1.attn.qkv"}, "layers before it"


def test_small_gradients_are_no_fault_under_just_in_time_scaling() -> None:
    window = faults.record(AmaxScaling(), faults.scaled_gradients(6, 2.0**-20), steps=12)

    assert upto(window, 11) == []


HEALTHY: dict[str, Callable[[], Recipe]] = {
    "AmaxScaling": AmaxScaling,
    "CurrentScaling": CurrentScaling,
    "DelayedScaling": DelayedScaling,
    "short history": lambda: DelayedScaling(history_len=16),
    "ConstantScaling": lambda: CONSTANT,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_training_gives_no_warning(name: str) -> None:
    window = faults.record(HEALTHY[name](), seed=1 + list(HEALTHY).index(name), steps=40)

    found = upto(window, 39)

    assert [finding for finding in found if finding.severity >= Severity.WARNING] == []


def test_healthy_ranks_give_no_warning(two_ranks: Window) -> None:
    assert [finding for finding in diagnose([two_ranks]).findings if finding.severity >= Severity.WARNING] == []


def test_a_constant_that_fits_no_gradient_is_found() -> None:
    """The paper's constants assume a loss scale: 2^0 loses the gradients of a loss that has none."""
    window = faults.record(ConstantScaling(), steps=6)

    worst = upto(window, 5)[0]

    assert (worst.rule, worst.severity) == ("underflow", Severity.CRITICAL)
    assert worst.slot is not None
    assert worst.slot.role == Role.GRAD_OUTPUT
    assert worst.first_step == 0
