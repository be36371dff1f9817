"""The FP8 product against float64: what is lost is the order of a float32 sum, or one rounding to bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8core import matmul
from fp8core.formats import E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, FORMATS, Fp8Format
from fp8core.kernels import cpu, cpu_build, eager
from fp8core.kernels.eager import inverse_of_product
from fp8core.matmul import bfloat16_mm, emulated_mm, float32_mm, scaled_mm

SHAPES = [(16, 16, 16), (1, 300, 1), (2, 1, 31), (3, 1023, 5), (64, 256, 128), (128, 2048, 48), (17, 4096, 33)]
THIN = [(1, 1023, 700), (300, 70, 1), (150, 16, 300), (100, 1, 70)]
LARGE = [(257, 1023, 511), (4096, 4096, 48), (31, 48, 4096), (1021, 4093, 67), (2048, 16, 2047)]
PAIRS = [(E4M3FN, E4M3FN), (E5M2, E4M3FN), (E5M2FNUZ, E4M3FNUZ), (E5M2, E5M2)]
POWERS_OF_TWO, ANY = (2.0**20, 0.25), (3.7, 0.011)
PATHS = ["eager", *(() if cpu.unavailable_reason() else cpu.engines())]


def operand(rows: int, columns: int, fmt: Fp8Format, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * fmt.max / 8
    return x.clamp(-fmt.max, fmt.max).to(getattr(torch, fmt.torch_dtype))


def operands(M: int, K: int, N: int, gemm: str, fmt_a: Fp8Format, fmt_b: Fp8Format) -> tuple[Tensor, Tensor]:
    """In the memory order that each GEMM of a linear layer finds its operands in."""
    a = operand(K, M, fmt_a, 0).t() if gemm == "wgrad" else operand(M, K, fmt_a, 0)
    b = operand(N, K, fmt_b, 1).t() if gemm == "fprop" else operand(K, N, fmt_b, 1)
    return a, b


def float64_product(a: Tensor, b: Tensor, s_a: Tensor, s_b: Tensor) -> Tensor:
    return (a.double() @ b.double()) / (s_a.double() * s_b.double())


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way to multiply on this machine."""
    if request.param == "eager":
        monkeypatch.setattr(matmul, "_operation", matmul.mm_body)
        monkeypatch.setattr(cpu, "product_or_none", cpu._no_product)
        monkeypatch.setattr(matmul, "kernels_for", lambda _: eager)
        yield "eager"
    else:
        fastest = cpu.engine()
        cpu.use_engine(request.param)
        yield request.param
        cpu.use_engine(fastest)


def assert_float32_product_is_exact(shape: tuple[int, int, int], gemm: str, fmts: tuple[Fp8Format, Fp8Format]) -> None:
    a, b = operands(*shape, gemm, *fmts)

    for s_a, s_b in (torch.tensor(POWERS_OF_TWO), torch.tensor(ANY)):
        y = scaled_mm(a, b, s_a, s_b, out_dtype=torch.float32)

        exact = float64_product(a, b, s_a, s_b)
        error = (y - exact).norm() / exact.norm()
        assert error <= 1e-6, f"{error:.1e} under scales {s_a}, {s_b}"


def assert_bfloat16_product_is_rounded_once(shape: tuple[int, int, int], gemm: str) -> None:
    a, b = operands(*shape, gemm, E4M3FN, E4M3FN)

    for scales, power_of_two in ((POWERS_OF_TWO, True), (POWERS_OF_TWO, False), (ANY, False)):
        s_a, s_b = torch.tensor(scales)
        y = scaled_mm(a, b, s_a, s_b, out_dtype=torch.bfloat16, power_of_two=power_of_two)

        off = (y != float64_product(a, b, s_a, s_b).to(torch.bfloat16)).double().mean().item()
        assert off <= 1e-3, f"{off:.2%} of the elements under scales {scales}, power_of_two={power_of_two}"


@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("shape", [*SHAPES, *THIN], ids=str)
@pytest.mark.parametrize("fmts", PAIRS, ids=lambda fmts: f"{fmts[0]}-{fmts[1]}")
def test_float32_product_is_within_1e_6_of_float64(
    shape: tuple[int, int, int], gemm: str, fmts: tuple[Fp8Format, Fp8Format], path: str
) -> None:
    assert_float32_product_is_exact(shape, gemm, fmts)


@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("shape", [*SHAPES, *THIN, (256, 1024, 256)], ids=str)
def test_bfloat16_product_is_the_rounded_float64_one(shape: tuple[int, int, int], gemm: str, path: str) -> None:
    assert_bfloat16_product_is_rounded_once(shape, gemm)


