"""The formats are what ml_dtypes and torch say they are, code by code."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from fp8core.formats import E4M3, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, FORMATS, GRAPHCORE, HYBRID, PAIRS, Fp8Format
from fp8core.records import Role

ML_DTYPES = {
    "E4M3FN": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_limits_equal_those_of_ml_dtypes(fmt: Fp8Format) -> None:
    info = ml_dtypes.finfo(ML_DTYPES[fmt.name])

    assert fmt.max == float(info.max)
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.smallest_subnormal == float(info.smallest_subnormal)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_every_code_means_the_same_to_torch_and_to_ml_dtypes(fmt: Fp8Format) -> None:
    codes = np.arange(256, dtype=np.uint8)

    by_torch = torch.from_numpy(codes.copy()).view(getattr(torch, fmt.torch_dtype)).float().numpy()

    np.testing.assert_array_equal(by_torch, codes.view(ML_DTYPES[fmt.name]).astype(np.float32))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_overflow_limit_is_where_rounding_leaves_the_range(fmt: Fp8Format) -> None:
    below, above = (np.nextafter(np.float32(fmt.overflow_limit), np.float32(to)) for to in (0, np.inf))

    def cast(value: np.float32 | float) -> float:
        return float(np.float32(value).astype(ML_DTYPES[fmt.name]))

    assert cast(below) == fmt.max
    assert not np.isfinite(cast(above))
    assert np.isfinite(cast(fmt.overflow_limit)) == (not fmt.ties_overflow)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_flush_limit_is_the_largest_value_that_rounds_to_zero(fmt: Fp8Format) -> None:
    above = np.nextafter(np.float32(fmt.flush_limit), np.float32(np.inf))

    assert float(np.float32(fmt.flush_limit).astype(ML_DTYPES[fmt.name])) == 0
    assert float(above.astype(ML_DTYPES[fmt.name])) == fmt.smallest_subnormal


def test_limits_that_the_literature_quotes() -> None:
    quoted = {E4M3FN: (448, 464), E5M2: (57344, 61440), E4M3FNUZ: (240, 248), E5M2FNUZ: (57344, 61440)}

    assert {fmt: (fmt.max, fmt.overflow_limit) for fmt in quoted} == quoted


def test_pairs_give_gradients_the_backward_format() -> None:
    assert [HYBRID.fmt(role) for role in Role] == [E4M3FN, E4M3FN, E5M2]
    assert [E4M3.fmt(role) for role in Role] == [E4M3FN] * 3
    assert [GRAPHCORE.fmt(role) for role in Role] == [E4M3FNUZ, E4M3FNUZ, E5M2FNUZ]
    assert HYBRID.fmt("gradient") is E5M2
    assert list(PAIRS) == [str(pair) for pair in (HYBRID, E4M3, GRAPHCORE)]
