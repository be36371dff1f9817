"""The Triton kernel that also writes the transposed payload; on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from fp8core.formats import E4M3FN, E5M2FNUZ

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available(), reason="no GPU and not interpreted"
)


@pytest.fixture
def triton_kernels(kernels):
    if kernels.name != "triton":
        pytest.skip("only Triton transposes")
    return kernels


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 130), (128, 16), (0, 5)], ids=str)
def test_both_payloads_are_the_casts_and_the_row_counts_each_element_once(
    triton_kernels, shape, new_words, expected_codes, expected_row, assert_row
):
    device = triton_kernels.device
    generator = np.random.default_rng(4)
    x = np.ldexp(generator.standard_normal(shape), generator.integers(-22, 14, shape)).astype(np.float32)
    x[generator.random(shape) < 0.05] = np.nan
    x[generator.random(shape) < 0.05] = 0
    x = torch.from_numpy(x).bfloat16()

    for fmt in (E4M3FN, E5M2FNUZ):
        words = new_words(2).to(device)
        q, q_t, amax = triton_kernels.module.cast_transpose(
            x.to(device), torch.tensor(4.0, device=device), fmt, words=words, slot=torch.tensor(1, device=device)
        )

        expected = expected_codes(x, 4.0, fmt)
        np.testing.assert_array_equal(q.view(torch.uint8).cpu().numpy(), expected)
        np.testing.assert_array_equal(q_t.view(torch.uint8).cpu().numpy(), expected.T)
        assert q_t.is_contiguous()
        row = expected_row(x, 4.0, fmt)
        assert float(amax) == row["amax"]
        assert_row(words.cpu(), 1, row)


def test_sums_hold_where_float32_cannot_and_overwriting_replaces(triton_kernels, new_words, expected_row, assert_row):
    device = triton_kernels.device
    x = torch.randn(70, 70, generator=torch.Generator().manual_seed(6)) * 1e-30
    words = new_words(1).to(device)

    for _ in range(2):
        triton_kernels.module.cast_transpose(
            x.to(device),
            torch.tensor(1.0, device=device),
            E4M3FN,
            words=words,
            slot=torch.tensor(0, device=device),
            overwrite=True,
        )

    assert_row(words.cpu(), 0, expected_row(x, 1.0, E4M3FN))


def test_a_tensor_that_is_no_matrix_is_refused(triton_kernels):
    with pytest.raises(ValueError, match="x has 1 dimensions"):
        triton_kernels.module.cast_transpose(torch.ones(3), torch.tensor(1.0), E4M3FN)