@pytest.mark.slow
@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_products_of_large_and_odd_shapes_are_exact_too(shape: tuple[int, int, int], gemm: str, path: str) -> None:
    for fmts in PAIRS:
        assert_float32_product_is_exact(shape, gemm, fmts)
    assert_bfloat16_product_is_rounded_once(shape, gemm)


def test_bfloat16_gemm_gives_the_same_bits_where_both_scales_are_powers_of_two() -> None:
    a, b = operand(96, 512, E5M2, 0), operand(64, 512, E4M3FN, 1).t()
    s_a, s_b = torch.tensor(2.0**20), torch.tensor(2.0**-3)

    fast, reference = (emulated_mm(a, b, s_a, s_b, torch.bfloat16, mm) for mm in (bfloat16_mm, float32_mm))

    assert (fast != reference).double().mean() <= 1e-3  # a sum that another order puts on the other side of a tie


def test_bfloat16_gemm_would_round_twice_under_other_scales() -> None:
    a, b = operand(96, 512, E4M3FN, 0), operand(512, 64, E4M3FN, 1)
    s_a, s_b = torch.tensor(3.7), torch.tensor(1.3)

    fast, reference = (emulated_mm(a, b, s_a, s_b, torch.bfloat16, mm) for mm in (bfloat16_mm, float32_mm))

    assert (fast != reference).double().mean() > 0.1


def test_transposed_views_are_multiplied_as_they_are() -> None:
    a, b = operand(48, 32, E4M3FN, 0), operand(24, 48, E4M3FN, 1)
    one = torch.tensor(1.0)

    y = scaled_mm(a.t(), b.t(), one, one, out_dtype=torch.float32)

    exact = a.double().t() @ b.double().t()
    assert (y - exact).norm() / exact.norm() <= 1e-6
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


def with_zeros(codes: Tensor, dim: int) -> Tensor:
    """A vector as the first row or column of a matrix of eight: so deep that tiles are used, where it is wide, too."""
    matrix = torch.zeros(codes.numel(), 8, dtype=torch.uint8).view(codes.dtype)
    matrix.view(torch.uint8)[:, 0] = codes.view(torch.uint8)
    return matrix if dim == 0 else matrix.t()


