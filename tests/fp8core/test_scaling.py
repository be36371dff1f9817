"""Scales are exact: the reference against rational arithmetic, the device's against the reference, bit for bit."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8core import device_scaling
from fp8core.formats import E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, FORMATS, Fp8Format
from fp8core.recipes import DelayedScaling
from fp8core.scaling import FLOAT32_MAX, DelayedState, current_scale, delayed_update, scale_exp2_from_amax

EDGES = [0.0, math.inf, math.nan, 2.0**-149, 2.0**-126, FLOAT32_MAX, 1.0, 448.0, 240.0, 57344.0]
positive_float32 = st.floats(min_value=2.0**-149, max_value=FLOAT32_MAX, width=32)


def every_bf16() -> torch.Tensor:
    """Every positive finite bfloat16, as float32."""
    return torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def random_amaxes(count: int) -> torch.Tensor:
    """Positive finite float32 numbers with uniformly distributed bits."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 0x7F800000, (count,), generator=generator, dtype=torch.int32).view(torch.float32)


@settings(max_examples=300, deadline=None)
@given(amax=positive_float32, fmt=st.sampled_from(list(FORMATS.values())), margin=st.integers(-4, 8))
def test_scale_exp2_is_the_floor_of_the_exact_logarithm(amax: float, fmt: Fp8Format, margin: int) -> None:
    scale_exp2 = scale_exp2_from_amax(amax, fmt, margin=margin, clamp=1000) + margin

    assert Fraction(amax) * Fraction(2) ** scale_exp2 <= Fraction(fmt.max)
    assert Fraction(amax) * Fraction(2) ** (scale_exp2 + 1) > Fraction(fmt.max)


def exact_scale_exp2(amax: float, fmt: Fp8Format) -> int:
    """floor(log2(max / amax)) in rational arithmetic."""
    ratio = Fraction(fmt.max) / Fraction(amax)
    exp2 = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    return exp2 if Fraction(2) ** exp2 <= ratio else exp2 - 1


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_ten_thousand_scales_and_all_boundaries_equal_rational_arithmetic(fmt: Fp8Format) -> None:
    at = torch.tensor([math.ldexp(fmt.max, exp2) for exp2 in range(-149, 128)], dtype=torch.float64).float()
    at = at[(at > 0) & at.isfinite()]
    zero, infinity = torch.tensor(0.0), torch.tensor(math.inf)
    boundaries = torch.cat([at.nextafter(zero), at, at.nextafter(infinity)])
    amaxes = torch.cat([random_amaxes(10_000), boundaries[(boundaries > 0) & boundaries.isfinite()]])

    reference = [scale_exp2_from_amax(amax, fmt, clamp=126) for amax in amaxes.tolist()]
    on_device = device_scaling.amax_scale(amaxes, fmt, 0, 126).log2().int().tolist()

    exact = [max(-126, min(126, exact_scale_exp2(amax, fmt))) for amax in amaxes.tolist()]
    assert reference == exact
    assert on_device == exact


def test_amax_one_ulp_above_a_power_of_two_of_max_does_not_round_up() -> None:
    amax = np.nextafter(np.float32(240.0), np.float32(np.inf)) * np.float32(2.0**-10)

    assert math.floor(np.log2(np.float32(240.0) / amax)) == 10  # a floating logarithm does: this scale would clip
    assert scale_exp2_from_amax(float(amax), E4M3FNUZ) == 9


def test_values_of_the_papers_own_test() -> None:
    # arXiv 2309.17224's code: uniform(-64, -32), amax 62.837.
    assert scale_exp2_from_amax(62.837, E4M3FNUZ) == 1
    assert scale_exp2_from_amax(62.837, E5M2FNUZ) == 9


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
def test_unusable_amax_gives_scale_one_whatever_the_margin(amax: float) -> None:
    assert scale_exp2_from_amax(amax, E5M2, margin=3) == 0
    assert current_scale(amax, E4M3FN) == 1.0


def test_scale_exp2_is_clamped_after_the_margin() -> None:
    assert scale_exp2_from_amax(1e-30, E5M2, margin=3, clamp=31) == 31
    assert scale_exp2_from_amax(2.0**-149, E5M2) == 126
    assert scale_exp2_from_amax(FLOAT32_MAX, E4M3FN, margin=100) == -126


def test_negative_amax_is_refused_with_the_value() -> None:
    with pytest.raises(ValueError, match=r"amax is -1\.0"):
        scale_exp2_from_amax(-1.0, E4M3FN)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_device_scale_equals_the_reference_for_every_bf16_amax(fmt: Fp8Format) -> None:
    amaxes = torch.cat([every_bf16(), torch.tensor(EDGES)])

    on_device = device_scaling.amax_scale(amaxes, fmt, 3, 126)

    reference = [math.ldexp(1.0, scale_exp2_from_amax(amax, fmt, margin=3)) for amax in amaxes.tolist()]
    assert on_device.tolist() == reference


@pytest.mark.parametrize("round_down", [False, True])
def test_device_current_scale_equals_the_reference(round_down: bool) -> None:
    amaxes = torch.cat([random_amaxes(20_000), torch.tensor(EDGES)])

    on_device = device_scaling.current_scale(amaxes, E4M3FN, round_down=round_down)

    reference = [current_scale(amax, E4M3FN, power_of_two=round_down) for amax in amaxes.tolist()]
    assert on_device.tolist() == reference


