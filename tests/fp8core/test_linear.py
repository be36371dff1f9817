"""Fp8Linear is an nn.Linear whose GEMMs run in FP8, and leaves exact statistics of its three casts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fp8core
from fp8core import AmaxScaling, ConstantScaling, CurrentScaling, DelayedScaling, Fp8Linear, StatsArena
from fp8core.formats import GRAPHCORE, HYBRID, FormatPair
from fp8core.quantize import quantize
from fp8core.recipes import Recipe
from fp8core.records import COLUMNS, Role, decode_arena
from fp8core.scaling import scale_exp2_from_amax

RECIPES: list[Recipe] = [AmaxScaling(), ConstantScaling(3), CurrentScaling(), DelayedScaling(history_len=4)]


def layer(
    in_features: int = 32, out_features: int = 48, *, dtype: torch.dtype = torch.bfloat16, **how: object
) -> Fp8Linear:
    torch.manual_seed(0)
    return Fp8Linear(in_features, out_features, dtype=dtype, **how)  # type: ignore[arg-type]  # passed on


def bound(module: Fp8Linear) -> StatsArena:
    arena = StatsArena(3)
    module.bind_stats(arena, {role: slot for slot, role in enumerate(Role)})
    return arena


def sqnr_db(exact: torch.Tensor, got: torch.Tensor) -> float:
    exact = exact.detach().double()
    return float(10 * torch.log10(exact.square().sum() / (exact - got.detach().double()).square().sum()))


@pytest.mark.parametrize("formats", [HYBRID, GRAPHCORE], ids=str)
@pytest.mark.parametrize("recipe", [AmaxScaling(), CurrentScaling()], ids=repr)
def test_output_and_gradients_are_close_to_the_high_precision_ones(recipe: Recipe, formats: FormatPair) -> None:
    module = layer(256, 128, dtype=torch.float32, recipe=recipe, formats=formats)
    x = torch.randn(64, 256, requires_grad=True)
    y = module(x)
    dy = torch.randn_like(y)
    y.backward(dy)

    reference = nn.functional.linear(x, module.weight, module.bias)
    dx, dw, db = torch.autograd.grad(reference, (x, module.weight, module.bias), dy)
    assert x.grad is not None
    assert sqnr_db(reference, y) > 25
    assert sqnr_db(dx, x.grad) > 20
    assert sqnr_db(dw, module.weight.grad) > 20
    torch.testing.assert_close(module.bias.grad, db)


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_gemms_are_those_of_the_quantised_tensors(recipe: Recipe) -> None:
    # The algebra, spelled out in float64: y = qx qw' / s, dx = qdy qw / s, dw = qdy' qx / s.
    module = layer(dtype=torch.float32, recipe=recipe, bias=False)
    x = torch.randn(24, 32, requires_grad=True)
    dy = torch.randn(24, 48)
    twin = copy.deepcopy(module)

    y = module(x)
    y.backward(dy)

    def cast(tensor: torch.Tensor, role: Role) -> torch.Tensor:
        fmt = HYBRID.fmt(role)
        q, scale = quantize(tensor, recipe=recipe, role=role, fmt=fmt, state=twin._buffers[f"fp8_state_{role}"])
        return q.double() / scale.double()

    x_q, w_q, dy_q = cast(x, Role.INPUT), cast(module.weight, Role.WEIGHT), cast(dy, Role.GRAD_OUTPUT)
    for got, exact in ((y, x_q @ w_q.t()), (x.grad, dy_q @ w_q), (module.weight.grad, dy_q.t() @ x_q)):
        assert got is not None
        assert (got - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (2, 1, 3, 32), (0, 32), (2, 0, 32)], ids=str)
def test_any_leading_dimensions_are_taken(shape: tuple[int, ...]) -> None:
    module = layer()
    x = torch.randn(shape).bfloat16().requires_grad_()

    y = module(x)
    y.sum().backward()

    assert y.shape == (*shape[:-1], 48)
    assert x.grad is not None
    assert x.grad.shape == shape
    assert module.weight.grad is not None
    assert torch.equal(y, module(x.reshape(-1, 32) if x.numel() else x).view_as(y))


def test_non_contiguous_inputs_and_gradients_give_the_same_as_contiguous_ones() -> None:
    module = layer()
    x = torch.randn(32, 24).bfloat16().t().requires_grad_()
    dy = torch.randn(48, 24).bfloat16().t()

    y = module(x)
    got = torch.autograd.grad(y, (x, module.weight), dy)

    x_c = x.detach().contiguous().requires_grad_()
    y_c = module(x_c)
    expected = torch.autograd.grad(y_c, (x_c, module.weight), dy.contiguous())
    assert torch.equal(y, y_c)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_expanded_gradient_of_a_sum_is_taken() -> None:
    module = layer()

    module(torch.randn(4, 32).bfloat16()).sum().backward()

    assert module.weight.grad is not None
    assert module.weight.grad.isfinite().all()


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (7, 13), (17, 100)])
def test_features_need_not_be_multiples_of_16(in_features: int, out_features: int) -> None:
    module = layer(in_features, out_features)
    x = torch.randn(5, in_features).bfloat16().requires_grad_()

    module(x).sum().backward()

    assert x.grad is not None
    assert x.grad.shape == (5, in_features)


def test_wrong_number_of_features_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"x is \[4, 31\]; expected 32 features"):
        layer()(torch.randn(4, 31))


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        layer(dtype=torch.float64)


def test_without_bias_there_is_none() -> None:
    module = layer(bias=False)

    assert module.bias is None
    assert list(module.state_dict()) == ["weight"]


def test_frozen_weight_and_input_without_gradient_are_spared() -> None:
    module = layer(bias=False)
    module.weight.requires_grad_(False)
    x = torch.randn(4, 32).bfloat16().requires_grad_()
    module(x).sum().backward()

    assert module.weight.grad is None
    assert x.grad is not None

    module.weight.requires_grad_(True)
    module(x.detach()).sum().backward()

    assert module.weight.grad is not None


# ---------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("master", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_sets_the_result_and_leaves_gradients_in_the_master_weights_dtype(master: torch.dtype) -> None:
    module = layer(dtype=master)
    x = torch.randn(8, 32, dtype=master, requires_grad=True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    y.float().sum().backward()

    assert y.dtype == torch.bfloat16
    assert module.weight.grad is not None
    assert x.grad is not None
    assert (module.weight.grad.dtype, x.grad.dtype) == (master, master)


def test_float32_master_weights_are_rounded_once_under_autocast() -> None:
    module = layer(dtype=torch.float32, bias=False)
    x = torch.randn(8, 32)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = module(x)

    assert torch.equal(under_autocast, module(x).bfloat16())


# --------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("formats", [HYBRID, GRAPHCORE], ids=str)
def test_rows_tell_what_the_casts_did(formats: FormatPair) -> None:
    module = layer(formats=formats)
    arena = bound(module)
    x = torch.randn(8, 32).bfloat16()
    dy = torch.randn(8, 48).bfloat16() * 1e-5

    module(x).backward(dy)

    rows = decode_arena(arena.words.numpy())
    assert rows.slot.tolist() == [0, 1, 2]
    for row, (role, tensor) in enumerate(zip(Role, (x, module.weight, dy), strict=True)):
        amax = float(rows.columns["amax"][row])
        exp2 = scale_exp2_from_amax(amax, formats.fmt(role), margin=AmaxScaling().margin(role))
        assert amax == tensor.abs().max().item()
        assert rows.columns["scale_min"][row] == rows.columns["scale_max"][row] == 2.0**exp2
        assert rows.columns["numel"][row] == tensor.numel()
        assert rows.columns["overflow"][row] == 0


def test_micro_batches_merge_and_weights_are_overwritten() -> None:
    module = layer()
    arena = bound(module)

    for _ in range(3):
        module(torch.randn(8, 32).bfloat16()).sum().backward()

    rows = decode_arena(arena.words.numpy())
    assert rows.columns["numel"].tolist() == [3 * 8 * 32, 32 * 48, 3 * 8 * 48]
    assert arena.words[:, 0].tolist() == [3, 1, 3]


def test_evaluation_writes_nothing() -> None:
    module = layer().eval()
    arena = bound(module)

    module(torch.randn(8, 32).bfloat16())

    assert arena.words[:, 0].tolist() == [0, 0, 0]


def test_empty_batch_leaves_no_row() -> None:
    module = layer()
    arena = bound(module)

    module(torch.empty(0, 32).bfloat16()).sum().backward()

    assert arena.words[:, 0].tolist() == [0, 1, 0]


def test_unbound_and_closed_arenas_are_written_to_no_more() -> None:
    module = layer()
    arena = bound(module)
    arena.close()
    module(torch.randn(8, 32).bfloat16()).sum().backward()
    second = bound(module)
    module.unbind_stats()
    module(torch.randn(8, 32).bfloat16()).sum().backward()

    assert arena.words[:, 0].tolist() == second.words[:, 0].tolist() == [0, 0, 0]


def test_roles_without_a_slot_are_not_recorded() -> None:
    module = layer()
    arena = StatsArena(1)
    module.bind_stats(arena, {Role.GRAD_OUTPUT: 0})

    module(torch.randn(8, 32).bfloat16()).sum().backward()

    assert decode_arena(arena.words.numpy()).columns["numel"].tolist() == [8 * 48]


def test_a_slot_outside_the_arena_is_refused() -> None:
    with pytest.raises(ValueError, match=r"slots \{'input': 7\} are not in the arena, which has 3"):
        layer().bind_stats(StatsArena(3), {Role.INPUT: 7})


def test_statistics_do_not_change_a_bit_of_the_training() -> None:
    quiet, watched = layer(), layer()
    bound(watched)
    x = torch.randn(8, 32).bfloat16()

    for module in (quiet, watched):
        module(x).square().sum().backward()

    assert torch.equal(quiet.weight.grad, watched.weight.grad)  # type: ignore[arg-type]  # both have one


def test_stats_spec_names_format_and_margin() -> None:
    assert [layer().stats_spec(role) for role in Role] == [("E4M3FN", 0), ("E4M3FN", 0), ("E5M2", 3)]


@pytest.mark.parametrize("eager", [False, True], ids=["best kernel", "eager kernel"])
def test_sqnr_of_normal_data_is_that_of_the_formats(eager: bool, request: pytest.FixtureRequest) -> None:
    if eager:
        request.getfixturevalue("eager_kernels")
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for fmt, expected in ((fp8core.E4M3FN, 31.5), (fp8core.E5M2, 25.5)):
        arena = StatsArena(1)

        slot = torch.tensor(0)
        quantize(x, recipe=AmaxScaling(), role="input", fmt=fmt, arena=arena.handle, slot=slot)

        columns = decode_arena(arena.words.numpy()).columns
        ratio = torch.tensor(float(columns["sum_sq"][0]) / float(columns["err_sq"][0]))
        assert 10 * torch.log10(ratio).item() == pytest.approx(expected, abs=0.1)


# ------------------------------------------------------------------------------------------------- as an nn.Linear


def test_state_dict_goes_both_ways_between_it_and_nn_linear() -> None:
    plain, module = nn.Linear(32, 48).bfloat16(), layer()

    module.load_state_dict(plain.state_dict())
    back = nn.Linear(32, 48).bfloat16()
    back.load_state_dict(module.state_dict())

    assert torch.equal(back.weight, plain.weight)
    assert list(module.state_dict()) == list(plain.state_dict())


def test_delayed_scalings_history_travels_in_the_state_dict_and_may_be_missing_from_it() -> None:
    module = layer(recipe=DelayedScaling(history_len=4))
    module(torch.randn(8, 32).bfloat16()).sum().backward()

    resumed = layer(recipe=DelayedScaling(history_len=4))
    resumed.load_state_dict(module.state_dict())
    from_plain = layer(recipe=DelayedScaling(history_len=4))
    from_plain.load_state_dict(nn.Linear(32, 48).state_dict())
    other_recipe = layer()
    other_recipe.load_state_dict(module.state_dict())

    assert torch.equal(resumed._buffers["fp8_state_input"], module._buffers["fp8_state_input"])  # type: ignore[arg-type]
    nn.Linear(32, 48).load_state_dict(module.state_dict(), strict=False)


def test_delayed_state_survives_a_change_of_dtype() -> None:
    module = layer(recipe=DelayedScaling(history_len=4), dtype=torch.float32)
    module(torch.randn(8, 32)).sum().backward()
    before = module.get_buffer("fp8_state_input").clone()

    module.bfloat16()

    assert torch.equal(module.get_buffer("fp8_state_input"), before)


def test_delayed_scaling_stands_still_in_evaluation() -> None:
    module = layer(recipe=DelayedScaling(history_len=4)).eval()
    before = module.get_buffer("fp8_state_input").clone()

    module(torch.randn(8, 32).bfloat16())

    assert torch.equal(module.get_buffer("fp8_state_input"), before)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_a_copy_computes_the_same_and_does_not_write_into_the_originals_rows(recipe: Recipe, duplicate: object) -> None:
    module = layer(recipe=recipe)
    arena = bound(module)
    twin = duplicate(module)  # type: ignore[operator]  # a parametrized function
    x = torch.randn(8, 32).bfloat16()

    y = twin(x)

    assert arena.words[:, 0].tolist() == [0, 0, 0]
    assert torch.equal(y, module(x))
    assert twin.recipe == recipe


def test_rows_have_the_columns_of_the_records() -> None:
    assert StatsArena(2).words.shape == (2, len(COLUMNS))


def test_reset_parameters_forgets_the_history() -> None:
    module = layer(recipe=DelayedScaling(history_len=4))
    fresh = module.get_buffer("fp8_state_input").clone()
    module(torch.randn(8, 32).bfloat16())

    module.reset_parameters()

    assert torch.equal(module.get_buffer("fp8_state_input"), fresh)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_torchs_default_dtype_changes_nothing(recipe: Recipe, default: torch.dtype, eager_kernels: None) -> None:
    x = torch.randn(8, 32).bfloat16()
    expected = layer(recipe=recipe)(x)

    torch.set_default_dtype(default)
    try:
        module = layer(recipe=recipe)
        arena = bound(module)
        y = module(x)
        module(torch.empty(0, 32, dtype=torch.bfloat16))
    finally:
        torch.set_default_dtype(torch.float32)

    assert y.shape == expected.shape
    assert y.dtype == torch.bfloat16
    assert arena.words[0, 0] == 1


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x = torch.randn(4, 32).bfloat16().requires_grad_()
    (dx,) = torch.autograd.grad(layer()(x).square().sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
