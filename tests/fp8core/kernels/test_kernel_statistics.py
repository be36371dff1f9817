"""The row that a cast leaves: every counter against the definitions, merging, ranges, threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

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
    cast, target = kernels.module._library().fp8_cast, kernels.module._target(E4M3FN)

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
            words.data_ptr(),
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