@pytest.mark.parametrize("width", [1, 40])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_every_code_is_multiplied_as_its_value(fmt: Fp8Format, width: int, path: str) -> None:
    dtype = getattr(torch, fmt.torch_dtype)
    codes, ones = torch.arange(256, dtype=torch.uint8).view(dtype), torch.ones(width).to(dtype)
    one = torch.tensor(1.0)

    by_row = scaled_mm(with_zeros(codes, 0), with_zeros(ones, 1), one, one, out_dtype=torch.float32)
    by_column = scaled_mm(with_zeros(ones, 0), with_zeros(codes, 1), one, one, out_dtype=torch.float32)

    expected = codes.float()[:, None].expand(256, width)
    torch.testing.assert_close(by_row, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(by_column, expected.t(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS, ids=str)
def test_an_outer_product_is_right_for_every_pair_of_codes(
    fmt_a: Fp8Format, fmt_b: Fp8Format, out_dtype: torch.dtype, path: str
) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    a, b = (codes.view(getattr(torch, fmt.torch_dtype)) for fmt in (fmt_a, fmt_b))
    s_a, s_b = torch.tensor(ANY)

    y = scaled_mm(a[:, None], b[None, :250], s_a, s_b, out_dtype=out_dtype)  # no multiple of a register

    expected = (a.float()[:, None] * b.float()[None, :250] * inverse_of_product(s_a, s_b)).to(out_dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [1, 40])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_unscaled_and_rounded_once_to_the_end_of_the_range(
    out_dtype: torch.dtype, width: int, path: str
) -> None:
    steps = torch.arange(2048.0)  # by their digits to the base 8; ties of bfloat16's to both sides are among them
    weights = torch.tensor([512.0, 64.0, 8.0, 1.0])
    a, b = torch.zeros(2048, 8), torch.zeros(8, width)  # as deep as tiles want
    a[:, :4] = steps[:, None] // weights % 8
    b[:4] = weights[:, None]
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e5m2)

    for scales in ((1.0, 1.0), (2.0**66, 2.0**66), (2.0**60, 2.0**31), (2.0**-126, 2.0**-100), (3.7, 1.0)):
        s_a, s_b = torch.tensor(scales)
        y = scaled_mm(a, b, s_a, s_b, out_dtype=out_dtype)

        expected = (steps * inverse_of_product(s_a, s_b)).to(out_dtype)
        assert torch.equal(y, expected[:, None].expand(2048, width)), scales


@pytest.mark.parametrize("width", [1, 40])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_subnormal_results_are_kept_where_torch_flushes_them(out_dtype: torch.dtype, width: int, path: str) -> None:
    if path == "eager":
        pytest.skip("eager obeys torch.set_flush_denormal by definition")
    a, b, scale = operand(300, 16, E4M3FN, 0), operand(16, width, E4M3FN, 1), torch.tensor(2.0**71)
    expected = scaled_mm(a, b, scale, scale, out_dtype=out_dtype)
    assert (expected.abs()[expected != 0] < 2.0**-126).any()

    torch.set_flush_denormal(True)
    try:
        y = scaled_mm(a, b, scale, scale, out_dtype=out_dtype)
    finally:
        torch.set_flush_denormal(False)

    assert torch.equal(y.view(torch.uint8), expected.view(torch.uint8))


def test_the_dispatcher_runs_the_compiled_body_and_it_does_what_the_one_in_python_does() -> None:
    if reason := cpu.unavailable_reason():
        pytest.skip(reason)
    a, b = operand(33, 70, E5M2, 0), operand(20, 70, E4M3FN, 1).t()
    s_a, s_b = torch.tensor(ANY)

    for out_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        y = scaled_mm(a, b, s_a, s_b, out_dtype=out_dtype)

        assert y.dtype == out_dtype
        assert y.device == torch.device("cpu")
        assert y.is_contiguous()
        assert torch.equal(y, matmul.mm_body(a, b, s_a, s_b, out_dtype, False, False))
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fp8core::scaled_mm", "CPU") == cpu.is_registered()
    assert cpu.is_registered() or torch.__version__ < "2.10"


@pytest.mark.parametrize("gemm", ["fprop", "dgrad"])
@pytest.mark.parametrize(
    "shape", [(257, 700, 300), (600, 16, 300), (1, 9000, 300), (300, 9000, 1), (1500, 1, 1500)], ids=str
)
def test_two_threads_give_the_bits_of_one(shape: tuple[int, int, int], gemm: str, path: str) -> None:
    a, b = operands(*shape, gemm, E4M3FN, E4M3FN)
    one, threads = torch.tensor(1.0), torch.get_num_threads()

    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(scaled_mm(a, b, one, one, out_dtype=torch.float32))
    torch.set_num_threads(threads)

    if path != "eager":  # how torch splits a float32 sum is its own matter
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"b": torch.zeros(20, 5).to(torch.float8_e5m2)}, "a has 16 columns, b 20 rows; they must be equal"),
        ({"a": torch.zeros(8, 16)}, "a is no FP8 matrix"),
        ({"a": torch.zeros(1, 8, 16).to(torch.float8_e5m2)}, "a is no FP8 matrix"),
        ({"scale_b": torch.tensor(1.0, dtype=torch.float64)}, "scale_b is no float32 0-d tensor"),
    ],
    ids=["shapes", "dtype", "dimensions", "scale"],
)
def test_what_is_wrong_is_named(wrong: dict[str, Tensor], words: str) -> None:
    if cpu.unavailable_reason() or not cpu.is_registered():
        pytest.skip("torch's own GEMM finds other words")
    right = {"a": operand(8, 16, E4M3FN, 0), "b": operand(16, 5, E4M3FN, 1)}
    given = right | {"scale_a": torch.tensor(1.0), "scale_b": torch.tensor(1.0)} | wrong

    with pytest.raises(RuntimeError, match=words):
        scaled_mm(given["a"], given["b"], given["scale_a"], given["scale_b"], out_dtype=torch.float32)


@pytest.mark.parametrize(
    "flags", [("-march=haswell",), pytest.param((), marks=pytest.mark.slow)], ids=["AVX2", "SSE2 or NEON"]
)
def test_other_processors_vectors_multiply_as_exactly(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cpu.unavailable_reason() or (flags and not torch.cpu._is_avx2_supported()):
        pytest.skip("cannot be compiled or run here")
    monkeypatch.setattr(cpu_build, "_FLAG_SETS", (flags,))
    monkeypatch.setattr(cpu, "_loaded", (cpu._open(cpu_build.build(tmp_path)), None))
    monkeypatch.setattr(matmul, "_operation", matmul.mm_body)
    monkeypatch.setattr(cpu, "product_or_none", cpu._no_product)
    assert cpu.engines() == ("float32",)

    for gemm in ("fprop", "dgrad", "wgrad"):
        for shape in ((3, 1023, 5), (64, 256, 128), (200, 800, 48), *THIN):
            assert_float32_product_is_exact(shape, gemm, (E5M2FNUZ, E4M3FNUZ))
            assert_bfloat16_product_is_rounded_once(shape, gemm)


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