def test_current_scale_is_the_quotient_rounded_once() -> None:
    # Dividing a Python number by a tensor is reciprocal and product in torch: 27 % of scales are one ulp off.
    amaxes = random_amaxes(1_000_000)
    amaxes = amaxes[amaxes > 1e-12]

    scale = device_scaling.current_scale(amaxes, E4M3FN)

    assert torch.equal(scale, (448.0 / amaxes.double()).float())
    assert not torch.equal(scale, 448.0 / amaxes)


def test_current_scale_of_a_tiny_amax_is_the_largest_float32() -> None:
    assert current_scale(2.0**-149, E4M3FN) == FLOAT32_MAX
    assert current_scale(2.0**-149, E4M3FN, power_of_two=True) == 2.0**127


@pytest.mark.parametrize("exp2", range(-126, 128))
def test_powers_of_two_are_exact(exp2: int) -> None:
    assert device_scaling.power_of_two(torch.tensor(exp2)).item() == math.ldexp(1.0, exp2)


# ------------------------------------------------------------------------------------------------ delayed scaling


def run_reference(recipe: DelayedScaling, amaxes: list[float]) -> list[float]:
    """The scale that each cast uses, and the one left for the next."""
    state, scales = DelayedState(), []
    for amax in amaxes:
        scales.append(state.scale)
        state = delayed_update(state, amax, E4M3FN, recipe)
    return [*scales, state.scale]


def run_on_device(recipe: DelayedScaling, amaxes: list[float]) -> list[float]:
    state, scales = device_scaling.new_state(recipe), []
    for amax in amaxes:
        scales.append(device_scaling.next_scale(state).item())
        state = device_scaling.delayed_update(state, torch.tensor(amax), E4M3FN, recipe)
    return [*scales, device_scaling.next_scale(state).item()]


def test_delayed_scale_is_that_of_the_history_before() -> None:
    recipe = DelayedScaling(history_len=2, margin_bits=1)

    assert run_reference(recipe, [448.0, 224.0, 112.0, 56.0]) == [1.0, 0.5, 0.5, 1.0, 2.0]


def test_most_recent_looks_at_the_newest_amax_only() -> None:
    recipe = DelayedScaling(history_len=16, algo="most_recent")

    assert run_reference(recipe, [448.0, 224.0, 896.0]) == [1.0, 1.0, 2.0, 0.5]


def test_zero_amax_changes_neither_scale_nor_history() -> None:
    recipe = DelayedScaling(history_len=2)
    before = delayed_update(DelayedState(), 224.0, E4M3FN, recipe)

    assert delayed_update(before, 0.0, E4M3FN, recipe) == before


@pytest.mark.parametrize("algo", ["max", "most_recent"])
def test_infinite_amax_keeps_the_scale_until_it_leaves_the_window(algo: str) -> None:
    recipe = DelayedScaling(history_len=2, algo=algo)  # type: ignore[arg-type]  # parametrized text

    scales = run_reference(recipe, [224.0, math.inf, 112.0, 112.0])

    assert scales == [1.0, 2.0, 2.0, 2.0 if algo == "max" else 4.0, 4.0]


def test_nan_amax_is_passed_over_by_max_and_keeps_the_scale_under_most_recent() -> None:
    assert run_reference(DelayedScaling(history_len=3), [224.0, math.nan, 112.0]) == [1.0, 2.0, 2.0, 2.0]
    assert run_reference(DelayedScaling(history_len=1), [224.0, math.nan]) == [1.0, 2.0, 2.0]
    assert run_reference(DelayedScaling(algo="most_recent"), [224.0, math.nan, 112.0]) == [1.0, 2.0, 2.0, 4.0]


def test_a_spike_holds_the_scale_down_until_it_leaves_the_window() -> None:
    amaxes = [224.0, 448.0 * 16, 224.0, 224.0, 224.0]

    # The spike itself is cast with the scale from before it: it clips. From then on it is in the window for 3 casts.
    assert run_reference(DelayedScaling(history_len=3), amaxes) == [1.0, 2.0, 2.0**-4, 2.0**-4, 2.0**-4, 2.0]
    assert run_reference(DelayedScaling(algo="most_recent"), amaxes) == [1.0, 2.0, 2.0**-4, 2.0, 2.0, 2.0]
    assert run_reference(DelayedScaling(history_len=3, margin_bits=2), amaxes)[1:3] == [0.5, 2.0**-6]


@settings(max_examples=60, deadline=None)
@given(
    amaxes=st.lists(positive_float32 | st.sampled_from([0.0, math.inf, math.nan]), max_size=12),
    history_len=st.integers(1, 4),
    algo=st.sampled_from(["max", "most_recent"]),
    margin_bits=st.integers(-2, 3),
    power_of_two=st.booleans(),
)
def test_delayed_scaling_on_the_device_equals_the_reference(
    amaxes: list[float], history_len: int, algo: str, margin_bits: int, power_of_two: bool
) -> None:
    recipe = DelayedScaling(history_len, algo, margin_bits, power_of_two)  # type: ignore[arg-type]  # drawn text

    assert run_on_device(recipe, amaxes) == run_reference(recipe, amaxes)


def test_scales_are_computed_on_meta() -> None:
    amax = torch.zeros((), device="meta")
    recipe = DelayedScaling(history_len=4)

    assert device_scaling.amax_scale(amax, E4M3FN, 0, 126).is_meta
    assert device_scaling.current_scale(amax, E4M3FN, round_down=True).is_meta
    assert device_scaling.delayed_update(device_scaling.new_state(recipe, "meta"), amax, E4M3FN, recipe).shape == (6,)
