"""The quantise operation: what it refuses, when it records, and what each recipe makes of odd tensors."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from fp8core import (
    E4M3FN,
    E5M2,
    AmaxScaling,
    ConstantScaling,
    CurrentScaling,
    DelayedScaling,
    StatsArena,
    exponent_histogram,
)
from fp8core.device_scaling import new_state, next_scale
from fp8core.formats import FORMATS, Fp8Format
from fp8core.quantize import quantize, recast
from fp8core.recipes import Recipe
from fp8core.records import Role, decode_arena

RECIPES: list[Recipe] = [AmaxScaling(), ConstantScaling(2), CurrentScaling(), DelayedScaling(history_len=2)]


def state_for(recipe: Recipe) -> torch.Tensor | None:
    return new_state(recipe) if isinstance(recipe, DelayedScaling) else None


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_zeros_are_cast_with_scale_one_or_the_constant(recipe: Recipe) -> None:
    q, scale = quantize(torch.zeros(8), recipe=recipe, role="input", fmt=E4M3FN, state=state_for(recipe))

    assert scale.item() == (4.0 if isinstance(recipe, ConstantScaling) else 1.0)
    assert not q.float().any()


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_nonfinite_elements_do_not_change_the_scale_of_the_others(recipe: Recipe) -> None:
    x = torch.tensor([1.5, -3.0, math.inf, -math.inf, math.nan])
    arena, slot = StatsArena(1), torch.tensor(0)

    q, scale = quantize(
        x, recipe=recipe, role="input", fmt=E4M3FN, state=state_for(recipe), arena=arena.handle, slot=slot
    )

    _, without = quantize(x[:2], recipe=recipe, role="input", fmt=E4M3FN, state=state_for(recipe))
    row = {name: column[0] for name, column in decode_arena(arena.words.numpy()).columns.items()}
    assert torch.equal(scale, without)
    assert q.float()[2:4].tolist() == [448.0, -448.0]
    assert q.float()[4].isnan()
    assert (row["amax"], row["nonfinite"], row["overflow"]) == (3.0, 3, 0)


UNUSUAL = {
    "NaN": [math.nan, 1.0],
    "Inf": [math.inf, -math.inf, 1.0],
    "nothing finite": [math.nan, math.inf],
    "zeros": [0.0, -0.0],
    "float32 subnormals": [2.0**-140, -(2.0**-149)],
    "huge": [3.0e38, -1.0],
}


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_no_unusual_tensor_makes_a_scale_unusable_or_hangs_it(recipe: Recipe, fmt: Fp8Format, role: Role) -> None:
    state = state_for(recipe)

    def cast(values: list[float]) -> tuple[torch.Tensor, float]:
        q, scale = quantize(torch.tensor(values), recipe=recipe, role=role, fmt=fmt, state=state)
        return q.float(), scale.item()

    for name, values in UNUSUAL.items():
        q, scale = cast(values)

        assert 0 < scale < math.inf, name
        assert q.isnan().tolist() == [math.isnan(value) for value in values], name
        assert (q.nan_to_num().abs() <= fmt.max).all(), name
        if name == "zeros":
            assert not q.any()
            # A negative zero keeps its sign where the format has one, and is zero where its code would mean NaN.
            assert q.signbit().tolist() == [False, not fmt.name.endswith("FNUZ")]
    for _ in range(3):  # as long as the longest history
        q, scale = cast([0.5, 1.0])
    usual, expected = quantize(torch.tensor([0.5, 1.0]), recipe=recipe, role=role, fmt=fmt, state=_settled(recipe, fmt))
    assert (q.tolist(), scale) == (usual.float().tolist(), expected.item())


def _settled(recipe: Recipe, fmt: Fp8Format) -> torch.Tensor | None:
    """The state of a tensor that was always like the last three."""
    state = state_for(recipe)
    for _ in range(3 if state is not None else 0):
        quantize(torch.tensor([0.5, 1.0]), recipe=recipe, role="input", fmt=fmt, state=state)
    return state


def test_an_overflow_under_delayed_scaling_is_counted_and_gone_at_the_next_cast() -> None:
    recipe, arena, slot = DelayedScaling(history_len=2), StatsArena(1), torch.tensor(0)
    state = new_state(recipe)
    overflows = []
    for x in (torch.full((4,), 1.0), torch.full((4,), 1000.0), torch.full((4,), 1000.0)):
        arena.reset()
        quantize(x, recipe=recipe, role="input", fmt=E4M3FN, state=state, arena=arena.handle, slot=slot)
        overflows.append(int(decode_arena(arena.words.numpy()).columns["overflow"][0]))

    assert overflows == [0, 4, 0]
    assert next_scale(state) == pytest.approx(0.448)


def test_delayed_scaling_without_state_is_refused() -> None:
    with pytest.raises(ValueError, match="DelayedScaling needs state: make one with"):
        quantize(torch.ones(4), recipe=DelayedScaling(), role="input", fmt=E4M3FN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"x is {dtype}; FP8 is cast from bfloat16, float16 or float32"):
        quantize(torch.ones(4, dtype=dtype), recipe=AmaxScaling(), role="input", fmt=E4M3FN)


def test_recasting_with_the_scale_gives_the_same_codes() -> None:
    x = torch.randn(64, 3)

    q, scale = quantize(x, recipe=CurrentScaling(), role="weight", fmt=E5M2)

    assert torch.equal(recast(x, scale, E5M2).view(torch.uint8), q.view(torch.uint8))


@pytest.mark.parametrize("role", ["input", "weight", "grad_output"])
def test_inside_a_backward_only_gradients_are_recorded(role: str) -> None:
    arena, slot = StatsArena(1), torch.tensor(0)
    x = torch.ones(4, requires_grad=True)
    y = x * 2
    y.register_hook(
        lambda dy: quantize(dy, recipe=AmaxScaling(), role=role, fmt=E5M2, arena=arena.handle, slot=slot) and None
    )

    y.sum().backward()

    assert arena.words[0, 0] == (1 if role == "grad_output" else 0)


@pytest.mark.parametrize("training", [True, False])
def test_a_recomputed_cast_repeats_the_delayed_scale_and_leaves_the_state_alone(training: bool) -> None:
    recipe = DelayedScaling(history_len=2)
    state, scales = new_state(recipe), []
    quantize(torch.ones(4), recipe=recipe, role="input", fmt=E4M3FN, state=state)
    x = torch.full((4,), 3.0, requires_grad=True)

    def cast() -> None:
        _, scale = quantize(x, recipe=recipe, role="input", fmt=E4M3FN, state=state, update_state=training)
        scales.append(scale.item())

    cast()
    after = state.clone()
    y = x * 2
    y.register_hook(lambda _: cast())
    y.sum().backward()

    assert scales == [448.0, 448.0]
    assert torch.equal(state, after)
    assert next_scale(state) == (torch.tensor(448.0) / 3.0 if training else 448.0)


# ---------------------------------------------------------------------------------------------------------- arena


def test_a_forgotten_arena_is_freed_and_its_handle_writes_to_nowhere() -> None:
    arena = StatsArena(1)
    handle = arena.handle
    del arena

    quantize(torch.ones(4), recipe=AmaxScaling(), role="input", fmt=E4M3FN, arena=handle, slot=torch.tensor(0))


def test_a_paused_arena_is_not_written_to() -> None:
    arena = StatsArena(1)
    arena.recording = False

    quantize(torch.ones(4), recipe=AmaxScaling(), role="input", fmt=E4M3FN, arena=arena.handle, slot=torch.tensor(0))

    assert arena.words[0, 0] == 0


def test_handles_are_unique_over_threads_and_never_zero() -> None:
    arenas: list[StatsArena] = []
    threads = [threading.Thread(target=lambda: arenas.extend(StatsArena(1) for _ in range(50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    handles = {arena.handle for arena in arenas}
    assert len(handles) == 200
    assert 0 not in handles


def test_an_arena_of_no_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="slots is 0"):
        StatsArena(0)


def test_reset_empties_rows_and_histograms() -> None:
    arena, slot = StatsArena(2), torch.tensor(1)
    fresh = arena.words.clone()
    arena.record_histograms = True
    quantize(torch.ones(4), recipe=AmaxScaling(), role="input", fmt=E4M3FN, arena=arena.handle, slot=slot)

    arena.reset()

    assert torch.equal(arena.words, fresh)
    assert arena.histograms is not None
    assert not arena.histograms.any()


# ------------------------------------------------------------------------------------------------------ histograms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("eager", [False, True], ids=["best kernel", "eager kernel"])
def test_bins_are_powers_of_two(dtype: torch.dtype, eager: bool, request: pytest.FixtureRequest) -> None:
    if eager:
        request.getfixturevalue("eager_kernels")
    x = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0, 0.25, 2.0**-14, math.inf, math.nan]).to(dtype)

    counts = exponent_histogram(x)

    assert {bin_: int(n) for bin_, n in enumerate(counts) if n} == {0: 2, 127: 2, 128: 1, 125: 1, 113: 1, 255: 2}


def test_an_arena_collects_histograms_while_asked_to() -> None:
    arena, slots = StatsArena(2), [torch.tensor(0), torch.tensor(1)]

    def cast(slot: int, role: str) -> None:
        x = torch.ones(4)
        quantize(x, recipe=AmaxScaling(), role=role, fmt=E4M3FN, arena=arena.handle, slot=slots[slot])

    cast(0, "input")
    assert arena.histograms is None
    arena.record_histograms = True
    for _ in range(2):
        cast(0, "input")
        cast(1, "weight")

    assert arena.histograms is not None
    assert arena.histograms[:, 127].tolist() == [8, 4]


def test_a_histogram_bounds_what_another_scale_would_have_clipped() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 100
    counts = exponent_histogram(x)
    for exp2 in range(-4, 10):
        arena = StatsArena(1)
        recipe, slot = ConstantScaling(exp2), torch.tensor(0)
        quantize(x, recipe=recipe, role="input", fmt=E4M3FN, arena=arena.handle, slot=slot)
        clipped = int(decode_arena(arena.words.numpy()).columns["overflow"][0])

        doubtful = 127 + 8 - exp2  # the bin of 464 = 1.8125 * 2**8
        surely = int(counts[doubtful + 1 : 255].sum())
        assert surely <= clipped <= surely + int(counts[doubtful])
