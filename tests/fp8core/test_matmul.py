"""The FP8 product against float64: what is lost is the order of a float32 sum, or one rounding to bfloat16."""

from __future__ import annotations

import pytest
import torch

from fp8core import matmul
from fp8core.formats import E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, Fp8Format
from fp8core.matmul import emulated_mm, inverse_of_product, scaled_mm

SHAPES = [(16, 16, 16), (1, 300, 1), (3, 1023, 5), (64, 256, 128), (128, 2048, 48), (17, 4096, 33)]


def operand(rows: int, columns: int, fmt: Fp8Format, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * fmt.max / 8
    return x.clamp(-fmt.max, fmt.max).to(getattr(torch, fmt.torch_dtype))


def float64_product(a: torch.Tensor, b: torch.Tensor, s_a: torch.Tensor, s_b: torch.Tensor) -> torch.Tensor:
    return (a.double() @ b.double()) / (s_a.double() * s_b.double())


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
@pytest.mark.parametrize(("fmt_a", "fmt_b"), [(E4M3FN, E4M3FN), (E5M2, E4M3FN), (E5M2FNUZ, E4M3FNUZ), (E5M2, E5M2)])
def test_float32_product_is_within_1e_6_of_float64(M: int, K: int, N: int, fmt_a: Fp8Format, fmt_b: Fp8Format) -> None:
    a, b = operand(M, K, fmt_a, 0), operand(K, N, fmt_b, 1)
    s_a, s_b = torch.tensor(3.7), torch.tensor(0.011)

    y = scaled_mm(a, b, s_a, s_b, out_dtype=torch.float32)

    exact = float64_product(a, b, s_a, s_b)
    assert (y - exact).norm() / exact.norm() <= 1e-6


@pytest.mark.parametrize(("M", "K", "N"), [*SHAPES, (256, 1024, 256)])
@pytest.mark.parametrize("scales", [(8.0, 0.25), (3.7, 0.011)], ids=["powers of two", "any"])
def test_bfloat16_product_is_the_rounded_float64_one(M: int, K: int, N: int, scales: tuple[float, float]) -> None:
    a, b = operand(M, K, E4M3FN, 0), operand(K, N, E4M3FN, 1)
    s_a, s_b = torch.tensor(scales[0]), torch.tensor(scales[1])

    y = scaled_mm(a, b, s_a, s_b, out_dtype=torch.bfloat16)

    off = (y != float64_product(a, b, s_a, s_b).to(torch.bfloat16)).double().mean().item()
    assert off <= 1e-3, f"{off:.2%} of the elements"


def test_fast_path_gives_the_same_bits_where_both_scales_are_powers_of_two() -> None:
    a, b = operand(96, 512, E5M2, 0), operand(64, 512, E4M3FN, 1).t()
    s_a, s_b = torch.tensor(2.0**20), torch.tensor(2.0**-3)

    fast, reference = (emulated_mm(a, b, s_a, s_b, torch.bfloat16, fast=fast) for fast in (True, False))

    assert (fast != reference).double().mean() <= 1e-3  # a sum that another order puts on the other side of a tie


def test_fast_path_would_round_twice_under_other_scales() -> None:
    a, b = operand(96, 512, E4M3FN, 0), operand(512, 64, E4M3FN, 1)
    s_a, s_b = torch.tensor(3.7), torch.tensor(1.3)

    fast, reference = (emulated_mm(a, b, s_a, s_b, torch.bfloat16, fast=fast) for fast in (True, False))

    assert (fast != reference).double().mean() > 0.1


def test_transposed_views_are_multiplied_as_they_are() -> None:
    a, b = operand(48, 32, E4M3FN, 0), operand(24, 48, E4M3FN, 1)
    one = torch.tensor(1.0)

    y = scaled_mm(a.t(), b.t(), one, one, out_dtype=torch.float32)

    assert torch.equal(y, a.float().t() @ b.float().t())
    assert torch.equal(y, scaled_mm(a.t().contiguous(), b.t().contiguous(), one, one, out_dtype=torch.float32))


@pytest.mark.parametrize(("M", "K", "N"), [(0, 16, 16), (16, 0, 16), (16, 16, 0)])
def test_empty_operands_give_zeros_of_the_right_shape(M: int, K: int, N: int) -> None:
    a, b, one = operand(M, K, E4M3FN, 0), operand(K, N, E4M3FN, 1), torch.tensor(1.0)

    y = scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)

    assert y.shape == (M, N)
    assert not y.any()


def test_autocast_does_not_reach_into_the_product() -> None:
    a, b, one = operand(16, 64, E4M3FN, 0), operand(64, 16, E4M3FN, 1), torch.tensor(1.0)
    outside = scaled_mm(a, b, one, one, out_dtype=torch.float32)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scaled_mm(a, b, one, one, out_dtype=torch.float32)

    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_scales_at_their_limits_do_not_make_nan() -> None:
    for exp2, expected in ((-126, 3.4028235e38), (126, 0.0)):
        scale = torch.tensor(2.0**exp2)

        assert inverse_of_product(scale, scale).item() == pytest.approx(expected)


def test_opposite_scales_at_their_limits_cancel() -> None:
    assert inverse_of_product(torch.tensor(2.0**126), torch.tensor(2.0**-120)).item() == 2.0**-6


def test_padding_for_tensor_cores_changes_no_sum() -> None:
    a, b = operand(5, 19, E4M3FN, 0), operand(21, 19, E4M3FN, 1)

    padded_a, padded_b = matmul._padded_to_16(a, rows=False), matmul._padded_to_16(b, rows=True)

    assert padded_a.shape == (5, 32)
    assert padded_b.shape == (32, 32)
    assert torch.equal((padded_a.float() @ padded_b.float().t())[:5, :21], a.float() @ b.float().t())
    assert matmul._padded_to_16(operand(16, 32, E5M2, 0), rows=True).shape == (16, 32)


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "K", "N"), [*SHAPES, (512, 1024, 768)])
@pytest.mark.parametrize(("fmt_a", "fmt_b"), [(E4M3FN, E4M3FN), (E5M2, E4M3FN)])
def test_tensor_cores_agree_with_float64(M: int, K: int, N: int, fmt_a: Fp8Format, fmt_b: Fp8Format) -> None:
    if not torch.cuda.is_available() or not matmul.has_fp8_tensor_cores(torch.device("cuda", 0)):
        pytest.skip("no FP8 tensor cores")
    a, b = operand(M, K, fmt_a, 0).cuda(), operand(N, K, fmt_b, 1).cuda().t()
    s_a, s_b = torch.tensor(3.7, device="cuda"), torch.tensor(0.011, device="cuda")

    y = scaled_mm(a, b, s_a, s_b, out_dtype=torch.float32)

    exact = float64_product(a, b, s_a, s_b)
    assert (y - exact).norm() / exact.norm() <= 2e-4  # Hopper accumulates in about 22 bits (fast accumulation off)
