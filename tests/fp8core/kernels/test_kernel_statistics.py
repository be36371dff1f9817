"""The row that a cast leaves: every counter against the definitions, merging, ranges, threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from fp8core.device_scaling import amax_scale
from fp8core.formats import E4M3FN, E5M2
from fp8core.records import COLUMNS, decode_arena


def spread(count, dtype, seed=0):
    """Values over many binades, with zeros of both signs, infinities and NaN among them."""
    generator = np.random.default_rng(seed)
    x = np.ldexp(generator.standard_normal(count), generator.integers(-22, 14, count)).astype(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan]
    x[generator.integers(0, count, count // 50)] = np.resize(special, count // 50)
    return torch.from_numpy(x).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.7, 2.0**9], ids=["scale_1", "scale_odd", "scale_large"])
def test_every_column_is_what_its_definition_says(kernels, fmt, dtype, scale, new_words, expected_row, assert_row):
    x = spread(7001, dtype)
    words = new_words(3)

    kernels.cast(x, scale, fmt, words, 1)

    assert_row(words, 1, expected_row(x, scale, fmt))
    assert (words[[0, 2]] == new_words(2)).all(), "another row was touched"


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049])
def test_tensors_of_any_length_are_counted_once(kernels, count, new_words, expected_row, assert_row):
    x = spread(4096, torch.bfloat16)[:count]
    words = new_words(1)

    kernels.cast(x, 2.0**5, E4M3FN, words)

    assert_row(words, 0, expected_row(x, 2.0**5, E4M3FN))


def test_a_magnitude_at_the_overflow_limit_overflows_only_where_it_rounds_out_of_range(kernels, fmt, new_words):
    limit = np.float32(fmt.overflow_limit)
    beyond, below = np.nextafter(limit, np.float32(1e9)), np.nextafter(limit, np.float32(0))
    counts = []
    for value in (below, limit, beyond):
        words = new_words(1)
        kernels.cast(torch.tensor([value, -value]), 1.0, fmt, words)
        counts.append(int(words[0, COLUMNS.index("overflow")]))

    assert counts == [0, 2 if fmt.ties_overflow else 0, 2]


def around(limit, scale):
    """float32 values whose products with `scale` lie around `limit`, a few steps to each side, of both signs."""
    x = np.float32(limit) / np.float32(scale)
    near = (x.view(np.int32) + np.arange(-8, 9, dtype=np.int32)).view(np.float32)
    return torch.from_numpy(np.concatenate([near, -near]))


@pytest.mark.parametrize("scale", [0.0, 2.0**-60, 3.7, 2.0**9, 1e20], ids="scale_{}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_counted_without_a_payload_is_what_a_cast_leaves_to_the_bit(kernels, fmt, dtype, scale, new_words):
    step = fmt.smallest_normal / 2**fmt.mantissa_bits
    limits = [step / 2, fmt.smallest_normal - step / 2, fmt.overflow_limit]
    borders = [around(limit, scale) for limit in limits] if scale else []
    every = torch.arange(65536).to(torch.uint16).view(dtype if dtype != torch.float32 else torch.bfloat16)
    mild = every[every.float().abs() < 4]  # blocks without Inf, NaN or overflow
    values = [*borders, every, spread(3001, torch.float32)] if kernels.many > 100_000 else [*borders, every[::37]]
    for x in (torch.cat([value.to(dtype) for value in values]), mild[:4099].to(dtype), torch.zeros(70, dtype=dtype)):
        x = x.to(kernels.device)
        cast, counted = new_words(1).to(kernels.device), new_words(1).to(kernels.device)
        where = {"slot": torch.tensor(0, device=kernels.device), "overwrite": True}
        factor = torch.tensor(scale, device=kernels.device)

        _, amax = kernels.module.cast(x, factor, fmt, words=cast, **where)
        counted_amax = kernels.module.count(x, factor, fmt, words=counted, **where)

        assert counted_amax == amax
        assert torch.equal(counted, cast), list(zip(COLUMNS, counted[0].tolist(), cast[0].tolist(), strict=True))


@pytest.mark.parametrize("last", [1.0, 2.0**7, 2.0**8, 2.0**9, 2.0**-126, 2.0**126], ids="last_{}".format)
@pytest.mark.parametrize("make", ["normal", "spread", "growing", "zeros", "nan"])
def test_counting_by_amax_leaves_the_row_of_the_right_scale_whatever_the_last_one_was(kernels, new_words, make, last):
    x = {
        "normal": torch.randn(20_000, generator=torch.Generator().manual_seed(0)),
        "spread": spread(20_000, torch.float32),
        "growing": torch.linspace(0, 100, 20_000),  # block by block another scale
        "zeros": torch.zeros(100),
        "nan": torch.full((100,), torch.nan),
    }[make].to(kernels.device)
    slot = torch.tensor(1, device=kernels.device)
    wanted, got = new_words(2).to(kernels.device), new_words(2).to(kernels.device)
    scale = amax_scale(kernels.module.amax(x), E5M2, 3, 126)
    kernels.module.count(x, scale, E5M2, words=wanted, slot=slot, overwrite=False)
    last_scales = torch.full((2,), last)

    for _ in range(2):  # the second time with the scale of the first
        got.copy_(new_words(2))
        kernels.module.count_by_amax(x, E5M2, 3, 126, words=got, slot=slot, overwrite=False, last_scales=last_scales)
        assert torch.equal(got, wanted), list(zip(COLUMNS, got[1].tolist(), wanted[1].tolist(), strict=True))

    if kernels.name == "cpu":
        assert last_scales.tolist() == [last, float(scale)]


@pytest.mark.parametrize("scale", [torch.inf, -torch.inf, torch.nan, -1.0])
def test_a_scale_that_is_none_is_refused_and_no_row_is_touched(kernels, new_words, scale):
    if kernels.name != "cpu":
        pytest.skip("on a device the scale is not known to the host; its counters do not wrap")
    x, words, slot = torch.ones(100), new_words(1), torch.tensor(0)

    for cast in (kernels.module.cast, kernels.module.count):
        with pytest.raises(ValueError, match=r"scale is .*; expected a finite number that is not negative"):
            cast(x, torch.tensor(scale), E4M3FN, words=words, slot=slot, overwrite=False)

    assert torch.equal(words, new_words(1))


def test_calls_merge_into_a_row_by_the_rule_of_each_field(kernels, new_words, expected_row, assert_row):
    parts = [(spread(999, torch.bfloat16, seed), scale) for seed, scale in ((1, 4.0), (2, 0.5), (3, 64.0))]
    words = new_words(2)

    for x, scale in parts:
        kernels.cast(x, scale, E5M2, words, 1)

    rows = [expected_row(x, scale, E5M2) for x, scale in parts]
    merged = {name: sum(row[name] for row in rows) for name in COLUMNS}
    merged |= {name: max(row[name] for row in rows) for name in ("amax", "scale_max")}
    merged |= {"scale_min": min(row["scale_min"] for row in rows)}
    assert_row(words, 1, merged)


def test_overwriting_replaces_the_row(kernels, new_words, expected_row, assert_row):
    first, second = spread(500, torch.bfloat16, 1), torch.full((10,), 0.25, dtype=torch.bfloat16)
    words = new_words(2)
    kernels.cast(first, 1024.0, E4M3FN, words, 1)

    kernels.cast(second, 2.0, E4M3FN, words, 1, overwrite=True)

    assert_row(words, 1, expected_row(second, 2.0, E4M3FN))
    assert decode_arena(words.numpy()).slot.tolist() == [1]


@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e-12, 1e12, 1e22, 1e30], ids="{:g}".format)
@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60], ids=lambda scale: f"scale={scale:g}")
def test_sums_of_squares_hold_where_float32_cannot(kernels, magnitude, scale, new_words, expected_row, assert_row):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(5)) * magnitude
    words = new_words(1)

    kernels.cast(x, scale, E4M3FN, words)

    assert_row(words, 0, expected_row(x, scale, E4M3FN))


def test_finite_values_whose_product_leaves_float32_overflow_and_infinities_do_not(kernels, new_words):
    x = torch.tensor([1e38, -1e38, torch.inf, torch.nan, 1e-38])
    words = new_words(1)

    kernels.cast(x, 1e10, E4M3FN, words)

    row = decode_arena(words.numpy()).columns
    assert row["overflow"].item() == 2
    assert row["nonfinite"].item() == 2
    assert row["underflow"].item() == 1
    assert np.isfinite(row["err_sq"].item())


def test_subnormal_inputs_count_even_where_torch_flushes_them(kernels, new_words):
    if kernels.name != "cpu":
        pytest.skip("eager obeys torch.set_flush_denormal by definition; a GPU has no such mode")
    smallest = torch.ones(100, dtype=torch.int16).view(torch.bfloat16)
    words = new_words(1)

    torch.set_flush_denormal(True)
    try:
        codes, _ = kernels.cast(smallest, 2.0**120, E5M2, words)
    finally:
        torch.set_flush_denormal(False)

    assert (codes != 0).all()
    assert decode_arena(words.numpy()).columns["zeros"].item() == 0


def test_a_row_does_not_depend_on_the_number_of_threads(kernels, new_words):
    if kernels.name != "cpu":
        pytest.skip("only the C++ kernels divide work among CPU threads themselves")
    x = spread(300_001, torch.bfloat16)
    rows = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        words = new_words(1)
        kernels.cast(x, 2.0**4, E4M3FN, words)
        rows.append(words)

    assert (rows[0] == rows[1]).all()
    assert (rows[0] == rows[2]).all()


def test_threads_that_write_to_one_row_lose_nothing(kernels, new_words):
    if kernels.name != "cpu":
        pytest.skip("only the C++ kernels promise this to CPU threads")
    x = torch.ones(8, dtype=torch.bfloat16)
    words, scale = new_words(1), torch.tensor(8.0)
    slot = torch.tensor(0)
    cast, target = kernels.module._library().fp8_cast, kernels.module._target(E4M3FN.name)

    def write():
        q, amax = torch.empty(8, dtype=torch.uint8), torch.empty(())  # the library itself: little else holds the GIL
        arguments = (
            x.data_ptr(),
            8,
            0,
            scale.data_ptr(),
            target,
            q.data_ptr(),
            amax.data_ptr(),
            *(words.data_ptr(), 1, slot.data_ptr()),
            0,
            1,
        )
        for _ in range(30_000):
            cast(*arguments)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert words[0, 0] == 120_000
    assert decode_arena(words.numpy()).columns["numel"].item() == 8 * 120_000
