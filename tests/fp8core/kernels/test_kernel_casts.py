"""Every value of the 16-bit types, every rounding tie and random float32 through every implementation's cast."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest
import torch

from fp8core.formats import E4M3FN
from fp8core.records import COLUMNS, decode_arena

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EVERY_16_BIT_WORD = torch.arange(65536, dtype=torch.int32).to(torch.int16)
FLOAT32_MAX = float(np.finfo(np.float32).max)


def mismatches(x, got, expected):
    """The values that came out differently, with both codes: what a failing assertion prints."""
    where = np.flatnonzero(got.ravel() != expected.ravel())
    wide = x.float().numpy().ravel()
    return [(float(wide[i]), hex(got.ravel()[i]), hex(expected.ravel()[i])) for i in where[:8]], where.size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**20], ids=["scale_1", "scale_odd", "scale_large"])
def test_every_16_bit_value_is_cast_as_ml_dtypes_does_after_saturation(kernels, fmt, dtype, scale, expected_codes):
    x = EVERY_16_BIT_WORD.view(dtype)

    got, amax = kernels.cast(x, scale, fmt)

    examples, count = mismatches(x, got, expected_codes(x, scale, fmt))
    assert count == 0, examples
    assert amax == torch.finfo(dtype).max


def test_every_rounding_tie_goes_to_the_even_code_and_its_neighbours_to_the_nearest(kernels, fmt, expected_codes):
    codes = torch.arange(fmt.max_code + 1, dtype=torch.uint8).view(getattr(torch, fmt.torch_dtype)).float().numpy()
    midpoints = np.append((codes[:-1] + codes[1:]) / 2, fmt.overflow_limit).astype(np.float32)
    around = np.concatenate(
        [np.nextafter(midpoints, np.float32(0)), midpoints, np.nextafter(midpoints, np.float32(1e9))]
    )
    magnitudes = torch.from_numpy(np.concatenate([around, codes]))
    x = torch.cat([magnitudes, -magnitudes])

    got, _ = kernels.cast(x, 1.0, fmt)

    examples, count = mismatches(x, got, expected_codes(x, 1.0, fmt))
    assert count == 0, examples
    tie_codes, _ = kernels.cast(torch.from_numpy(midpoints[:-1]), 1.0, fmt)
    assert (tie_codes % 2 == 0).all()


def test_random_float32_bit_patterns_and_values_near_the_range_are_cast_as_ml_dtypes_does(kernels, fmt, expected_codes):
    generator = np.random.default_rng(1)
    half = kernels.many // 2
    patterns = generator.integers(0, 2**32, half, dtype=np.uint32).view(np.float32)
    exponents = generator.integers(-24, 20, half).astype(np.int32)
    near = np.ldexp(generator.standard_normal(half, dtype=np.float32), exponents)
    x = torch.from_numpy(np.concatenate([patterns, near]))

    got, amax = kernels.cast(x, 1.0, fmt)

    examples, count = mismatches(x, got, expected_codes(x, 1.0, fmt))
    assert count == 0, examples
    assert amax == np.abs(x.numpy()[np.isfinite(x.numpy())]).max()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_million_random_float32_are_cast_and_counted_as_an_oracle_does(
    kernels, fmt, expected_codes, new_words, expected_row, assert_row
):
    generator = np.random.default_rng(2)
    counters = [name for name in COLUMNS if name not in ("writes", "amax", "scale_min", "scale_max")]
    words, total = new_words(1), dict.fromkeys(counters, 0.0)
    for scale in (1.0, 0.37) * 5:
        patterns = generator.integers(0, 2**32, 500_000, dtype=np.uint32).view(np.float32)
        exponents = generator.integers(-24, 20, 500_000).astype(np.int32)
        near = np.ldexp(generator.standard_normal(500_000, dtype=np.float32), exponents)
        # Half of what is near the range comes without its last 19 bits, so that ties are everywhere.
        near[::2] = (near[::2].view(np.uint32) & np.uint32(0xFFF80000)).view(np.float32)
        x = torch.from_numpy(np.concatenate([patterns, near]))

        got, _ = kernels.cast(x, scale, fmt, words)

        examples, count = mismatches(x, got, expected_codes(x, scale, fmt))
        assert count == 0, examples
        row = expected_row(x, scale, fmt)
        total = {name: total[name] + row[name] for name in counters}
    integers = [name for name in counters if name not in ("sum_sq", "err_sq")]
    merged = decode_arena(words.numpy()).columns
    assert {name: int(merged[name][0]) for name in integers} == {name: int(total[name]) for name in integers}


def test_counts_beyond_float32s_integers_are_exact(kernels, new_words):
    if INTERPRETED:
        pytest.skip("16 million elements take the interpreter minutes")
    count, words = (1 << 24) + 1, new_words(1)

    kernels.cast(torch.full((count,), 1e-30, dtype=torch.bfloat16), 1.0, E4M3FN, words)

    row = decode_arena(words.numpy()).columns
    assert (int(row["underflow"][0]), int(row["numel"][0])) == (count, count)


def test_a_product_beyond_float32_is_clipped_and_below_float32_becomes_zero(kernels, fmt, expected_codes):
    x = torch.tensor([FLOAT32_MAX, -FLOAT32_MAX, 3.0, 1e-45, -1e-45, 0.0])

    for scale in (3e38, 1.2e-38):
        got, _ = kernels.cast(x, scale, fmt)
        np.testing.assert_array_equal(got, expected_codes(x, scale, fmt), err_msg=f"scale {scale:g}")


def test_infinities_become_the_largest_value_and_nan_stays_nan(kernels, fmt):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])

    got, amax = kernels.cast(x, 2.0, fmt)

    values = torch.from_numpy(got).view(getattr(torch, fmt.torch_dtype)).float()
    assert values[:2].tolist() == [fmt.max, -fmt.max]
    assert values[2].isnan()
    assert values[3] == 2.0
    assert amax == 1.0


def test_strided_and_empty_tensors_are_cast_like_contiguous_ones(kernels, fmt, expected_codes):
    base = torch.randn(37, 50, generator=torch.Generator().manual_seed(2))

    for x in (base.t(), base[::2, 1::3], base[0, 0], base[:0], base.expand(2, 37, 50)):
        got, amax = kernels.cast(x, 64.0, fmt)
        np.testing.assert_array_equal(got, expected_codes(x, 64.0, fmt))
        assert amax == (float(x.abs().max()) if x.numel() else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_codes_dequantise_to_their_exact_values(kernels, fmt, dtype):
    codes = np.tile(np.arange(256, dtype=np.uint8), 9)[: 256 * 9 - 5]
    q = torch.from_numpy(codes).view(getattr(torch, fmt.torch_dtype)).to(kernels.device)

    values = kernels.module.dequantize(q, dtype)

    assert values.dtype == dtype
    expected = codes.view(getattr(ml_dtypes, fmt.torch_dtype)).astype(np.float32)
    np.testing.assert_array_equal(values.float().cpu().numpy(), expected)  # NaN equals NaN here
    zeros = expected == 0
    np.testing.assert_array_equal(np.signbit(values.float().cpu().numpy()[zeros]), np.signbit(expected[zeros]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_amax_is_the_largest_finite_magnitude_of_any_dtype_and_length(kernels, dtype):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[7], x[8], x[9] = torch.inf, -torch.inf, torch.nan

    for count in (0, 1, 9, 10, 63, 64, 65, 2047, 2048, 2049, 4999):
        piece = x[:count]
        amax = kernels.module.amax(piece.to(kernels.device))
        finite = piece[piece.isfinite()].abs()
        assert amax.dtype == torch.float32
        assert amax.ndim == 0
        assert float(amax) == (float(finite.max()) if finite.numel() else 0.0), count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_exponent_histogram_counts_every_element_in_its_power_of_two(kernels, dtype):
    x = EVERY_16_BIT_WORD.view(dtype) if dtype.itemsize == 2 else EVERY_16_BIT_WORD.int().mul(65521).view(dtype)
    x = torch.cat([x, torch.zeros(5, dtype=dtype)])

    counts = kernels.module.exponent_histogram(x.to(kernels.device))

    exponents = (x.float().view(torch.int32).numpy() >> 23) & 0xFF
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.cpu().numpy(), np.bincount(exponents, minlength=256))
