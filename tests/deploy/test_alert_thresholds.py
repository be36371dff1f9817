"""The numbers that rules/runs.yml and the runbooks give for their thresholds, computed anew."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from fp8core.formats import E4M3FN, E5M2, Fp8Format

Array = npt.NDArray[np.float32]
DTYPES = {E4M3FN: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
ELEMENTS = 1 << 20


def normal() -> Array:
    return np.random.default_rng(0).standard_normal(ELEMENTS, dtype=np.float32)


def student_t() -> Array:
    """The quantiles of a Student t with 4 degrees of freedom: heavy tails, as gradients have, but no luck involved."""
    p = (np.arange(ELEMENTS) + 0.5) / ELEMENTS
    root = np.sqrt(4 * p * (1 - p))
    return (np.sign(p - 0.5) * 2 * np.sqrt(np.maximum(np.cos(np.arccos(root) / 3) / root - 1, 0))).astype(np.float32)


def sqnr_db(x: Array, scale: float, fmt: Fp8Format) -> float:
    q = np.clip(x * np.float32(scale), -fmt.max, fmt.max).astype(DTYPES[fmt]).astype(np.float32)
    error = x - q / np.float32(scale)
    return float(10 * np.log10(np.square(x).sum() / np.square(error).sum()))


def just_in_time_scale(x: Array, fmt: Fp8Format) -> float:
    return float(2.0 ** np.floor(np.log2(fmt.max / np.abs(x).max())))


def scale_that_clips(x: Array, share: float, fmt: Fp8Format) -> float:
    return fmt.overflow_limit / float(np.quantile(np.abs(x), 1 - share))


def scale_that_flushes(x: Array, share: float, fmt: Fp8Format) -> float:
    return fmt.flush_limit / float(np.quantile(np.abs(x), share))


@pytest.mark.parametrize(
    ("tensor", "clipped", "expected_db"),
    [(student_t, 1e-5, 28.5), (student_t, 1e-3, 18.6), (normal, 1e-3, 30.5)],
)
def test_what_clipping_costs(tensor: Callable[[], Array], clipped: float, expected_db: float) -> None:
    x = tensor()

    assert sqnr_db(x, just_in_time_scale(x, E4M3FN), E4M3FN) == pytest.approx(31.5, abs=0.1)
    assert sqnr_db(x, scale_that_clips(x, clipped, E4M3FN), E4M3FN) == pytest.approx(expected_db, abs=0.1)


def test_what_a_scale_eight_times_too_large_leaves() -> None:
    x = normal()

    assert sqnr_db(x, 8 * just_in_time_scale(x, E4M3FN), E4M3FN) == pytest.approx(7.0, abs=0.1)


@pytest.mark.parametrize(
    ("fmt", "flushed", "lost_db"), [(E4M3FN, 0.05, 3), (E4M3FN, 0.1, 9), (E5M2, 0.05, 0.6), (E5M2, 0.1, 3)]
)
def test_what_underflow_costs(fmt: Fp8Format, flushed: float, lost_db: float) -> None:
    x = normal()

    lost = sqnr_db(x, just_in_time_scale(x, fmt), fmt) - sqnr_db(x, scale_that_flushes(x, flushed, fmt), fmt)

    assert lost == pytest.approx(lost_db, abs=0.4)
